"""Signs of life by the age of a file a rank, and where a rank is that gives none."""

import faulthandler
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Iterator, List

import psutil
import pytest

from lit_glm.config.schema import TrainConfig
from lit_glm.launch import heartbeat as watch_file
from lit_glm.launch.heartbeat import (
    Heartbeat,
    StallWatchdog,
    clear_heartbeats,
    collect_stack_traces,
    last_heartbeat,
    stall_message,
)

RANK = """
import pathlib, sys, time
from lit_glm.launch.heartbeat import Heartbeat
beat = Heartbeat(pathlib.Path(sys.argv[1]), int(sys.argv[2]))
def compute_for_ever():
    print("there", flush=True)
    while True: pass
def wait_for_the_others():
    print("there", flush=True); time.sleep(600)
(compute_for_ever if sys.argv[2] == "1" else wait_for_the_others)()
"""


@pytest.fixture
def this_rank(tmp_path: Path) -> Iterator[Heartbeat]:
    """A heartbeat of this process, which answers nobody afterwards."""
    yield Heartbeat(tmp_path, 0)
    faulthandler.unregister(signal.SIGUSR1)


def test_heartbeat_age_counts_from_last_heartbeat_or_start(
    tmp_path: Path, this_rank: Heartbeat, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [time.time()]
    monkeypatch.setattr(watch_file.time, "time", lambda: clock[0])
    silence, other = StallWatchdog(tmp_path, [7, 0], 30.0), StallWatchdog(tmp_path, [7], 30.0, 90.0)
    this_rank()
    assert (last_heartbeat(tmp_path, [7, 0]) > 0, last_heartbeat(tmp_path, [7])) == (True, 0.0)
    os.utime(tmp_path / "ranks" / "0", (clock[0] - 50, clock[0] - 50))
    assert silence.seconds_since_heartbeat() == 0  # what another run has left does not count
    for _ in range(12):
        clock[0] += 5
        silence.seconds_since_heartbeat(), other.seconds_since_heartbeat()
    assert (silence.seconds_since_heartbeat(), other.seconds_since_heartbeat()) == (60, 60)
    assert silence.stalled_ranks()[0] == "rank 7 has not started"
    assert other.stalled_ranks() == []  # nobody has begun: the nodes may still be meeting
    os.utime(tmp_path / "ranks" / "0", (clock[0] - 1, clock[0] - 1))
    assert 0.9 < silence.seconds_since_heartbeat() < 1.1  # one that goes on is enough
    assert other.seconds_since_heartbeat() == 60
    clock[0] += 600  # nobody has asked for so long: whoever asks was stopped himself
    assert other.seconds_since_heartbeat() == 0
    clear_heartbeats(tmp_path)
    assert last_heartbeat(tmp_path, [7, 0]) == 0.0


def test_rank_waiting_in_rendezvous_has_no_heartbeat(
    tmp_path: Path, this_rank: Heartbeat, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [time.time()]
    monkeypatch.setattr(watch_file.time, "time", lambda: clock[0])
    monkeypatch.setattr(watch_file, "collect_stack_traces", lambda folder, ranks: [f"ranks {ranks}"])
    watch = StallWatchdog(tmp_path, [0], 30.0, 90.0)
    found = []
    for _ in range(20):
        clock[0] += 5
        found.append(watch.stalled_ranks())
    assert found == [[]] * 18 + [["ranks [0]"]] * 2
    this_rank()
    assert last_heartbeat(tmp_path, [0]) > 0


def test_heartbeat_is_written_at_most_once_per_second(tmp_path: Path, this_rank: Heartbeat) -> None:
    file = tmp_path / "ranks" / "0"
    this_rank()
    os.utime(file, (1, 1))
    this_rank()  # a step may be much shorter
    assert file.stat().st_mtime == 1
    file.unlink()
    time.sleep(1.1)
    this_rank()
    assert file.exists()  # whoever has taken it away


def test_stack_traces_of_all_ranks_are_collected(tmp_path: Path) -> None:
    ranks: List[Any] = [
        subprocess.Popen([sys.executable, "-c", RANK, str(tmp_path), str(rank)], stdout=subprocess.PIPE)
        for rank in range(4)
    ]
    try:
        for rank in ranks:
            assert rank.stdout.readline() == b"there\n"
        ranks[3].send_signal(signal.SIGSTOP)
        while psutil.Process(ranks[3].pid).status() != psutil.STATUS_STOPPED:
            time.sleep(0.01)
        said = collect_stack_traces(tmp_path, range(5))
        assert said[0] == f"rank 3 (process {ranks[3].pid}) is stopped (SIGSTOP)"
        assert said[1] == "rank 4 has not started"
        assert said[2].startswith("ranks 0, 2, innermost call first:\n")
        assert "in wait_for_the_others" in said[2]
        assert said[3].startswith("rank 1, innermost call first:\n")
        assert "in compute_for_ever" in said[3].split("\n")[1]
        assert len(said) == 4
        config = TrainConfig()
        config.run.stall_timeout_s = 2.5
        assert "no progress for 2.5 s (run.stall_timeout_s)" in stall_message(config, tmp_path, said)
        before = (tmp_path / "ranks" / "0").stat().st_mtime
        again = collect_stack_traces(tmp_path, [0])
        assert (tmp_path / "ranks" / "0").stat().st_mtime == before  # an answer is no sign of progress
        assert again[0].count("in wait_for_the_others") == 1
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert collect_stack_traces(tmp_path, [1]) == ["rank 1 has exited"]


def test_watchdog_terminates_a_hanging_process(tmp_path: Path) -> None:
    code = (
        "import os, sys, time, pathlib; from lit_glm.launch.heartbeat import Heartbeat\n"
        "from lit_glm.launch.heartbeat import StallWatchdog, run_watchdog\n"
        "def ends(where): print(where[0], flush=True); os._exit(1)\n"
        "folder = pathlib.Path(sys.argv[1]); Heartbeat(folder, 0)\n"
        "with run_watchdog(StallWatchdog(folder, [0], 0.5), ends): time.sleep(60)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True, timeout=40, check=False
    )
    assert done.returncode == 1
    assert done.stdout.startswith("rank 0, innermost call first:\n")
