"""Throughput arithmetic: definitions, order by construction, no number without time."""

import json
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_glm.config.hydra_main import compose_config, validate_config
from lit_glm.config.schema import TrainConfig
from lit_glm.hardware.runtimes.cpu import CPURuntime
from lit_glm.metrics.run_metrics import RunMetrics
from lit_glm.metrics.timing import PhaseDurations, PhaseTimer, slowest_rank, throughput_metrics
from lit_glm.runs.result import results_table, table_cells
from lit_glm.runs.run_writer import STEP_COLUMNS, AppendOnlyCSV, RunWriter

RESULT = {
    "status": "success", "hardware": "r300", "topology": "1x8", "precision": "fp32", "fix_hp": "bs=5,lr=1e-05",
    "e2e_time": 100.0, "p_whole": 3.4712, "p_train": 3.9, "p_core": 3.95, "acc": 0.8052, "mem_actual_gib": 31.8,
    "mem_total_gib": 32.0, "simulated": False,
}  # fmt: skip


def test_throughput_definitions() -> None:
    result = throughput_metrics(1200, PhaseDurations(pure_compute=100.0, no_eval=120.0, raw_train=150.0, init=30.0))
    assert (result["p_core"], result["p_train"], result["p_whole"]) == (12.0, 10.0, 8.0)
    assert (result["init_time"], result["raw_train_time"]) == (30.0, 150.0)


@pytest.mark.parametrize("seconds", [PhaseDurations(), PhaseDurations(init=3.0)])
def test_no_number_without_time_or_samples(seconds: PhaseDurations) -> None:
    assert throughput_metrics(10, seconds)["p_whole"] is None
    assert throughput_metrics(0, PhaseDurations(1.0, 1.0, 1.0))["p_core"] is None


def test_slowest_rank_of_an_earlier_part_is_kept_after_resume(tmp_path: Path) -> None:
    steps = AppendOnlyCSV(tmp_path / "steps.csv", STEP_COLUMNS)
    for step in (1, 2):  # of rank 0
        steps.add(**{**dict.fromkeys(STEP_COLUMNS, 1.0), "step": step})
    times = {"raw_train_time": 9.0, "init_time": 1.0, "e2e_time": 10.0, "no_eval_time": 7.0, "pure_compute_time": 5.0}
    (tmp_path / "result.json").write_text(json.dumps({**times, "global_steps": 2, "status": "interrupted"}))
    config = validate_config(compose_config("train", ["experiment=debug"]), TrainConfig)
    metrics = RunMetrics(config, CPURuntime(), PhaseTimer(lambda: 0.0), None, time.monotonic(), "")  # type: ignore[arg-type]
    metrics.begin(RunWriter(tmp_path, 2, True), 2)
    total = metrics.total_durations()
    assert (total.pure_compute, total.no_eval) == (5.0, 7.0)


class FakeTime:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


moments = st.floats(0, 50, allow_nan=False, allow_subnormal=False)  # the process may flush them


@given(st.lists(st.tuples(moments, moments, moments, moments), min_size=1, max_size=12))
def test_phases_are_contained_in_each_other(steps: "list[tuple[float, float, float, float]]") -> None:
    fake_time = FakeTime()
    waited = 0.0
    clock = PhaseTimer(lambda: waited, fake_time)
    clock.training_starts()
    evaluations = computed = 0.0
    for data, compute, bookkeeping, evaluation in steps:
        fake_time.now += data
        waited += data
        clock.batch_ready()
        fake_time.now += compute
        times = clock.step_computed()
        assert times.data == pytest.approx(data, abs=1e-6)
        assert times.compute == pytest.approx(compute, abs=1e-6)
        computed += compute
        fake_time.now += bookkeeping
        with clock.pause():
            fake_time.now += evaluation
        evaluations += evaluation
    seconds = clock.seconds()
    assert seconds.pure_compute == pytest.approx(computed, abs=1e-5)
    assert seconds.no_eval == pytest.approx(fake_time.now - 100.0 - evaluations - steps[-1][2], abs=1e-4)
    assert seconds.raw_train >= seconds.no_eval >= seconds.pure_compute
    result = throughput_metrics(64, seconds)
    if result["p_core"] and result["p_train"] and result["p_whole"]:
        assert result["p_core"] >= result["p_train"] >= result["p_whole"]


def test_slowest_rank_of_each_phase() -> None:
    assert slowest_rank([PhaseDurations(1, 5, 6, 2), PhaseDurations(2, 4, 7, 1)]) == PhaseDurations(2, 5, 7, 2)


def test_published_formats() -> None:
    assert table_cells(RESULT) == [
        "r300 1x8",
        "fp32",
        "bs=5,lr=1e-05",
        "100.00",
        "3.47",
        "3.90",
        "3.95",
        "80.52%",
        "31.8/32.0",
    ]
    empty = {**RESULT, "p_core": None, "acc": None, "mem_actual_gib": None}
    assert table_cells(empty)[6:] == ["", "", ""]
    head = results_table([RESULT]).splitlines()[0].split("|")
    names = ["config", "precision", "fix_hp", "e2e_time", "p_whole", "p_train", "p_core", "acc", "mem"]
    assert [name.strip() for name in head[1:-1]] == names


@pytest.mark.parametrize(
    ("change", "mark"), [({"simulated": True}, "simulated"), ({"status": "interrupted"}, "interrupted")]
)
def test_row_that_is_not_a_measurement_is_marked(change: "dict[str, object]", mark: str) -> None:
    assert f"({mark})" in table_cells({**RESULT, **change})[0]


def test_table_of_both_scorings_names_them_and_escapes_pipes() -> None:
    one, other = {**RESULT, "reused_from": "/a|b"}, {**RESULT, "scoring": "published"}
    rows = results_table([one, other]).splitlines()
    assert len({len(row) for row in rows}) == 1
    assert "reused from /a\\|b) scoring=" in rows[2]
    assert "scoring=published" in rows[3]
    assert "scoring" not in results_table([RESULT])
