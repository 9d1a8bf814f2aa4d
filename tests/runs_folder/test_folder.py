"""A folder is taken, refused or overwritten; nothing of the user's in it is touched."""

import errno
import json
import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List

import pytest
import pytorch_lightning as pl

from conftest import EVAL_FILE, GOLDEN_RUN, TRAIN_FILE, lit_glm_here, rows, tree_digest
from lit_glm.config.hydra_main import compose_config, validate_config
from lit_glm.config.schema import TrainConfig
from lit_glm.errors import InputError
from lit_glm.launch import rank_runner
from lit_glm.launch.signals import Interrupted
from lit_glm.runs import run_folder
from lit_glm.runs.discovery import default_search_paths, find_run_dirs, reusable_runs, runs_by_config_hash
from lit_glm.runs.job_spec import JobSpec
from lit_glm.runs.run_folder import ensure_available, lock_directory

DEBUG = ["experiment=debug", "run.max_steps=2", "logger={}"]
SYNTHETIC = ["data=synthetic", "data.synthetic.num_train=8", "data.synthetic.num_eval=4"]


def result(run: Path) -> Any:
    return json.loads((run / "result.json").read_text())


@pytest.fixture(autouse=True)
def _chdir_to_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("SLURM_RESTART_COUNT", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", ["checkpoints/mine.pt", "wandb/mine", "steps.csv", ".hydra/config.yaml"])
@pytest.mark.parametrize("more", [[], ["run.overwrite=true"]])
def test_folder_with_user_files_is_rejected(name: str, more: List[str], tmp_path: Path, capfd: Any) -> None:
    mine = tmp_path / "mine" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("dear")
    assert lit_glm_here("train", *DEBUG, "hydra.run.dir=mine", *more) == 2
    said = capfd.readouterr().err
    assert f"(no job.json) but contains {name.split('/')[0]}" in said
    assert mine.read_text() == "dear"
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == [name.split("/")[0]]


def test_other_files_stay(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("dear")
    assert lit_glm_here("train", *DEBUG, "hydra.run.dir=mine") == 0
    assert lit_glm_here("train", *DEBUG, "hydra.run.dir=mine", "run.overwrite=true") == 0
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "dear"


def test_folder_with_a_run_is_rejected_or_overwritten(tmp_path: Path, capfd: Any) -> None:
    assert lit_glm_here("train", *DEBUG, "hydra.run.dir=run") == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert lit_glm_here("train", *DEBUG, "seed=7", "hydra.run.dir=run") == 2
    said = capfd.readouterr().err
    assert "run.resume=" in said
    assert "run.overwrite=true" in said
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    assert lit_glm_here("train", *DEBUG, "seed=7", "hydra.run.dir=run", "run.overwrite=true") == 0
    assert result(tmp_path / "run")["seed"] == 7
    assert "seed: 7" in (tmp_path / "run" / ".hydra" / "config.yaml").read_text()


def test_folder_of_a_rejected_run_can_be_used_again(tmp_path: Path) -> None:
    wrong = "+callbacks.x._target_=nowhere.Callback"
    assert lit_glm_here("train", *DEBUG, wrong, "hydra.run.dir=run") == 2
    assert result(tmp_path / "run")["status"] == "failed"
    assert lit_glm_here("train", *DEBUG, "seed=7", "hydra.run.dir=run") == 0
    assert (result(tmp_path / "run")["status"], result(tmp_path / "run")["seed"]) == ("finished", 7)


def test_an_overwritten_run_comes_back_if_the_new_input_is_rejected(tmp_path: Path, capfd: Any) -> None:
    arguments = [*DEBUG, "run.checkpoint_interval_steps=1", "hydra.run.dir=run", "logger=csv"]
    assert lit_glm_here("train", *arguments) == 0
    (tmp_path / "run" / "notes.txt").write_text("mine")
    before = {name: digest for name, digest in tree_digest(tmp_path / "run").items() if not name.startswith((".lock",))}
    for wrong in (
        "model.init_checkpoint=typo.pt",
        "model.init_checkpoint=run",
        "+callbacks.x._target_=nowhere.Callback",
    ):
        assert lit_glm_here("train", *arguments, "run.overwrite=true", wrong) == 2
        after = tree_digest(tmp_path / "run")
        assert {name: after.get(name) for name in before} == before
        assert not [name for name in after if ".previous-" in name]
    assert "model.init_checkpoint=run: is the run that this one would replace" in capfd.readouterr().err
    assert lit_glm_here("train", *arguments, "run.overwrite=true", "seed=7") == 0
    assert result(tmp_path / "run")["seed"] == 7
    assert not [name for name in tree_digest(tmp_path / "run") if ".previous-" in name]


STOPS = """
from pytorch_lightning import Callback

class Stops(Callback):
    def on_train_batch_end(self, trainer, module, *rest):
        trainer.should_stop = module.steps_done == 3
"""


def test_a_run_that_a_callback_stops_is_evaluated_and_saved(
    tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_stops.py").write_text(STOPS)
    monkeypatch.syspath_prepend(str(tmp_path))
    mine = ["+callbacks.mine._target_=my_stops.Stops", "run.max_steps=9", "run.checkpoint_interval_steps=1000"]
    assert lit_glm_here("train", *DEBUG, *mine, "run.eval_interval_samples=100000", "hydra.run.dir=run") == 0
    final = result(tmp_path / "run")
    assert (final["status"], final["global_steps"], final["acc"] is None) == ("finished", 3, False)
    assert [row["step"] for row in rows(tmp_path / "run" / "evals.csv")] == ["0", "3"]
    assert (tmp_path / "run" / "checkpoints" / "step-00000003.ckpt").is_file()
    for name, arguments, instead in (
        ("EarlyStopping", ["+callbacks.x.monitor=val/acc"], "run.target_accuracy ends a run"),
        ("EMAWeightAveraging", [], "the training step here is the published one"),
    ):
        if hasattr(pl.callbacks, name):
            target = [f"+callbacks.x._target_=pytorch_lightning.callbacks.{name}", "hydra.run.dir=refused"]
            assert lit_glm_here("train", *DEBUG, *target, *arguments, "run.overwrite=true") == 2
            assert f"{instead}\n" in capfd.readouterr().err
    saves = "+callbacks.saves._target_=pytorch_lightning.callbacks.ModelCheckpoint"
    assert lit_glm_here("train", *DEBUG, saves, "hydra.run.dir=other") == 2
    said = capfd.readouterr().err
    assert "callbacks: refused by Lightning: " in said
    assert "Traceback" not in said


def test_a_run_on_other_data_or_weights_is_not_reused(tmp_path: Path, capfd: Any) -> None:
    train, weights = tmp_path / "train.hdf5", tmp_path / "weights.pt"
    shutil.copy(TRAIN_FILE, train)
    weights.write_bytes(b"")
    overrides = [*GOLDEN_RUN, f"data.train_file={train}", "run.max_steps=1"]
    assert lit_glm_here("train", *overrides, "hydra.run.dir=run") == 0
    config = validate_config(compose_config("train", overrides), TrainConfig)
    run, later = tmp_path / "run", time.time() + 60.0
    assert reusable_runs([run], config) == [run]
    os.utime(train, (later, later))
    assert reusable_runs([run], config) == [run]  # newer, with the same content
    config.model.init_checkpoint = str(weights)
    assert reusable_runs([run], config) == [run]
    os.utime(weights, (later, later))
    assert reusable_runs([run], config) == []
    assert f"is not reused: model.init_checkpoint={weights} has changed since it started" in capfd.readouterr().out
    config.model.init_checkpoint = None
    shutil.copy(EVAL_FILE, train)
    os.utime(train, (later, later))
    assert reusable_runs([run], config) == []


@pytest.mark.slow
def test_resume_auto_ignores_runs_outside_the_given_folder(tmp_path: Path) -> None:
    """It may be somebody else's."""
    assert lit_glm_here("train", *DEBUG, "run.checkpoint_interval_steps=1", "hydra.run.dir=scratch/alice/run1") == 0
    alice = tmp_path / "scratch" / "alice" / "run1"
    (alice / "result.json").write_text(json.dumps({**result(alice), "status": "running"}))
    before = tree_digest(alice)
    for more in (["hydra.run.dir=scratch/bob/run1"], ["hydra.run.dir=scratch/alice/run2"], []):
        assert lit_glm_here("train", *DEBUG, "run.checkpoint_interval_steps=1", "run.resume=auto", *more) == 0
    assert tree_digest(alice) == before
    assert result(tmp_path / "scratch" / "bob" / "run1")["interruptions"] == 0


def test_overwrite_keeps_user_files_and_follows_symlinks(tmp_path: Path) -> None:
    """A checkpoint of the run that was thrown away would outrank those of the new one."""
    run, scratch = tmp_path / "run", tmp_path / "scratch"
    arguments = [*DEBUG, "run.checkpoint_interval_steps=1", f"hydra.run.dir={run}"]
    assert lit_glm_here("train", *arguments) == 0
    (run / "checkpoints").rename(scratch)
    (run / "checkpoints").symlink_to(scratch)
    (scratch / "step-00000999.ckpt").write_bytes(b"of the old run")
    for mine in (scratch / "mine.safetensors", run / "csv" / "notes.csv"):
        mine.write_text("mine")
    assert lit_glm_here("train", *arguments, "run.overwrite=true") == 0
    assert (run / "checkpoints").is_symlink()
    assert not (scratch / "step-00000999.ckpt").exists()
    assert list(scratch.glob("step-*.ckpt"))
    assert (scratch / "mine.safetensors").read_text() == (run / "csv" / "notes.csv").read_text() == "mine"


def test_damaged_checkpoint_is_skipped_on_resume(tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    arguments = [*DEBUG, "run.checkpoint_interval_steps=1"]
    assert lit_glm_here("train", *arguments, f"hydra.run.dir={run}") == 0
    *_, before, newest = sorted((run / "checkpoints").glob("step-*.ckpt"))
    content = bytearray(newest.read_bytes())
    middle = int(0.35 * len(content))
    content[middle : middle + 2048] = bytes(255 - value for value in content[middle : middle + 2048])
    newest.write_bytes(bytes(content))
    (run / "result.json").write_text(json.dumps({**result(run), "status": "interrupted"}))
    assert lit_glm_here("evaluate", str(newest), "hydra.run.dir=scored") == 2
    assert "is damaged" in capfd.readouterr().err
    assert lit_glm_here("export", str(run), "--to", "published", "--out", "weights.pt") == 0
    assert f"{newest}: skipped (it is damaged: " in capfd.readouterr().err
    assert lit_glm_here("export", str(run), "--to", "published", "--out", "w.safetensors") == 2
    assert "write --to safetensors" in capfd.readouterr().err
    with monkeypatch.context() as disk:
        disk.setattr("lit_glm.export.shutil.disk_usage", lambda _: SimpleNamespace(free=0, total=2**40))
        disk.setattr("torch.save", lambda *_: exec("raise RuntimeError('unexpected pos 64 vs 0')"))
        assert lit_glm_here("export", str(run), "--to", "published", "--out", "full.pt") == 1
    assert "MiB are free on this disk" in capfd.readouterr().err
    assert not list(tmp_path.glob("*full.pt*"))
    assert lit_glm_here("train", *arguments, f"run.resume={run}") == 0
    said = capfd.readouterr()
    assert f"{newest}: skipped (it is damaged: " in said.err
    assert f"resuming after step {int(before.stem[5:])}" in said.out


@pytest.mark.slow
def test_slurm_restart_resumes_the_run_of_the_same_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    assert lit_glm_here("train", *DEBUG, "run.checkpoint_interval_steps=1", "hydra.run.dir=outputs/a/first") == 0
    first = tmp_path / "outputs" / "a" / "first"
    (first / "result.json").write_text(json.dumps({**result(first), "status": "running"}))
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert lit_glm_here("train", *DEBUG, "run.checkpoint_interval_steps=1") == 0
    assert (result(first)["status"], result(first)["interruptions"]) == ("finished", 1)
    monkeypatch.setenv("SLURM_JOB_ID", "78")  # another job's run is none of this one's
    assert lit_glm_here("train", *DEBUG, "run.checkpoint_interval_steps=1", "hydra.run.dir=outputs/a/second") == 0
    assert result(tmp_path / "outputs" / "a" / "second")["interruptions"] == 0


@pytest.mark.parametrize(("content", "said"), [("{torn", "damaged"), ('{"config": {"bss": 4}}', "written by lit_glm")])
def test_unreadable_job_json_is_rejected(content: str, said: str, tmp_path: Path, capfd: Any) -> None:
    (tmp_path / "old=run").mkdir()
    (tmp_path / "old=run" / "job.json").write_text(content)
    assert lit_glm_here("train", *DEBUG, "run.resume='old=run'") == 2
    output = capfd.readouterr().err
    assert said in output
    assert "Traceback" not in output


def test_run_in_a_folder_with_an_equals_sign_is_resumed(tmp_path: Path) -> None:
    run = tmp_path / "lr=1" / "a=b"
    assert lit_glm_here("train", *DEBUG, f"hydra.run.dir='{run}'") == 0
    (run / "result.json").write_text(json.dumps({**result(run), "status": "running"}))
    assert lit_glm_here("train", *DEBUG, f"run.resume='{run}'") == 0
    assert result(run)["status"] == "finished"


def test_synthetic_data_does_not_overwrite_other_data(tmp_path: Path, capfd: Any) -> None:
    mine = tmp_path / "data" / "raw"
    mine.mkdir(parents=True)
    (mine / "train.jsonl").write_text("dear")
    assert lit_glm_here("train", *DEBUG, "data.out_dir=data") == 2
    assert "data.out_dir=data: contains raw, which was not generated" in capfd.readouterr().err
    assert (mine / "train.jsonl").read_text() == "dear"
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "notes.txt").write_text("dear")
    assert lit_glm_here("train", *DEBUG, "data.out_dir=more", "hydra.run.dir=a") == 0
    assert lit_glm_here("train", *DEBUG, "data.out_dir=more", "data.synthetic.seed=1", "hydra.run.dir=b") == 0
    assert (tmp_path / "more" / "notes.txt").read_text() == "dear"


def test_user_files_between_synthetic_data_files_are_kept(tmp_path: Path, capfd: Any) -> None:
    (tmp_path / "mine" / "raw").mkdir(parents=True)
    (tmp_path / "mine" / "raw" / "corpus.jsonl").write_text("dear")
    (tmp_path / "mine" / "generated.json").write_text('{"model": "gpt"}')
    assert lit_glm_here("prepare", *SYNTHETIC, "data.out_dir=mine") == 2
    assert "contains generated.json, raw, which was not generated" in capfd.readouterr().err
    assert (tmp_path / "mine" / "raw" / "corpus.jsonl").read_text() == "dear"
    assert lit_glm_here("prepare", *SYNTHETIC, "data.out_dir=ours") == 0
    (tmp_path / "ours" / "raw" / "notes.txt").write_text("dear")
    assert lit_glm_here("prepare", *SYNTHETIC, "data.out_dir=ours", "data.synthetic.seed=1") == 0
    assert (tmp_path / "ours" / "raw" / "notes.txt").read_text() == "dear"


def test_incomplete_synthetic_data_is_regenerated(tmp_path: Path) -> None:
    assert lit_glm_here("prepare", *SYNTHETIC, "data.out_dir=data") == 0
    before = tree_digest(tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "eval_hdf5")
    assert lit_glm_here("prepare", *SYNTHETIC, "data.out_dir=data") == 0
    assert set(tree_digest(tmp_path / "data")) == set(before)


def test_too_large_global_batch_is_rejected_and_partial_batch_is_counted(tmp_path: Path, capfd: Any) -> None:
    assert lit_glm_here("train", *DEBUG, "bs=65") == 2
    assert "needs 65 examples per step, but" in capfd.readouterr().err
    assert lit_glm_here("train", *DEBUG, "bs=40", "run.max_steps=3", "hydra.run.dir=run") == 0
    assert [row["samples"] for row in rows(tmp_path / "run" / "steps.csv")] == [
        "40",
        "80",
        "120",
    ]  # the published counter
    final = result(tmp_path / "run")
    assert final["num_trained_samples"] == 64 + 40
    assert final["p_core"] == pytest.approx(104 / final["pure_compute_time"])
    last = json.loads((tmp_path / "run" / "perf.log").read_text().splitlines()[-1].split(" ", 1)[1])["value"]
    assert last["num_trained_samples"] == 120  # FlagPerf's counter, and its rates agree with it
    assert last["throughput(ips)_pure_compute"] == pytest.approx(120 / last["pure_training_computing_time"])
    assert last["throughput(ips)_raw"] == pytest.approx(120 / last["raw_train_time"])


def test_reported_lr_is_the_effective_lr(tmp_path: Path) -> None:
    assert lit_glm_here("train", *DEBUG, "optimizer.lr=0.5", "hydra.run.dir=run") == 0
    assert (result(tmp_path / "run")["lr"], result(tmp_path / "run")["fix_hp"]) == (0.5, "bs=4,lr=0.5")


def test_diverged_run_fails_with_a_message(tmp_path: Path, capfd: Any) -> None:
    diverge = ["lr=1e30", "run.max_steps=60", "run.max_skipped_steps=6", "run.eval_interval_samples=100000"]
    assert lit_glm_here("train", *DEBUG, *diverge, "optimizer.warmup=0", "hydra.run.dir=run") == 1
    said = capfd.readouterr().err
    assert "diverged: 6 consecutive steps without an update" in said
    assert "run.max_skipped_steps=6" in said
    assert "Traceback" not in said
    final = result(tmp_path / "run")
    assert final["status"] == "failed"
    assert final["error"].startswith("diverged: 6 consecutive steps without an update")
    steps = (tmp_path / "run" / "steps.csv").read_text().splitlines()[1:]
    assert (final["global_steps"], final["skipped_steps"]) == (len(steps), 6)
    assert final["num_trained_samples"] == 4 * len(steps)
    assert final["acc"] is None  # none was evaluated after the last step


MINE = """
from pytorch_lightning import Callback

class Raises(Callback):
    def __init__(self, what):
        self.what = what
    def on_train_batch_end(self, trainer, module, *rest):
        errors = {
            "value": ValueError("out of chalk"),
            "memory": RuntimeError("CUDA out of memory: tried to"),
            "exit": SystemExit(0),
        }
        raise errors[self.what]
"""


@pytest.mark.parametrize("what", ["value", "memory", "exit"])
def test_an_error_inside_a_run(what: str, tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / f"mine_{what}.py").write_text(MINE)
    monkeypatch.syspath_prepend(str(tmp_path))
    mine = [f"+callbacks.mine._target_=mine_{what}.Raises", f"+callbacks.mine.what={what}"]
    assert lit_glm_here("train", *DEBUG, *mine, "hydra.run.dir=run") == 1
    said = capfd.readouterr().err
    note = (tmp_path / "run" / "errors" / "rank-0.txt").read_text()
    if what == "value":
        assert "Traceback" in said
        assert "Traceback" in note
        assert result(tmp_path / "run")["error"] == "ValueError: out of chalk"
    elif what == "exit":
        assert "SystemExit: 0 was raised inside the run" in said
        assert "SystemExit" in note
        assert result(tmp_path / "run")["error"] == "SystemExit: 0"
    else:
        assert "Traceback" not in said
        for part in ("out of memory in step 1 (bs=4): estimated", "peak", "largest bs estimated to fit:"):
            assert part in said
        assert result(tmp_path / "run")["error"] == "out of memory"
    assert result(tmp_path / "run")["status"] == "failed"


def test_folders_of_secondary_nodes_may_exist_before_the_run(tmp_path: Path) -> None:
    with lock_directory(tmp_path / "run" / "nodes" / "1"):
        ensure_available(tmp_path / "run", False)
    (tmp_path / "run" / "nodes" / "thesis").mkdir()
    with pytest.raises(InputError, match="but contains nodes"):
        ensure_available(tmp_path / "run", False)


def test_runs_are_found_by_config_hash_without_reading_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None of their configurations is built anew."""
    config = validate_config(compose_config("train", DEBUG), TrainConfig)
    for number in range(500):
        folder = tmp_path / "outputs" / "day" / str(number)
        folder.mkdir(parents=True)
        JobSpec(config, 0.0, []).write(folder)
    monkeypatch.setattr(JobSpec, "read", lambda folder: pytest.fail("a configuration was read"))
    found = runs_by_config_hash(default_search_paths(tmp_path / "outputs" / "day" / "new", False))
    assert [len(runs) for runs in found.values()] == [500]


def test_out_of_memory_in_an_evaluation_is_reported(
    tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_arguments: Any) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("lit_glm.metrics.benchmark_callback.evaluate", no_room)
    assert lit_glm_here("train", *DEBUG, "hydra.run.dir=run") == 1
    assert "out of memory in the evaluation after step 0 (eval_bs=4): estimated" in capfd.readouterr().err
    assert result(tmp_path / "run")["error"] == "out of memory"


def test_run_discovery_respects_the_search_depth(tmp_path: Path) -> None:
    for name in ("a/b/c", "a/b/c/d", "x/child"):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
    (tmp_path / "a/b/c/d/job.json").touch()
    (tmp_path / "x/child/job.json").touch()
    assert list(find_run_dirs([(tmp_path / "x", 0)])) == []
    assert list(find_run_dirs([(tmp_path / "a", 2)])) == []
    assert list(find_run_dirs([(tmp_path / "a", 3)])) == [tmp_path / "a/b/c/d"]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({".lock": "mine"}, ".lock"),
        ({".room": "mine"}, ".room"),
        ({"job.json": '{"my": "slurm job"}', "result.json": "{}", "checkpoints/step-1.ckpt": "mine"}, "job.json"),
    ],
)
def test_folder_with_foreign_files_of_known_names_is_rejected(
    files: Dict[str, str], said: str, tmp_path: Path, capfd: Any
) -> None:
    for name, text in files.items():
        (tmp_path / "a" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "a" / name).write_text(text)
    before = tree_digest(tmp_path / "a")
    for more in ([], ["run.overwrite=true"]):
        assert lit_glm_here("train", *DEBUG, "hydra.run.dir=a", *more) == 2
        assert said in capfd.readouterr().err
    assert tree_digest(tmp_path / "a") == before


def test_overwriting_removes_the_evaluation_of_the_run_before(tmp_path: Path) -> None:
    assert lit_glm_here("train", *DEBUG, "run.checkpoint_interval_steps=1", "hydra.run.dir=run") == 0
    assert lit_glm_here("evaluate", "run") == 0
    assert (tmp_path / "run" / "evaluation" / "evaluation.json").is_file()
    assert lit_glm_here("train", *DEBUG, "hydra.run.dir=run", "run.overwrite=true") == 0
    assert not (tmp_path / "run" / "evaluation").exists()


def test_times_of_a_run_part_without_steps_are_kept(tmp_path: Path) -> None:
    """It wrote result.json before its first step and had no later one."""
    arguments = [*DEBUG, "run.max_steps=5", "hydra.run.dir=run"]
    assert lit_glm_here("train", *arguments) == 0
    run = tmp_path / "run"
    for path in (run / "checkpoints").iterdir():
        path.unlink()
    for name in ("steps.csv", "memory.csv"):
        (run / name).write_text((run / name).read_text().splitlines(keepends=True)[0])
    content = {**result(run), "status": "failed", "error": "out of memory", "global_steps": 0, "raw_train_time": 0.0}
    (run / "result.json").write_text(json.dumps({**content, "num_trained_samples": 0}))
    assert lit_glm_here("train", *arguments, "run.resume=run") == 0
    final = result(run)
    assert (final["status"], final["missing_data"], final.get("error")) == ("finished", [], None)
    assert None not in [
        final[name] for name in ("e2e_time", "init_time", "raw_train_time", "p_whole", "mem_actual_gib")
    ]
    assert final["init_time"] > content["init_time"]


def test_a_resumed_run_is_running_until_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an earlier part died of is not how this one ends."""
    arguments = [*DEBUG, "run.checkpoint_interval_steps=1"]
    assert lit_glm_here("train", *arguments, "hydra.run.dir=run") == 0
    run, seen = tmp_path / "run", []
    (run / "result.json").write_text(json.dumps({**result(run), "status": "failed", "error": "rank 1 was killed"}))

    def interrupted(*_: Any) -> None:
        seen.append((result(run)["status"], result(run).get("error")))
        raise Interrupted(signal.SIGTERM)

    monkeypatch.setattr(rank_runner, "build_components", interrupted)
    assert lit_glm_here("train", *arguments, "run.resume=run") == 143
    assert seen == [("running", None)]
    assert (result(run)["status"], result(run).get("error")) == ("interrupted", None)


def test_disk_full_at_start_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_folder, "reserve_disk_space", full)
    assert lit_glm_here("train", *DEBUG, "hydra.run.dir=run") == 1
    said = capfd.readouterr().err
    assert "the files of the run cannot be written (No space left on device); free disk space" in said
    assert "Traceback" not in said
    final = result(tmp_path / "run")
    assert final["status"] == "failed"
    assert "No space left on device" in final["error"]
    assert (tmp_path / "run" / "errors" / "rank-0.txt").is_file()
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert lit_glm_here("train", *DEBUG, "hydra.run.dir=run", "run.overwrite=true") == 0
