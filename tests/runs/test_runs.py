"""Real processes: what a run leaves, however it ends, and that it goes on as if it had never been stopped."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, List

import psutil
import pytest
import torch

from conftest import FINISHED, FINISHED_STEPS, GOLDEN_RUN, Process, command, lit_glm, lit_glm_here, rows, start_command

FILES = (
    "result.json",
    "steps.csv",
    "evals.csv",
    "perf.log",
    "environment.json",
    ".hydra/config.yaml",
    ".hydra/overrides.yaml",
)
STEPS, DEBUG = FINISHED_STEPS, FINISHED


def result(run: Path) -> Dict[str, Any]:
    content: Dict[str, Any] = json.loads((run / "result.json").read_text())
    return content


def columns(path: Path, *names: str) -> List[List[str]]:
    return [[row[name] for name in names] for row in rows(path)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module", params=["1x1", pytest.param("1x2", marks=pytest.mark.slow)])
def whole(request: Any, finished_run: Any) -> Any:
    """A run that was never stopped."""
    return (request.param, *finished_run(request.param))


def test_run_folder_files_and_results(whole: Any) -> None:
    topology, run, done = whole
    assert all((run / name).is_file() for name in FILES)
    final = result(run)
    assert (final["status"], final["global_steps"], final["topology"]) == ("finished", STEPS, topology)
    ranks = int(topology[-1])
    assert final["num_trained_samples"] == STEPS * 4 * ranks
    steps = rows(run / "steps.csv")
    assert [int(row["step"]) for row in steps] == list(range(1, STEPS + 1))
    assert final["p_core"] >= final["p_train"] >= final["p_whole"] > 0
    assert final["step_s"]["count"] == STEPS - 3
    assert 0 < final["step_s"]["p50"] <= final["step_s"]["p90"] <= final["step_s"]["p99"]
    assert final["first_steps"]["count"] == 3
    # Of several ranks the slowest counts in each phase, so their sum may pass the whole by a little.
    assert final["e2e_time"] * (1 if ranks == 1 else 1.05) >= final["init_time"] + final["raw_train_time"] > 0
    if ranks == 1:
        assert final["no_eval_time"] == pytest.approx(sum(float(row["step_s"]) for row in steps), rel=1e-3)
        assert final["pure_compute_time"] == pytest.approx(sum(float(row["compute_s"]) for row in steps), rel=1e-3)
    evaluated = [int(row["step"]) for row in rows(run / "evals.csv")]
    every = -(-40 // (4 * ranks))
    assert evaluated == sorted({0, STEPS, *range(every, STEPS + 1, every)})
    assert final["acc"] == float(rows(run / "evals.csv")[-1]["acc"])
    assert final["mem_actual_gib"] < final["mem_total_gib"]
    in_use = [float(row["gib"]) for row in rows(run / "memory.csv")]
    assert 0.01 < min(in_use) <= max(in_use) <= final["mem_actual_gib"] + 0.01
    assert final["mfu"] is None  # no peak is known of a processor
    row = done.stdout.strip().splitlines()[-1]
    assert f"cpu {topology}" in row
    assert "scoring=shared_context" in done.stdout


def test_perf_log_events_match_flagperf(whole: Any) -> None:
    _, run, _ = whole
    lines = (run / "perf.log").read_text().splitlines()
    assert all(line.startswith("[PerfLog] {") for line in lines)
    events = [json.loads(line.split(" ", 1)[1]) for line in lines]
    names = [event["event"] for event in events]
    assert names[:6] == ["SUBMIT_INFO", "INIT_START", "INIT_EVALUATION", "INIT_END", "TRAIN_START", "EPOCH_BEGIN"]
    assert names[-3:] == ["EPOCH_END", "TRAIN_END", "FINISHED"]
    assert names.count("STEP_END") == names.count("STEP_BEGIN") == STEPS
    assert {"file", "lineno", "time_ms", "rank"} <= set(events[0]["metadata"])
    assert events[-1]["value"]["global_steps"] == STEPS


def _wait_for_steps(run: Path, process: Process, steps: int) -> None:
    limit = time.monotonic() + 120
    while time.monotonic() < limit and process.poll() is None:
        if (run / "steps.csv").is_file() and (run / "steps.csv").read_bytes().count(b"\n") > steps:
            return
        time.sleep(0.02)
    raise AssertionError(f"the run did not reach step {steps}: {process.communicate()}")


def _start(folder: Path, run: Path, topology: str, *more: str, cold: bool = False) -> Process:
    return start_command("train", *DEBUG, f"topology={topology}", f"hydra.run.dir={run}", *more, cwd=folder, cold=cold)


def _assert_same_results(run: Path, whole: Path, folder: Path) -> None:
    names = ("step", "epoch", "samples", "loss", "lr", "grad_norm")
    assert columns(run / "steps.csv", *names) == columns(whole / "steps.csv", *names)
    assert columns(run / "evals.csv", "step", "samples", "acc") == columns(
        whole / "evals.csv", "step", "samples", "acc"
    )
    skipped = [json.loads((path / "result.json").read_text())["skipped_steps"] for path in (run, whole)]
    assert skipped[0] == skipped[1]
    weights = []
    for path in (run, whole):
        assert lit_glm_here("export", str(path), "--to", "published", "--out", str(folder / "w.pt")) == 0
        weights.append(torch.load(str(folder / "w.pt"))["module"])
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


STOPS = [  # signal, exit status, status in result.json, steps that have been done by then
    (signal.SIGINT, 130, "interrupted", (9, 13)),
    (signal.SIGTERM, 143, "interrupted", (21, 25)),
    (signal.SIGKILL, -9, "running", (33, 37)),
]


def test_resumed_run_equals_uninterrupted_run(whole: Any, folder: Path) -> None:
    """Stops in a row; after the last, which is a kill, the newest checkpoint is torn too."""
    topology, unbroken, _ = whole
    run, spent, told = folder / f"stopped_{topology}", 0.0, ""
    more: List[str] = []
    for number, exit_status, status, between in STOPS[topology != "1x1" :]:  # SIGINT to several ranks: test_endings
        process = _start(folder, run, topology, *more)
        _wait_for_steps(run, process, random.Random(number).randint(*between))
        process.send_signal(number)
        output = process.communicate(timeout=90)
        assert process.returncode == exit_status, output
        if number != signal.SIGKILL:  # ranks that lose their agent may say so
            assert "Traceback" not in output[1], output[1]
        assert told in output[0]
        stopped = result(run)
        # A parent that is killed takes its agent with it, and the ranks of an agent may still stop in order.
        in_order = number == signal.SIGKILL and topology == "1x2"
        assert stopped["status"] in ({status, "interrupted"} if in_order else {status})
        assert stopped["global_steps"] > 0
        assert stopped["e2e_time"] > spent
        _assert_no_process_left(run)
        more = ["run.resume=auto"]
        told, spent = "resuming after step", stopped["e2e_time"]
    newest = sorted((run / "checkpoints").glob("*.ckpt"))[-1]
    newest.write_bytes(newest.read_bytes()[:-1000])
    (run / "checkpoints" / "step-00000999.ckpt").write_bytes(b"foreign")
    more = [f"run.resume={run}", f"hydra.run.dir={folder / 'other'}"]
    done = lit_glm("train", *DEBUG, f"topology={topology}", *more, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "resuming after step" in done.stdout
    assert "step-00000999.ckpt: skipped" in done.stderr
    assert f"{newest.name}: skipped" in done.stderr
    assert not (folder / "other").exists()
    final = result(run)
    assert (final["status"], final["interruptions"]) == ("finished", len(STOPS[topology != "1x1" :]))
    assert final["e2e_time"] > spent
    _assert_same_results(run, unbroken, folder)


def _belongs_to_run(process: psutil.Process, run: Path) -> bool:
    """Whether a process is a run's: by its command line, or (what the fork server has started) by its folder."""
    named = str(run) in " ".join(process.info["cmdline"] or [])  # type: ignore[attr-defined]
    there = process.info["cwd"] == str(run.parent) and process.pid != os.getpid()  # type: ignore[attr-defined]
    return named or there


def _assert_no_process_left(run: Path) -> None:
    limit = time.monotonic() + 20
    left: List[Any] = []
    while time.monotonic() < limit:
        left = [p for p in psutil.process_iter(["cmdline", "cwd"]) if _belongs_to_run(p, run)]
        if not left:
            return
        time.sleep(0.2)
    raise AssertionError(f"still running: {left}")


def test_resume_with_another_configuration_is_rejected(whole: Any, folder: Path, capfd: Any) -> None:
    topology, run, _ = whole
    before = (run / "steps.csv").read_bytes(), (run / "job.json").read_bytes()
    status = lit_glm_here("train", *DEBUG, f"topology={topology}", f"run.resume={run}", "lr=5e-4", "bs=2")
    said = capfd.readouterr().err
    assert status == 2
    assert "lr: 0.001 there, 0.0005 here" in said
    assert "bs: 4 there, 2 here" in said
    assert before == ((run / "steps.csv").read_bytes(), (run / "job.json").read_bytes())


def test_a_complete_run_is_not_run_again(whole: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    topology, run, _ = whole
    before = (run / "result.json").read_bytes()
    monkeypatch.chdir(folder)
    assert lit_glm_here("train", *DEBUG, f"topology={topology}", f"run.resume={run}") == 0
    assert (run / "result.json").read_bytes() == before


def test_reaching_the_target_ends_the_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    run = folder / "target"
    assert lit_glm_here("train", *DEBUG, "run.target_accuracy=0.05", f"hydra.run.dir={run}") == 0
    final = result(run)
    assert (final["status"], final["converged"], final["global_steps"]) == ("success", True, 1)
    # Reached before training; the weights that training leaves are evaluated too.
    assert [row["step"] for row in rows(run / "evals.csv")] == ["0", "1"]
    assert final["acc"] == pytest.approx(float(rows(run / "evals.csv")[1]["acc"]), abs=1e-9)


def test_a_stop_in_the_first_evaluation_loses_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    short = ["experiment=debug", "run.max_steps=4", "hydra.run.dir=early"]
    with monkeypatch.context() as patch:
        patch.setattr(
            "lit_glm.metrics.benchmark_callback.evaluate", lambda *arguments: (None, [])
        )  # as when a signal has come
        assert lit_glm_here("train", *short) == 143
    assert (result(folder / "early")["status"], result(folder / "early")["global_steps"]) == ("interrupted", 0)
    assert lit_glm_here("train", *short, "run.resume=early") == 0
    assert result(folder / "early")["status"] == "finished"
    assert [row["step"] for row in rows(folder / "early" / "evals.csv")][0] == "0"
    assert [row["step"] for row in rows(folder / "early" / "steps.csv")] == ["1", "2", "3", "4"]


def test_checkpoint_write_error_is_reported_without_traceback(folder: Path) -> None:
    """The kernel refuses more than 400 KiB a file: said in one line, and what was measured stays."""
    run = folder / "refused"
    more = [*GOLDEN_RUN, "run.checkpoint_interval_steps=3", f"hydra.run.dir={run}"]
    limited = ["bash", "-c", 'ulimit -f 400; exec "$@"', "limited", *command("train", *more)]
    done = subprocess.run(limited, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1
    assert "step-00000003.ckpt: the checkpoint cannot be written ([Errno 27] File too large)" in done.stderr
    assert "Traceback" not in done.stderr
    assert [row["step"] for row in rows(run / "steps.csv")] == ["1", "2", "3"]
    assert result(run)["status"] == "failed"
    assert not list((run / "checkpoints").iterdir())


def test_a_run_is_evaluated_into_its_folder(whole: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, run, _ = whole
    own = folder / f"copy of {run.name}"
    shutil.copytree(run, own)
    monkeypatch.chdir(folder)
    assert lit_glm_here("evaluate", str(own)) == 0
    assert json.loads((own / "evaluation" / "evaluation.json").read_text())["num_examples"] == 16
    assert lit_glm_here("evaluate", str(own)) == 0  # again, over its own files


def test_evaluate_writes_predictions_with_scores_and_answers(
    whole: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, run, _ = whole
    monkeypatch.chdir(folder)
    assert lit_glm_here("export", str(run), "--to", "safetensors", "--out", str(folder / "w.safetensors")) == 0
    out = folder / "scored"
    checkpoint = f"model.init_checkpoint={folder / 'w.safetensors'}"
    assert lit_glm_here("evaluate", "experiment=debug", checkpoint, f"hydra.run.dir={out}", "eval_bs=3") == 0
    report = json.loads((out / "evaluation.json").read_text())
    assert report["acc"] == pytest.approx(result(run)["acc"])
    assert report["em"] == pytest.approx(report["acc"])
    assert report["em"] <= report["f1"] <= 1
    assert report["truncated_candidates"] == 0
    predictions = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert len(predictions) == 16
    first = predictions[0]
    assert set(first) == {"idx", "label", "query", "answers", "prediction", "score", "rank", "scores"}
    assert "@placeholder" in first["query"]
    for one in predictions:
        scores = {entry["candidate"]: entry["score"] for entry in one["scores"]}
        assert one["label"] == one["prediction"]
        assert one["score"] == scores[one["label"]] == max(scores.values())
        assert (one["rank"] == 1) == (one["label"] in one["answers"])
    assert sum(one["rank"] == 1 for one in predictions) / 16 == pytest.approx(report["acc"])


@pytest.mark.parametrize(
    "arguments", [["train", "--help"], ["train", "--cfg", "job"], ["prepare", "--help"], ["export", "--help"]]
)
def test_help_and_cfg_do_not_import_torch(arguments: List[str], tmp_path: Path) -> None:
    code = (
        "import sys, runpy; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_module('lit_glm.__main__', run_name='__main__')\n"
        "finally: print('torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "lit-glm", *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip().endswith("False")
    assert os.listdir(tmp_path) == []


def test_unknown_command(tmp_path: Path) -> None:
    module = [sys.executable, "-m", "lit_glm", "trian"]
    done = subprocess.run(module, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, "trian: unknown command" in done.stderr) == (2, True)
