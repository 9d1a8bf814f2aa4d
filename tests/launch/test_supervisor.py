"""How a job of several ranks ends; the ranks here are small scripts that import no torch."""

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any, Callable, Iterator, List, Optional, Tuple
from unittest.mock import patch

import psutil
import pytest

from lit_glm.config.hydra_main import compose_config, validate_config
from lit_glm.config.schema import TrainConfig
from lit_glm.errors import InputError, RunError
from lit_glm.launch import supervisor as supervisors
from lit_glm.launch.rendezvous import Node
from lit_glm.launch.signals import SECOND_SIGINT_S, STOP_SIGNALS, Interrupted
from lit_glm.launch.supervisor import Supervisor
from lit_glm.runs.job_spec import JobSpec

RANK = """
import os, pathlib, signal, sys, time
from lit_glm.errors import InputError
from lit_glm.runs.result import write_error_file

folder, rank = pathlib.Path(sys.argv[1]), int(os.environ["RANK"])
def save(number, frame):
    (folder / f"asked-{rank}").touch()
    sys.exit(143)
def slow(number, frame):
    (folder / f"asked-{rank}").touch()

def works(): signal.signal(signal.SIGTERM, save); ready(); time.sleep(60)
def is_deaf(): signal.signal(signal.SIGTERM, slow); ready(); [time.sleep(1) for _ in range(60)]
def finishes(): ready()
def fails():
    ready(); time.sleep(0.3)
    note(RuntimeError("card is broken")); sys.exit(1)
def exits_silently(): ready(); os._exit(7)
def refuses(): ready(); note(InputError("no such file")); sys.exit(2)
def is_killed():
    signal.signal(signal.SIGTERM, signal.SIG_IGN); ready(); time.sleep(0.3); os.kill(os.getpid(), signal.SIGKILL)
def refuses_late():
    while not (folder / "ready-1").exists(): time.sleep(0.02)
    refuses()
def is_killed_when_asked():
    signal.signal(signal.SIGTERM, lambda number, frame: os.kill(os.getpid(), signal.SIGKILL)); ready(); time.sleep(60)
def loses_its_peer():
    ready()
    while not (folder / "ready-1").exists(): time.sleep(0.02)
    note(RuntimeError("Connection closed by peer")); sys.exit(1)
def has_a_child():
    import subprocess
    child = subprocess.Popen(["sleep", "60"]); (folder / "child").write_text(str(child.pid)); fails()
def note(error):
    try:
        raise error
    except Exception as raised:
        write_error_file(folder, rank, raised)
def ready(): (folder / f"ready-{rank}").touch()

globals()[(folder / "fates").read_text().split()[rank]]()
"""


def run(folder: Path, *fates: str, when: Optional[Callable[[Path], Any]] = None, limit_s: float = 60) -> BaseException:
    """How ranks of these fates end; `when` is called in a thread as soon as all are at work."""
    (folder / "fates").write_text(" ".join(fates))
    (folder / "a_rank.py").write_text(RANK)
    overrides = ["experiment=debug", f"topology=1x{len(fates)}", f"run.shutdown_timeout_s={limit_s}"]
    config = validate_config(compose_config("train", overrides), TrainConfig)

    def call() -> None:
        while len(list(folder.glob("ready-*"))) < len(fates):
            if over.wait(0.02):
                return
        if when is not None:
            when(folder)

    over, thread = threading.Event(), threading.Thread(target=call)
    thread.start()
    try:
        with patch.dict(os.environ, PYTHONPATH=str(folder)), Supervisor() as supervisor:
            supervisor.run(JobSpec(config, time.monotonic(), []), Node(0, "127.0.0.1", 1), folder, module="a_rank")
    except BaseException as error:
        return error
    finally:
        over.set()
        thread.join()
        assert not any(process.poll() is None for process in supervisor._ranks.values())
    return SystemExit(0)


@pytest.fixture(autouse=True)
def _clean_environment_and_signals(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No PYTHONPATH of the user's, which would come before the ranks'; a signal that comes late ends no test."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    before = {number: signal.signal(number, lambda *_: None) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: int) -> Callable[[Path], None]:
    return lambda _folder: os.kill(os.getpid(), number)


def test_ranks_that_finish_are_a_success(tmp_path: Path) -> None:
    assert isinstance(run(tmp_path, "finishes", "finishes"), SystemExit)


def test_without_a_signal_the_earliest_failure_decides(tmp_path: Path) -> None:
    """The other rank is at work, and ends with a status of its own because it was asked to."""
    error = run(tmp_path, "works", "fails")
    assert isinstance(error, RunError)
    assert error.summary == "rank 1: RuntimeError: card is broken"
    assert (tmp_path / "asked-0").exists()


def test_invalid_input_of_a_rank_raises_input_error(tmp_path: Path) -> None:
    error = run(tmp_path, "refuses", "works")
    assert isinstance(error, InputError)
    assert str(error) == "no such file"


def test_rank_that_exits_without_a_reason_is_named(tmp_path: Path) -> None:
    error = run(tmp_path, "works", "exits_silently")
    assert isinstance(error, RunError)
    assert error.summary == "rank 1 exited with status 7 and gave no reason"


def test_a_killed_rank_is_the_cause_of_its_peers_errors(tmp_path: Path) -> None:
    error = run(tmp_path, "loses_its_peer", "is_killed")
    assert isinstance(error, RunError)
    assert error.summary == "rank 1 was killed by SIGKILL"


def test_a_rank_that_is_killed_while_it_stops_is_not_the_cause(tmp_path: Path) -> None:
    assert isinstance(run(tmp_path, "refuses_late", "is_killed_when_asked"), InputError)


@pytest.mark.process
def test_a_rank_that_is_killed_after_a_signal_is_not_the_cause(tmp_path: Path) -> None:
    error = run(tmp_path, "works", "is_killed_when_asked", when=send(signal.SIGHUP))
    assert isinstance(error, Interrupted)
    assert error.exit_status == 128 + signal.SIGHUP


@pytest.mark.process
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_lets_ranks_save(number: int, tmp_path: Path) -> None:
    error = run(tmp_path, "works", "works", when=send(number))
    assert isinstance(error, Interrupted)
    assert error.exit_status == 128 + number
    assert (tmp_path / "asked-0").exists()
    assert (tmp_path / "asked-1").exists()


@pytest.mark.process
def test_signal_after_the_last_step_is_not_an_error(tmp_path: Path) -> None:
    def when(_folder: Path) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    for _ in range(3):
        folder = tmp_path / str(_)
        folder.mkdir()
        ended = run(folder, "finishes", "finishes", when=when)
        assert isinstance(ended, (SystemExit, Interrupted))
    # Which of both it is depends on who came first; it is never a failure.


def test_ranks_that_do_not_stop_in_time_are_killed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    error = run(tmp_path, "is_deaf", "works", when=send(signal.SIGTERM), limit_s=1)
    assert isinstance(error, Interrupted)
    assert "rank 0 had not stopped 1 s after SIGTERM (run.shutdown_timeout_s)" in capfd.readouterr().err


def test_a_second_ctrl_c_kills_at_once(tmp_path: Path) -> None:
    def interrupt_twice(folder: Path) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        while not (folder / "asked-0").exists():
            time.sleep(0.02)
        time.sleep(SECOND_SIGINT_S + 0.1)
        os.kill(os.getpid(), signal.SIGINT)

    error = run(tmp_path, "is_deaf", "is_deaf", when=interrupt_twice)
    assert isinstance(error, Interrupted)  # long before run.shutdown_timeout_s
    assert error.exit_status == 130


def test_hanging_ranks_are_terminated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stalls:
        def __init__(self, *_: Any) -> None:
            pass

        def stalled_ranks(self) -> List[str]:
            return ["rank 0 is stopped"]

    monkeypatch.setattr(supervisors, "StallWatchdog", Stalls)
    error = run(tmp_path, "works", "works")
    assert isinstance(error, RunError)
    assert "no progress for" in str(error)
    assert "rank 0 is stopped" in str(error)


def test_child_processes_are_terminated_with_their_rank(tmp_path: Path) -> None:
    run(tmp_path, "has_a_child")
    pid, limit = int((tmp_path / "child").read_text()), time.monotonic() + 30
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:  # nobody reaps it here
        assert time.monotonic() < limit
        time.sleep(0.05)


def test_previous_signal_handler_is_called_after_the_ranks_stop(tmp_path: Path) -> None:
    """Submitit's puts a job back into the queue."""
    called: List[Tuple[int, bool]] = []
    before = signal.signal(signal.SIGUSR2, lambda number, _: called.append((number, (tmp_path / "asked-0").exists())))
    try:
        run(tmp_path, "works", when=send(signal.SIGUSR2))
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert called == [(signal.SIGUSR2, True)]
