"""Predictions: against published rows, against runs that hold to a line, and as the command says them."""

import copy
import functools
import json
import shutil
import time
from pathlib import Path
from typing import Any, List, Tuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import FINISHED_STEPS, GOLDEN_RUN, lit_glm_here
from lit_glm.config.hydra_main import compose_config, validate_config
from lit_glm.config.schema import RunConfig, TrainConfig
from lit_glm.plan import PlanConfig
from lit_glm.planning.document import even_topology
from lit_glm.planning.prediction import Interval, MeasuredRun, Prediction, all_reduce_time, hull, predict, rank_speed
from lit_glm.planning.workload import TypicalExamples, Workload
from lit_glm.reporting.published_rows import load_published_rows
from lit_glm.training.evaluation import has_reached_limit, is_evaluation_due

TYPICAL = TypicalExamples.like_record(20_000, 512)


@functools.lru_cache(maxsize=None)
def _composed(overrides: Tuple[str, ...]) -> Any:
    return validate_config(compose_config("plan", list(overrides)), PlanConfig)


def plan_config(*overrides: str) -> Any:
    """A configuration that the test may change."""
    return copy.deepcopy(_composed(overrides))


def planned(*overrides: str, runs: Any = (), rows: Any = None) -> Prediction:
    config = plan_config(*overrides)
    work = Workload(config, TYPICAL, TYPICAL)
    speed = rank_speed(config, list(runs), load_published_rows() if rows is None else rows)
    return predict(config, speed, work, "", 1000)


@pytest.mark.parametrize(("examples", "is_enough"), [(8, True), (7, False)])
def test_a_plan_needs_the_examples_of_one_step(examples: int, is_enough: bool) -> None:
    config = plan_config("experiment=debug", "bs=8")
    assert Workload(config, TypicalExamples.like_record(examples, 512), None).has_enough_examples == is_enough


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["plan.device_counts=[4,0]"], "plan.device_counts=[4, 0]: must be at least 1"),
        (["bs=65"], "nothing to predict: 1x1, bs=65: 65 examples per step, 64 available"),
    ],
)
def test_a_plan_without_a_row_is_rejected(
    overrides: List[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert lit_glm_here("plan", "experiment=debug", *overrides) == 2
    assert message in capfd.readouterr().err
    assert not list(tmp_path.rglob("plan.md"))


def middle(interval: Interval) -> float:
    return (interval.low * interval.high) ** 0.5


@pytest.mark.parametrize(("topology", "published"), [("1x8", 42.4), ("2x8", 84.9)])
def test_prediction_from_one_a100_matches_larger_topologies(topology: str, published: float) -> None:
    one = [row for row in load_published_rows() if row["hardware"] == "a100" and row["topology"] == "1x1"]
    found = planned(
        "hardware=a100", f"topology={topology}", "scoring=published", "precision.tf32=true", rows=one
    ).p_core
    assert middle(found) == pytest.approx(published, rel=0.10)
    assert found.low <= published <= found.high


def test_unmeasured_device_gets_wide_range_or_error_without_peak() -> None:
    h100 = planned("hardware=h100")
    assert h100.p_core.high / h100.p_core.low > 5
    assert "no measurement of this device" in h100.evidence
    tiny = planned("hardware=h100", "model=glm_tiny").p_core  # of which a step takes as long as it takes to launch
    assert tiny.high / tiny.low > 10 * h100.p_core.high / h100.p_core.low
    with pytest.raises(Exception, match="hardware=cuda: its speed cannot be predicted.*plan.runs=RUN_DIR"):
        planned("hardware=cuda")


def test_ring_all_reduce_time() -> None:
    how = ["model.num_layers=2", "precision=fp32", "hardware.link_gbytes_s=100", "hardware.network_gbytes_s=10"]

    def seconds(topology: str) -> Interval:
        config: Any = validate_config(
            compose_config("plan", ["hardware=a100", f"topology={topology}", *how]), PlanConfig
        )
        return all_reduce_time(config)

    assert seconds("1x1") == Interval(0.0, 0.0)
    assert seconds("1x2").low * 7 / 4 == pytest.approx(seconds("1x8").low)  # 2 (N - 1) / N
    assert seconds("2x8").low * (14 / 8) / (30 / 16) == pytest.approx(10 * seconds("1x8").low)  # the network is slowest


def make_measured_run(overhead: float, rate: float, noise: float = 0.0) -> MeasuredRun:
    """A test double of a run whose steps hold to a line."""
    config = plan_config("hardware=cpu", "bs=4")
    work = Workload(config, TYPICAL, None)
    flops = np.array([float(work.counter.flops_by_rank(step).max()) for step in range(1, 61)])
    draw = np.random.default_rng(0)
    compute = (overhead + flops / rate) * (1.0 + noise * draw.random(60))
    compute[17] *= 9  # something came in between
    return MeasuredRun(Path("run"), config, {}, flops, compute, 0.01, 2.0**30)


@pytest.mark.parametrize("bs", [1, 2, 8, 32])
@pytest.mark.parametrize("overhead", [0.0, 0.8])
def test_prediction_from_a_run_covers_other_batch_sizes(bs: int, overhead: float) -> None:
    rate = 3e11
    found = planned("hardware=cpu", f"bs={bs}", runs=[make_measured_run(overhead, rate, 0.05)]).step_s
    config = plan_config("hardware=cpu", f"bs={bs}")
    truth = (overhead + Workload(config, TYPICAL, None).slowest_rank_flops / rate) * 1.025
    assert found.low <= truth <= found.high


def test_cost_models_are_fitted_with_and_without_outliers() -> None:
    everything, plain, line = make_measured_run(0.5, 2e11).fit_cost_models()
    assert (line.overhead, line.rate) == (pytest.approx(0.5, rel=0.01), pytest.approx(2e11, rel=0.01))
    assert plain.overhead == everything.overhead == 0.0
    assert everything.rate < plain.rate
    assert [one.overhead for one in make_measured_run(0.0, 2e11).fit_cost_models()] == [0.0, 0.0]
    assert make_measured_run(0.0, 2e11).fit_cost_models()[1].rate == pytest.approx(2e11, rel=0.01)


@given(st.lists(st.floats(0.1, 1e6), min_size=1), st.floats(0.1, 1e6))
def test_intervals(values: List[float], factor: float) -> None:
    one = hull(values)
    assert all(one.low <= value <= one.high for value in values)
    assert (one * factor).low == pytest.approx(one.low * factor)
    assert one.over(factor).low <= one.over(factor).high
    assert one.widened(0.1).low < one.low <= one.high < one.widened(0.1).high


def test_thousands_of_ranks_are_planned_within_seconds() -> None:
    start = time.monotonic()
    found = planned("hardware=a100", "topology.num_nodes=512", "topology.devices_per_node=8", "bs=4")
    assert time.monotonic() - start < 30
    assert found.steps == 5553080 // (4096 * 4) + 1
    config = plan_config("topology=4x8", "data.balance_ranks=false")
    work = Workload(config, TYPICAL, None)
    assert work.slowest_rank_flops > work.mean_rank_flops


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_the_overhead_of_steps_of_any_size_is_found(scale: float) -> None:
    run = make_measured_run(0.5, 2e11)
    run.flops, run.compute = scale * run.flops, run.compute
    assert run.fit_cost_models()[2].overhead == pytest.approx(0.5, rel=0.01)


def test_run_with_equal_steps_gives_wide_range_for_other_batch_sizes() -> None:
    """Its steps may take their time for calls, as of a small model, or for their arithmetic."""
    run = make_measured_run(0.0, 2e11)
    run.flops[:] = run.flops.mean()
    run.compute[:] = 0.4
    same, twice = (planned("hardware=cpu", f"bs={bs}", runs=[run]).step_s for bs in (4, 8))
    assert same.high / same.low < 2.5  # the examples differ from those of the run
    assert twice.low < 1.3 * same.low
    assert twice.high > 1.8 * same.high


def test_prediction_is_converted_to_activation_checkpointing() -> None:
    plain, repeated = (
        planned("hardware=cpu", "bs=4", f"model.activation_checkpointing={on}", runs=[make_measured_run(0.1, 2e11)])
        for on in ("false", "true")
    )
    assert middle(repeated.step_s) == pytest.approx(middle(plain.step_s) * 4 / 3, rel=0.01)
    assert "converted to activation checkpointing" in repeated.evidence
    assert "converted" not in plain.evidence


def test_the_all_reduce_of_a_measured_run_is_not_added_again() -> None:
    one, two = make_measured_run(0.1, 2e11), make_measured_run(0.1, 2e11)
    two.config.topology.devices_per_node = 2
    for run in (one, two):
        run.config.hardware.link_gbytes_s = 0.01
    alone, both = (
        planned("hardware=cpu", "bs=4", "topology=1x2", "hardware.link_gbytes_s=0.01", runs=[run]) for run in (one, two)
    )
    assert alone.step_s.low > 50  # seconds that this link needs
    assert both.step_s.high < 30


def test_ranks_on_one_cpu_share_its_speed() -> None:
    """Each of two ranks had half of the cores in one run, and would have it in a job planned from the other."""
    one, two = make_measured_run(0.1, 2e11), make_measured_run(0.1, 2e11)
    two.config.topology.devices_per_node = 2
    same, half, twice = (
        middle(planned("hardware=cpu", "bs=4", f"topology={topology}", runs=[run]).p_core)
        for topology, run in (("1x1", one), ("1x1", two), ("1x2", one))
    )
    assert half == pytest.approx(2 * same, rel=0.1)
    assert twice == pytest.approx(same, rel=0.1)


def test_ranks_on_one_cpu_share_its_power() -> None:
    run = make_measured_run(0.1, 2e11)
    run.result["power_mean_w"] = 100.0
    for topology in ("1x1", "1x4"):
        found = planned("hardware=cpu", "bs=4", f"topology={topology}", runs=[run])
        assert found.energy_j is not None
        assert found.energy_j.high / found.total_s.high == pytest.approx(105.0, rel=0.01)


def test_plan_uses_the_peak_of_the_arithmetic_in_use() -> None:
    tf32, plain = (planned("hardware=a100", "precision=amp", f"precision.tf32={on}").p_core for on in ("true", "false"))
    assert (tf32.low, tf32.high) == (plain.low, plain.high)
    planned("hardware=r300", "precision.tf32=true", rows=())  # it lacks TF32


@pytest.mark.slow
def test_plan_accepts_value_lists_and_measured_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    assert lit_glm_here("train", *GOLDEN_RUN, "run.max_steps=20", f"hydra.run.dir={run}") == 0
    capsys.readouterr()
    lists = ["bs=1,2,4", "scoring=shared_context,published", "plan.device_counts=[1,2]"]
    how = [*GOLDEN_RUN, *lists, f"plan.runs={run}", f"hydra.run.dir={tmp_path}/plan"]
    assert lit_glm_here("plan", *how, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert [(row["scoring"], row["bs"]) for row in shown] == [
        (scoring, bs) for bs in (1, 2, 4) for scoring in ("shared_context", "published")
    ]
    for row in shown:
        for key in ("memory_gib", "step_s", "p_core", "total_s"):
            assert 0 < row[key][0] <= row[key][1]
        assert row["energy_j"] is None
        assert row["predicted"] is True
    assert shown == json.loads((tmp_path / "plan" / "plan.json").read_text())
    assert "PREDICTED, not measured" in (tmp_path / "plan" / "plan.md").read_text()
    assert "measured" in (tmp_path / "plan" / "plan.svg").read_text()
    other = tmp_path / "other"
    assert lit_glm_here("train", *GOLDEN_RUN, "precision=bf16", "run.max_steps=12", f"hydra.run.dir={other}") == 0
    capsys.readouterr()
    how = [*GOLDEN_RUN, "hardware=cpu,r300", "plan.device_counts=[1]", f"hydra.run.dir={tmp_path}/two"]
    assert lit_glm_here("plan", *how, f"plan.runs={run},{other}") == 0
    said = capsys.readouterr().out
    assert said.count("| cpu 1x1") == said.count("| r300 1x1") == 1
    assert f"{other}: ignored: measured on cpu in bf16" in said
    assert lit_glm_here("plan", "hardware=cpu,no_such") == 2
    assert "no_such" in capsys.readouterr().err
    assert lit_glm_here("plan", "bs=interval(1,8)") == 2
    assert "plan takes lists" in capsys.readouterr().err
    assert lit_glm_here("plan", "hardware=cpu", "plan.runs=nowhere") == 2
    assert "plan.runs=nowhere: not a run folder" in capsys.readouterr().err
    assert lit_glm_here("plan", "hardware=none_such") == 2
    assert "none_such" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("devices", "nodes", "per_node"), [(1, 1, 1), (8, 1, 8), (12, 2, 6), (13, 13, 1), (16, 2, 8), (100, 20, 5)]
)
def test_even_topology_has_the_requested_number_of_devices(devices: int, nodes: int, per_node: int) -> None:
    topology = even_topology(devices, 8)
    assert (topology.num_nodes, topology.devices_per_node) == (nodes, per_node)


def test_fit_and_energy_use_the_hardware_file() -> None:
    small = planned("hardware=r300", "scoring=published", "bs=4")
    assert small.fits is True
    assert small.energy_j is not None
    assert small.energy_j.high == pytest.approx(small.total_s.high * 150.0)
    assert planned("hardware=r300", "scoring=published", "bs=400", "model.activation_checkpointing=false").fits is False
    assert planned("hardware=cpu", runs=[make_measured_run(0.0, 1e11)]).fits is None


@given(
    batch=st.integers(1, 40),
    most=st.integers(1, 400),
    interval=st.integers(1, 200),
    start=st.integers(0, 200),
    limit=st.one_of(st.none(), st.integers(1, 50)),
)
def test_planned_number_of_evaluations_equals_that_of_a_run(
    batch: int, most: int, interval: int, start: int, limit: Any
) -> None:
    run = RunConfig(max_samples=most, max_steps=limit, eval_interval_samples=interval, eval_start_samples=start)
    steps, made = 0, 0
    while steps == 0 or not has_reached_limit(steps, batch, run):
        steps += 1
        made += is_evaluation_due(steps, batch, run) or has_reached_limit(steps, batch, run)
    work: Any = object.__new__(Workload)
    work._config = TrainConfig(run=run, bs=batch)
    assert (work.steps(), work.evaluations(steps)) == (steps, made)


def test_published_speed_is_scaled_to_the_workload() -> None:
    """Half the tokens take about half the time, and a small model does not take that of a large one."""
    published = ["hardware=r300", "topology=1x8", "scoring=published", "bs=5"]
    rows = load_published_rows()
    whole, half = (planned(*published, f"data.max_seq_length={length}", rows=rows) for length in (512, 256))
    assert middle(half.step_s) == pytest.approx(0.5 * middle(whole.step_s), rel=0.15)
    tiny = planned(*published, "model=glm_tiny", rows=rows)
    assert tiny.step_s.low < 0.01 * whole.step_s.low
    assert "of a larger model" in tiny.evidence


@pytest.mark.slow
def test_max_steps_applies_to_each_plan_row_and_user_files_are_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    how = ["experiment=debug", "hardware=r300,cpu", "bs=3,5", "run.max_steps=7", "plan.device_counts=[1]"]
    assert lit_glm_here("plan", *how, "hydra.run.dir=plan", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert [(row["bs"], row["samples"], row["steps"]) for row in shown] == [(3, 21, 7), (5, 35, 7)]  # cpu: no peak
    assert "hardware=cpu: its speed cannot be predicted" in (tmp_path / "plan" / "plan.md").read_text()
    one = ["experiment=debug", "hardware=r300", "bs=3", "++run.max_steps=7", "plan.device_counts=[1]"]
    assert lit_glm_here("plan", *one, "hydra.run.dir=plan", "--json") == 0  # its own files may be replaced
    assert json.loads(capsys.readouterr().out)[0]["samples"] == 21
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "plan.md").write_text("mine")
    assert lit_glm_here("plan", *one, "hydra.run.dir=foreign") == 2
    assert (tmp_path / "foreign" / "plan.md").read_text() == "mine"


@pytest.mark.process
def test_steps_of_lost_or_damaged_rows_are_excluded(finished_run: Any, tmp_path: Path) -> None:
    whole = MeasuredRun.read(finished_run("1x1")[0])
    shutil.copytree(finished_run("1x1")[0], tmp_path / "run")
    head, *lines = (tmp_path / "run" / "steps.csv").read_text().splitlines()
    damaged = lines[29].split(",")
    damaged[head.split(",").index("compute_s")] = ""
    lines[29] = ",".join(damaged)  # step 30
    del lines[19]  # step 20
    (tmp_path / "run" / "steps.csv").write_text("\n".join([head, *lines]) + "\n")
    first = FINISHED_STEPS - len(whole.flops) + 1  # the first step that is learnt from
    kept = np.delete(np.arange(first, FINISHED_STEPS + 1), [20 - first, 30 - first]) - first
    read = MeasuredRun.read(tmp_path / "run")
    assert read.flops[-40:].tolist() == whole.flops[kept][-40:].tolist()
    assert read.compute[-40:].tolist() == whole.compute[kept][-40:].tolist()
