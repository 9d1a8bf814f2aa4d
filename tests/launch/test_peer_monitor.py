"""Ranks that are tied together end together, however one of them ended; real processes, and no collective library."""

import pickle
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, List

import pytest

from lit_glm.errors import RunError
from lit_glm.launch.peer_monitor import connect_peers

RANK = """
import pathlib, pickle, sys, time
from lit_glm.launch import peer_monitor

peer_monitor._GRACE_S = 0.5
peer_monitor._PROBES = {"TCP_KEEPIDLE": 1, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": 2}
folder, rank, fate = pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
ranks, address = int(sys.argv[4]), sys.argv[5]
told = folder / "told"

def agree(content):
    if rank == 0:
        told.with_name("part").write_bytes(pickle.dumps(content))
        told.with_name("part").rename(told)
    while not told.exists():
        time.sleep(0.01)
    return pickle.loads(told.read_bytes())

line = peer_monitor.connect_peers(rank, [f"host{n}" for n in range(ranks)], address, agree)
print("tied", flush=True)
sys.stdin.readline()
if fate == "fails":
    line.announce_exit(1)
if fate == "ends":
    line.announce_exit(0)
    time.sleep(rank)  # the others need not hurry
if fate == "stops":
    line.announce_exit(143)
if fate == "loses":
    error = line.error_of_lost_peer()
    print(error, flush=True)
    sys.exit(error.exit_status)
if fate == "waits":
    time.sleep(60)
"""


def start(folder: Path, *fates: str, first: int = 0) -> List["subprocess.Popen[str]"]:
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [
        subprocess.Popen([sys.executable, "-c", RANK, str(folder), str(rank), fate, "3", "127.0.0.1"], **pipes)
        for rank, fate in enumerate(fates, first)
    ]


def tied(ranks: List["subprocess.Popen[str]"]) -> None:
    for rank in ranks:
        assert rank.stdout is not None
        assert rank.stdout.readline() == "tied\n"
    for rank in ranks:
        assert rank.stdin is not None
        rank.stdin.write("\n")
        rank.stdin.flush()


@pytest.mark.parametrize("lost", [0, 2])
def test_killed_rank_terminates_the_other_ranks(lost: int, tmp_path: Path) -> None:
    ranks = start(tmp_path, "waits", "waits", "waits")
    tied(ranks)
    began = time.monotonic()
    ranks.pop(lost).send_signal(signal.SIGKILL)
    for rank in ranks:
        said = rank.communicate(timeout=20)[1]
        assert rank.returncode == 1
        assert f"exits: lost rank {lost} on host{lost}" in said
    assert time.monotonic() - began < 10


def test_unreachable_host_terminates_the_other_host(two_hosts: List[str], tmp_path: Path) -> None:
    """Nothing is closed when a cable is pulled: the kernel's probes notice."""
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", RANK, str(tmp_path)]
    ranks = [
        subprocess.Popen(
            ["ip", "netns", "exec", host, *command, str(rank), "waits", "2", "10.77.0.1"],
            **pipes,
        )
        for rank, host in enumerate(two_hosts)
    ]
    tied(ranks)
    subprocess.run(["ip", "-n", two_hosts[1], "link", "set", "v1", "down"], check=True)
    for rank, process in enumerate(ranks):
        said = process.communicate(timeout=30)[1]
        assert process.returncode == 1
        assert f"rank {rank} exits: lost rank {1 - rank} on host{1 - rank}: killed or unreachable" in said


def test_failed_rank_terminates_the_other_ranks(tmp_path: Path) -> None:
    ranks = start(tmp_path, "waits", "fails", "waits")
    tied(ranks)
    outputs = [rank.communicate(timeout=20)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, 0, 1]
    assert all("exits: rank 1" in outputs[rank] for rank in (0, 2))
    assert all("time.sleep(60)" in outputs[rank] or "in <module>" in outputs[rank] for rank in (0, 2))  # where it was


def test_error_caused_by_a_peer_interrupt_exits_as_interrupted(tmp_path: Path) -> None:
    for fate, status in (("stops", 143), ("fails", 1)):
        folder = tmp_path / fate
        folder.mkdir()
        ranks = start(folder, "loses", "waits", fate)
        tied(ranks)
        ranks[0].communicate(timeout=20)
        assert ranks[0].returncode == status
        for rank in ranks[1:]:
            rank.communicate(timeout=20)


def test_a_rank_that_is_interrupted_interrupts_the_others(tmp_path: Path) -> None:
    ranks = start(tmp_path, "waits", "waits", "stops")
    tied(ranks)
    outputs = [rank.communicate(timeout=20)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [143, 143, 0]
    assert all("exits: rank 2" in said and "was interrupted" in said for said in outputs[:2])


def test_successful_ranks_do_not_terminate_each_other(tmp_path: Path) -> None:
    ranks = start(tmp_path, "ends", "ends", "ends")
    tied(ranks)
    outputs = [rank.communicate(timeout=20)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0, 0], outputs
    assert outputs == ["", "", ""]


def test_unauthenticated_connection_is_closed(tmp_path: Path) -> None:
    ranks = start(tmp_path, "ends")
    told = tmp_path / "told"
    while not told.exists():
        time.sleep(0.01)
    port = pickle.loads(told.read_bytes())[0]
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        stranger.sendall(b"x" * 20)
        assert stranger.recv(1) == b""
    ranks += start(tmp_path, "ends", "ends", first=1)
    tied(ranks)
    for rank in ranks:
        assert rank.communicate(timeout=20)[1] == ""


def test_rank_that_cannot_reach_rank_0_raises(tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    with pytest.raises(RunError, match=f"rank 1 cannot reach rank 0 at 127.0.0.1:{port}"):
        connect_peers(1, ["host0", "host1"], "127.0.0.1", lambda _: (port, "00" * 16))
