"""Signs of life by the age of a file."""

import os
import subprocess
import sys
import time
from pathlib import Path

from lit_glm.jobs.heartbeat import FILE, Heartbeat, silent_for


def test_silence_is_counted_from_the_last_sign_or_from_the_start(tmp_path: Path) -> None:
    now = time.time()
    assert 99 < silent_for(tmp_path, now - 100) < 102
    beat = Heartbeat(tmp_path)
    beat()
    assert silent_for(tmp_path, now - 100) < 2
    os.utime(tmp_path / FILE, (now - 50, now - 50))
    beat()  # not again within a second: a step may be much shorter
    assert 49 < silent_for(tmp_path, now - 100) < 53
    assert silent_for(tmp_path, now) < 2  # what another run has left does not count


def test_a_process_whose_work_hangs_ends(tmp_path: Path) -> None:
    code = (
        "import sys, time, pathlib; from lit_glm.jobs.heartbeat import watch_this_process as watch\n"
        "watch(pathlib.Path(sys.argv[1]), 0.5, lambda: print('stalled', flush=True)); time.sleep(60)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True, timeout=40, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (1, "stalled")
