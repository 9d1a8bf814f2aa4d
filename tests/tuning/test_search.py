"""The search itself, over chips that exist only as functions, and what it makes of a try that fails."""

import json
import logging
import signal
import threading
import time
from pathlib import Path
from typing import Any, Callable, List, Optional

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import lit_glm_here, start_command
from lit_glm import batch_size_search
from lit_glm.batch_size_search import (
    FITS,
    MEMORY,
    OUT_OF_TIME,
    Search,
    Trial,
    _trials_of,
    next_bs,
    ranking,
    rates_by_bs,
)
from lit_glm.config.hydra_main import compose_config, validate_config
from lit_glm.errors import InputError, RunError
from lit_glm.launch.signals import Interrupted
from lit_glm.launch.supervisor import TimeLimitExceeded
from lit_glm.tune import TuneConfig
from runs.processes import free_port, node_env

TINY = ["hardware=cpu", "model=glm_tiny", "data=synthetic", "data.synthetic.num_train=6", "data.synthetic.num_eval=2"]


def fastest_bs(trials: List[Trial]) -> Any:
    return next(iter(ranking(trials)), None)


def run_search(
    capacity: int, most: int, speed: Callable[[int, int], float], repeats: int = 3, again: Optional[int] = None
) -> List[Trial]:
    """Search on a device that holds `capacity` examples, or only `again` in the second trial of a batch size."""
    tries: List[Trial] = []
    while True:
        bs = next_bs(tries, most, repeats)
        if bs is None:
            return tries
        assert 1 <= bs <= most
        assert len(tries) < 200
        holds = capacity if again is None or bs not in {trial.bs for trial in tries} else again
        tries.append(Trial(bs, FITS, speed(bs, len(tries))) if bs <= holds else Trial(bs, MEMORY))


@given(capacity=st.integers(0, 3000), most=st.integers(1, 3000), knee=st.integers(1, 500))
def test_largest_fitting_bs_is_found_to_one_sixteenth(capacity: int, most: int, knee: int) -> None:
    tries = run_search(capacity, most, lambda bs, _: bs / (bs + knee))
    fitting = min(capacity, most)
    if fitting == 0:
        assert not rates_by_bs(tries)
        return
    found = max(rates_by_bs(tries))
    assert found <= fitting <= found + max(1, found // 16)
    assert fastest_bs(tries) == found  # the larger, the faster
    assert len(rates_by_bs(tries)[found]) >= 2


@given(capacity=st.integers(4, 3000), share=st.floats(0.3, 1.0))
def test_batch_size_that_fails_on_repeat_does_not_fit(capacity: int, share: float) -> None:
    again = int(capacity * share)
    tries = run_search(capacity, 10_000, lambda bs, _: bs / (bs + 50), again=again)
    assert fastest_bs(tries) <= again
    assert not set(rates_by_bs(tries)) & {trial.bs for trial in tries if trial.status == MEMORY}


def test_a_size_that_did_not_fit_is_not_tried_between_two_that_fit() -> None:
    """Else it would be proposed again and again, as its trials do not count any more."""
    fitting = [Trial(bs, FITS, float(bs)) for bs in (1, 2, 3, 3)]
    assert next_bs([*fitting[:2], Trial(4, MEMORY), *fitting[2:], Trial(2, MEMORY)], 100, 5) == 1


@given(peak=st.integers(1, 400))
def test_fastest_bs_between_powers_of_two_is_approximated(peak: int) -> None:
    tries = run_search(512, 10_000, lambda bs, _: 1.0 - abs(bs - peak) / 1000)
    found = fastest_bs(tries) or 0
    assert abs(found - peak) <= max(2, peak // 3)


def test_trials_repeat_while_the_rates_overlap() -> None:
    noisy = run_search(2, 10, lambda bs, _: 100.0, repeats=4)
    assert {bs: len(own) for bs, own in rates_by_bs(noisy).items()} == {1: 4, 2: 4}
    clear = run_search(2, 10, lambda bs, number: 100.0 * bs + number % 2, repeats=4)
    assert {bs: len(own) for bs, own in rates_by_bs(clear).items()} == {1: 2, 2: 2}


def tried(monkeypatch: pytest.MonkeyPatch, folder: Path, run: Callable[[Path], Any]) -> Trial:
    """A trial whose run ends as a function decides."""
    monkeypatch.chdir(folder)
    config: Any = validate_config(compose_config("tune", [*TINY, "tune.steps=4"]), TuneConfig)

    def run_job(job: Any, run_dir: Path, *_: Any, **__: Any) -> Any:
        run_dir.mkdir(parents=True)
        return run(run_dir)

    monkeypatch.setattr(batch_size_search, "run_job", run_job)
    (folder / "search").mkdir()
    return Search(config, folder / "search", [])._run_trial(1, 30.0)


@pytest.mark.process
def test_out_of_memory_is_a_trial_result(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fails(reason: str) -> Callable[[Path], Any]:
        def run(folder: Path) -> Any:
            (folder / "result.json").write_text(json.dumps({"status": "failed", "error": reason}))
            raise RunError("rank 0 failed")

        return run

    def takes_long(_: Path) -> Any:
        raise TimeLimitExceeded("")

    for number, (run, status) in enumerate(
        [
            (fails("out of memory in step 1 (bs=4)"), MEMORY),
            (fails("rank 0 was killed by SIGKILL"), MEMORY),
            (takes_long, OUT_OF_TIME),
        ]
    ):
        (tmp_path / str(number)).mkdir()
        assert tried(monkeypatch, tmp_path / str(number), run).status == status
    (tmp_path / "other").mkdir()
    with pytest.raises(RunError, match=r"bs=1: the disk is full \(full output: .*tries/bs1_0.txt\)"):
        tried(monkeypatch, tmp_path / "other", fails("the disk is full"))


def make_search(folder: Path, *overrides: str) -> Search:
    config: Any = validate_config(compose_config("tune", [*TINY, *overrides]), TuneConfig)
    return Search(config, folder, ["tune"])


def test_an_interrupted_search_is_resumed_with_its_trials(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A chip that exists only as a function: one example fits; SIGTERM arrives in the second trial."""
    monkeypatch.chdir(tmp_path)
    tries: List[int] = []

    def run_trial(_self: Search, bs: int, _limit_s: float) -> Trial:
        tries.append(bs)
        if len(tries) == 2:
            raise Interrupted(signal.SIGTERM)
        return Trial(bs, FITS, 3.0) if bs == 1 else Trial(bs, MEMORY)

    monkeypatch.setattr(Search, "_run_trial", run_trial)
    caplog.set_level(logging.INFO, logger="lit_glm")
    folder = tmp_path / "outputs" / "tune" / "day" / "time"
    assert make_search(folder, "run.resume=auto").run() == 128 + signal.SIGTERM
    assert "run.resume=auto: no unfinished search of this configuration; starting a new one" in caplog.text
    assert f"resume with run.resume={folder}" in caplog.text
    assert json.loads((folder / "tune.json").read_text())["complete"] is False
    for resume in (str(folder), "auto"):
        (folder / "tune.json").write_text(
            json.dumps({**json.loads((folder / "tune.json").read_text()), "complete": False})
        )
        caplog.clear()
        assert make_search(tmp_path / "elsewhere", f"run.resume={resume}").run() == 0
        assert "resuming after " in caplog.text
    assert tries[:3] == [1, 2, 2]
    found = json.loads((folder / "tune.json").read_text())
    assert (found["complete"], found["largest_bs"], found["fastest_bs"]) == (True, 1, 1)
    assert not (tmp_path / "elsewhere").exists()


def test_a_search_in_which_nothing_fits_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Search, "_run_trial", lambda _self, bs, _limit_s: Trial(bs, MEMORY))
    assert make_search(tmp_path / "search").run() == 1
    assert "no batch size fits: use a smaller model, activation checkpointing, or more memory" in capfd.readouterr().out
    assert not list((tmp_path / "search").glob("*.yaml"))


def test_a_folder_that_is_no_search_is_rejected(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("dear")
    with pytest.raises(InputError, match="mine: contains files that are not a search"):
        make_search(tmp_path / "mine")
    with pytest.raises(InputError, match=r"run.resume=mine: is not a search folder \(no tune.json\)"):
        make_search(tmp_path / "search", "run.resume=mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


@pytest.mark.slow
def test_search_time_limit_terminates_a_trial(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    config: Any = validate_config(compose_config("tune", [*TINY, "tune.steps=1000000"]), TuneConfig)
    (tmp_path / "search").mkdir()
    search, output = Search(config, tmp_path / "search", []), tmp_path / "search" / "tries" / "bs1_0.txt"

    class TimerFromTrainingStart(threading.Thread):
        """Instead of a timer, whose seconds may be over before a busy machine has started the trial."""

        def __init__(self, _seconds: float, call: Callable[..., None], arguments: Any) -> None:
            super().__init__(daemon=True)
            self._call, self._arguments = call, arguments

        def run(self) -> None:
            while not output.is_file() or "glm_tiny on cpu 1x1" not in output.read_text():
                time.sleep(0.1)
            self._call(*self._arguments)

        def cancel(self) -> None:
            pass

    monkeypatch.setattr(threading, "Timer", TimerFromTrainingStart)
    trial = search._run_trial(1, 12.0)
    assert (trial.status, trial.message) == (OUT_OF_TIME, "exceeded the remaining 12 s")
    assert json.loads((tmp_path / "search" / "tries" / "bs1_0" / "result.json").read_text())["status"] != "running"


@pytest.mark.slow
def test_two_nodes_search_together(tmp_path: Path) -> None:
    port = free_port()
    line = [*TINY, "data.synthetic.num_train=6", "topology.num_nodes=2", "topology.devices_per_node=1", "tune.steps=4"]
    line += ["tune.repeats=1", f"hydra.run.dir={tmp_path}/search"]
    nodes = [start_command("tune", *line, cwd=tmp_path, env=node_env(rank, "127.0.0.1", port)) for rank in (1, 0)]
    ended = [node.communicate(timeout=240) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], ended
    found = json.loads((tmp_path / "search" / "tune.json").read_text())
    assert (found["complete"], found["topology"], found["next"]) == (True, "2x1", None)
    assert [trial["status"] for trial in found["trials"]] == ["fits"] * len(found["trials"])
    assert len(list((tmp_path / "search" / "tries").glob("*.node1.txt"))) == len(found["trials"])


def test_secondary_node_of_a_complete_search_exits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    config: Any = validate_config(compose_config("tune", [*TINY, "run.stall_timeout_s=30"]), TuneConfig)
    (tmp_path / "search").mkdir()
    search = Search(config, tmp_path / "search", [])
    search.trials = [Trial(1, MEMORY)]
    search._write(complete=True)
    begun = time.monotonic()
    assert search.run_follower() == 0
    assert time.monotonic() - begun < 10


def test_secondary_node_of_an_extended_search_waits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Node 0 may not have begun to write when it reads that the search was complete, with fewer repeats."""
    monkeypatch.chdir(tmp_path)
    more = ["run.stall_timeout_s=2", "tune.repeats=2"]
    config: Any = validate_config(compose_config("tune", [*TINY, *more]), TuneConfig)
    (tmp_path / "search").mkdir()
    search = Search(config, tmp_path / "search", [])
    search.trials = [Trial(1, FITS, 2.0), Trial(2, MEMORY)]
    search._write(complete=True)
    with pytest.raises(RunError, match="node 0 started no trial for 2 s"):
        search.run_follower()


def test_trials_of_another_version_are_read() -> None:
    known = {"bs": 4, "status": FITS, "p_core": 10.0}
    entries = [{**known, "of_a_later_version": 1}, {"status": FITS}, {"bs": 8, "status": OUT_OF_TIME}]
    assert _trials_of({"trials": entries}) == [Trial(**known)]


def test_fewer_examples_than_ranks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: Any) -> None:
    monkeypatch.chdir(tmp_path)
    few = ["data.synthetic.num_train=4", "topology=1x8", "hardware.runtime=simulated"]
    assert lit_glm_here("tune", "experiment=debug", *few) == 2
    assert "4 training examples: a step of topology=1x8 needs 8" in capfd.readouterr().err


def test_smaller_batch_size_wins_at_equal_throughput() -> None:
    assert fastest_bs([Trial(4, FITS, 10.0), Trial(8, FITS, 10.0)]) == 4
