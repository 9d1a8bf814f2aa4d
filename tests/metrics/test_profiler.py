"""`callbacks=profile`: what a run leaves, and that its tables are torch's own numbers."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import GOLDEN_RUN, lit_glm_here
from lit_glm.config.hydra_main import compose_config, validate_config
from lit_glm.config.schema import TrainConfig
from lit_glm.metrics.memory_estimate import count_parameters
from lit_glm.metrics.profiler import ProfileEntry, ProfileSummary, _covered_length, _profile_table
from lit_glm.reporting.run_reader import find_runs, group_into_rows
from lit_glm.runs.job_spec import JobSpec, config_hash, hashed_settings

PROFILE = [*GOLDEN_RUN, "run.max_steps=8", "callbacks=profile", "callbacks.profile.from_step=3"]


@pytest.mark.process
def test_profile_is_written_and_logged(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = tmp_path / "run"
    assert lit_glm_here("train", *PROFILE, "callbacks.profile.steps=2", f"hydra.run.dir={run}") == 0
    assert f"profile of steps 3 to 4: {run}/profile/kernels.md" in capsys.readouterr().out
    text = (run / "profile" / "kernels.md").read_text()
    assert "`aten::addmm`" in text
    trace = json.loads((run / "profile" / "trace.json").read_text())
    assert any(event.get("name") == "aten::addmm" for event in trace["traceEvents"])
    model = JobSpec.read(run).config.model
    weights = f"{4 * count_parameters(model) / 2**30:.4f}"
    cells = {line.split("|")[1].strip(): line.split("|")[2].strip() for line in text.splitlines() if line[:1] == "|"}
    assert cells["weights"] == cells["gradients"] == weights
    assert float(cells["activations saved for the backward pass"]) > 0
    assert json.loads((run / "result.json").read_text())["profiled"] is True


@pytest.mark.slow
def test_profiled_runs_are_not_merged_with_others(tmp_path: Path) -> None:
    plain, profiled = tmp_path / "plain", tmp_path / "profiled"
    assert lit_glm_here("train", *GOLDEN_RUN, "run.max_steps=4", f"hydra.run.dir={plain}") == 0
    how = [*GOLDEN_RUN, "run.max_steps=4", "callbacks=profile", "callbacks.profile.from_step=1"]
    assert lit_glm_here("train", *how, "callbacks.profile.steps=9", f"hydra.run.dir={profiled}") == 0
    assert "ended before the step after" in (profiled / "profile" / "kernels.md").read_text()
    assert len(group_into_rows(find_runs([str(plain), str(profiled)])[0])) == 2
    assert config_hash(JobSpec.read(plain).config) != config_hash(JobSpec.read(profiled).config)
    assert "profiled" not in hashed_settings(JobSpec.read(plain).config)


def test_run_too_short_to_profile_logs_a_message(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    how = [*GOLDEN_RUN, "run.max_steps=2", "callbacks=profile", f"hydra.run.dir={tmp_path}/run"]
    assert lit_glm_here("train", *how) == 0
    assert "no step was profiled: the run ended after step 2" in capsys.readouterr().out
    assert not (tmp_path / "run" / "profile").exists()


def test_profile_from_step_zero_is_rejected(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    how = [*GOLDEN_RUN, "callbacks=profile", "callbacks.profile.from_step=0", f"hydra.run.dir={tmp_path}/run"]
    assert lit_glm_here("train", *how) == 2
    assert "callbacks.profile.from_step=0" in capsys.readouterr().err


def test_profile_summary_matches_torch_profiler() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(3):
            float((torch.ones(8, 8) @ torch.ones(8, 8)).sum())
    found = ProfileSummary.of(profiler, 5, 7)
    own = {average.key: average for average in profiler.key_averages()}
    assert {entry.name: entry.calls for entry in found.operators}["aten::mm"] == 3
    for entry in found.operators:
        assert entry.seconds == pytest.approx(own[entry.name].self_cpu_time_total / 1e6)
    assert [(entry.name, entry.calls) for entry in found.waits] == [("aten::_local_scalar_dense", 3)]
    assert found.count == 3
    assert 0 < found.busy <= found.window


def test_profile_table_is_per_step() -> None:
    entries = [ProfileEntry("mm", 4, 0.03), ProfileEntry("add", 1, 0.01)]
    lines = "\n".join(_profile_table("Device", entries, 2)).splitlines()
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "`" in line] == [
        ["`mm`", "75.0%", "15.000", "2", "7500.0"],
        ["`add`", "25.0%", "5.000", "0.5", "10000.0"],
    ]


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9)), max_size=9))
def test_covered_length_counts_overlaps_once(spans: list) -> None:
    covered = {moment for start, length in spans for moment in range(start, start + length)}
    assert _covered_length([(start, start + length) for start, length in spans]) == len(covered)


def test_profiled_flag_requires_the_profile_callback() -> None:
    for callbacks, profiled in (("default", False), ("profile", True), ("none", False)):
        config = validate_config(compose_config("train", [f"callbacks={callbacks}"]), TrainConfig)
        assert config.profiled is profiled
