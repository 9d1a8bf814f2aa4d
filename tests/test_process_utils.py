"""What processes do to others and to themselves: they end with the one that started them; what they import at first."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import List

import pytest

from lit_glm.config.hydra_main import compose_config, validate_config
from lit_glm.config.schema import TrainConfig
from lit_glm.process_utils import fast_imports, set_parent_death_signal

LATE = """
import multiprocessing, os, sys, time
from lit_glm.process_utils import set_parent_death_signal

def late_worker(parent, file):
    while os.getppid() == parent:
        time.sleep(0.01)
    set_parent_death_signal()
    open(file, "w").close()

multiprocessing.get_context("fork").Process(target=late_worker, args=(os.getpid(), sys.argv[1])).start()
os.kill(os.getpid(), 9)
"""


def test_worker_exits_if_its_rank_is_killed_during_startup(tmp_path: Path) -> None:
    """Torch's own watch of the parent begins later: it takes whoever adopted the worker for its parent."""
    file = tmp_path / "outlived"
    ended = subprocess.run([sys.executable, "-c", LATE, str(file)], stdout=subprocess.PIPE, timeout=120, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert not file.exists()  # the output closes when the worker has ended


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_parent_death_signal_is_sent_if_the_parent_has_changed(number: int) -> None:
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        set_parent_death_signal(number, parent=1)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == number


@pytest.mark.parametrize(
    ("overrides", "postponed"),
    [
        ([], True),
        (["hardware=r300", "hardware.runtime=simulated", "model.activation_checkpointing=false"], True),
        (["hardware=r300", "model.activation_checkpointing=false"], False),
        (["hardware=cuda"], False),
        (["model.compile=true"], False),
        (["model.activation_checkpointing=true"], False),
    ],
)
def test_the_compiler_is_postponed_where_nothing_needs_it(
    overrides: List[str], postponed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: List[bool] = []
    monkeypatch.setattr("lit_glm.process_utils.postpone_compiler", lambda: calls.append(True))
    with fast_imports(validate_config(compose_config("train", overrides), TrainConfig)):
        pass
    assert bool(calls) == postponed
