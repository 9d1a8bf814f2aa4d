"""Signs of life by the age of a file a rank, and where a rank is that gives none."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Iterator, List

import psutil
import pytest

from lit_glm.jobs.heartbeat import Heartbeat, clear, silent_for, stalled, whereabouts

RANK = """
import pathlib, sys, time
from lit_glm.jobs.heartbeat import Heartbeat
beat = Heartbeat(pathlib.Path(sys.argv[1]), int(sys.argv[2]))
def compute_for_ever():
    print("there", flush=True)
    while True:
        pass
def wait_for_the_others():
    print("there", flush=True)
    time.sleep(600)
(compute_for_ever if sys.argv[2] == "1" else wait_for_the_others)()
"""


@pytest.fixture
def this_rank(tmp_path: Path) -> Iterator[Heartbeat]:
    """A heartbeat of this process, and its signal's handler as it was."""
    before = signal.getsignal(signal.SIGUSR1)
    yield Heartbeat(tmp_path, 0)
    signal.signal(signal.SIGUSR1, before)


def test_silence_is_counted_from_the_last_sign_or_from_the_start(tmp_path: Path, this_rank: Heartbeat) -> None:
    now = time.time()
    assert 99 < silent_for(tmp_path, [7], now - 100) < 102
    this_rank()
    assert silent_for(tmp_path, [0], now - 100) < 2
    assert silent_for(tmp_path, [7, 0], now - 100) < 2  # one that goes on is enough
    os.utime(tmp_path / "heartbeat" / "0", (now - 50, now - 50))
    this_rank()  # not again within a second: a step may be much shorter
    assert 49 < silent_for(tmp_path, [0], now - 100) < 53
    assert silent_for(tmp_path, [0], now) < 2  # what another run has left does not count
    clear(tmp_path)
    assert 99 < silent_for(tmp_path, [0], now - 100) < 102


def test_it_is_said_which_rank_is_where(tmp_path: Path) -> None:
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
        said = whereabouts(tmp_path, range(5))
        assert said[0] == f"rank 3 (process {ranks[3].pid}) is stopped (SIGSTOP)"
        assert said[1] == "rank 4 has given no sign of life"
        assert said[2].startswith("ranks 0, 2, innermost call first:\n")
        assert "in wait_for_the_others" in said[2]
        assert said[3].startswith("rank 1, innermost call first:\n")
        assert "in compute_for_ever" in said[3].split("\n")[1]
        assert len(said) == 4
        assert "no progress for 2.5 s (run.stall_timeout_s)" in stalled(2.5, tmp_path, said)
        again = whereabouts(tmp_path, [0])
        assert again[0].count("in wait_for_the_others") == 1
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert whereabouts(tmp_path, [1]) == ["rank 1 is gone"]


def test_a_process_whose_work_hangs_ends(tmp_path: Path) -> None:
    code = (
        "import sys, time, pathlib; from lit_glm.jobs.heartbeat import Heartbeat, watch_this_process as watch\n"
        "folder = pathlib.Path(sys.argv[1]); Heartbeat(folder, 0)\n"
        "watch(folder, [0], 0.5, lambda where: print(where[0], flush=True)); time.sleep(60)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True, timeout=40, check=False
    )
    assert done.returncode == 1
    assert done.stdout.startswith("rank 0, innermost call first:\n")
