"""Registry of all metrics of a run: name, unit, format, direction, location in result.json, labels.

Used by tables, rankings, comparisons, pages, CSV, loggers, `plan` and `tune`; docs/schema.md is generated from it. A
new column needs one entry here, with its value in result.json and a `column`. Does not import torch.
"""

from dataclasses import dataclass
from typing import Any, Callable, Dict, Optional, Tuple

_GENERAL: Callable[[float], str] = "{:.6g}".format
_TWO: Callable[[float], str] = "{:.2f}".format
_ONE: Callable[[float], str] = "{:.1f}".format


def _percent(share: float) -> str:
    return f"{100 * share:.2f}%"


@dataclass(frozen=True)
class Metric:
    """One metric."""

    name: str
    """Name on the command line (`sweep.objective`, `--sort`) and in CSV files."""
    unit: str
    en: str
    zh: str
    meaning: str
    unknown: str
    """Condition under which the value is null, for docs/schema.md."""
    better: str = ""
    """"higher", "lower", or "" if neither; such a metric cannot be used for ranking."""
    form: Callable[[float], str] = _GENERAL
    path: str = ""
    """Location in result.json if not under its name: keys joined by dots."""
    column: str = ""
    """Heading of its column in report tables; "": no column."""
    is_published: bool = False
    """Whether the published table has this column too."""
    remark_en: str = ""
    remark_zh: str = ""
    of: str = ""
    """Name of the metric that is the total of this one, shown after a slash."""
    is_compared: bool = False
    """Whether `report --compare` shows it."""
    logged_as: str = ""
    """Name in loggers."""

    def label(self, language: str) -> str:
        """Return the label in a language."""
        return self.zh if language == "zh" else self.en

    def remark(self, language: str) -> str:
        """Return the remark in a language."""
        return self.remark_zh if language == "zh" else self.remark_en

    def axis_label(self) -> str:
        """Return name and unit, for plots and tables."""
        return f"{self.column or self.name} ({self.unit})" if self.unit else self.column or self.name

    def value(self, result: Dict[str, Any]) -> Optional[float]:
        """Read the metric from a result; None if unknown or not a finite number."""
        entry: Any = result
        for key in (self.path or self.name).split("."):
            entry = entry.get(key) if isinstance(entry, dict) else None
        return as_number(entry)

    def sort_key(self, value: Optional[float], converged: Any = True) -> Tuple[bool, bool, float]:
        """Return a key that sorts values, best first and unknown ones last.

        Args:
            value: value of a run or of several.
            converged: whether they reached the target; end-to-end times without it come after those with it.
        """
        if value is None:
            return True, False, 0.0
        return False, self.name == "e2e_time" and not converged, value if self.better == "lower" else -value


def as_number(value: Any) -> Optional[float]:
    """Return a finite number, or None; results of other versions and damaged ones may hold any type."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if abs(value) < float("inf") else None
    except OverflowError:
        return None


_NO_STEP = "no training step was measured, or rows of steps.csv are lost"
_NO_RESULT = "the run has not reached this point, or the times of an earlier part are lost"
_NO_PEAK = "the peak of the arithmetic in use is unknown"
_NO_POWER = "the power of a device is unknown, or more than five consecutive readings are missing"

METRICS: Dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            "e2e_time", "s", "End-to-end time", "端到端时间",
            "From the entry of `train` to the end of training, initialisation included; all parts of a resumed run.",
            _NO_RESULT, "lower", _TWO, column="e2e_time", is_published=True, is_compared=True,
            remark_en="seconds, initialisation included", remark_zh="单位秒，含初始化",
        ),
        Metric(
            "p_whole", "samples/s", "Throughput, whole", "总吞吐量",
            "num_trained_samples / raw_train_time, all ranks.", _NO_STEP, "higher", _TWO,
            column="p_whole", is_published=True, is_compared=True, logged_as="perf/p_whole",
            remark_en="samples / training time, evaluations included", remark_zh="训练样本数 / 训练总时间（含评估）",
        ),
        Metric(
            "p_train", "samples/s", "Throughput, training", "训练吞吐量",
            "num_trained_samples / no_eval_time, all ranks.", _NO_STEP, "higher", _TWO,
            column="p_train", is_published=True, is_compared=True, logged_as="perf/p_train",
            remark_en="without evaluations", remark_zh="不含评估时间",
        ),
        Metric(
            "p_core", "samples/s", "Throughput, pure compute", "计算吞吐量",
            "num_trained_samples / pure_compute_time, all ranks.", _NO_STEP, "higher", _TWO,
            column="p_core", is_published=True, is_compared=True, logged_as="perf/p_core",
            remark_en="without evaluations and waiting for data", remark_zh="不含评估与等待数据时间",
        ),
        Metric(
            "acc", "", "Result of training", "训练结果",
            "Share of evaluation examples whose best candidate is a correct answer, evaluated after the last step.",
            "no evaluation after the last step", "higher", _percent,
            column="acc", is_published=True, is_compared=True, logged_as="val/acc",
            remark_en="accuracy: exact match", remark_zh="准确率（exact match）",
        ),
        Metric(
            "mem_actual_gib", "GiB", "Device memory in use", "硬件存储使用",
            "Peak memory of the device that uses most (sum over the ranks of a node if they share memory).",
            "neither the runtime nor the vendor's monitor gave a reading, or a part of the run has none", "lower", _ONE,
            column="mem", is_published=True, is_compared=True, of="mem_total_gib", logged_as="mem/gib",
            remark_en="peak in use / total of the device, GiB", remark_zh="最高占用 / 单卡总量，单位 GiB",
        ),
        Metric(
            "step_p99_s", "s", "Step time, 99th percentile", "单步时间（P99）",
            "99th percentile of the step time after warm-up.", _NO_STEP, "lower", "{:.4g}".format, path="step_s.p99",
            column="step_p99_s", is_compared=True,
            remark_en="seconds per step, without warm-up steps", remark_zh="单位秒，不含预热步",
        ),
        Metric(
            "mem_total_gib", "GiB", "Device memory", "硬件存储总量", "Total memory of a device.",
            "known neither to the runtime nor to the hardware file", form=_ONE,
        ),
        Metric(
            "init_time", "s", "Initialisation", "初始化时间",
            "From the entry of `train` to the first training step, the first evaluation included.", _NO_RESULT, "lower",
            is_compared=True,
        ),
        Metric(
            "raw_train_time", "s", "Training with evaluations", "训练总时间",
            "From the first training step to the end of training, evaluations included.", _NO_RESULT, "lower",
            is_compared=True,
        ),
        Metric(
            "no_eval_time", "s", "Training without evaluations", "训练时间（不含评估）",
            "Training steps, including waiting for data.", _NO_STEP, "lower", is_compared=True,
        ),
        Metric(
            "pure_compute_time", "s", "Pure compute", "计算时间",
            "Forward, backward and optimizer step, the device synchronised at both ends.", _NO_STEP, "lower",
            is_compared=True,
        ),
        Metric(
            "mfu", "", "Model FLOPs utilisation", "模型算力利用率",
            "Model FLOPs that the algorithm requires / (pure_compute_time x devices x peak).", _NO_PEAK,
            "higher", lambda share: f"{100 * share:.1f}%", is_compared=True,
        ),
        Metric(
            "mfu_flagperf", "", "MFU, FlagPerf's formula", "MFU（FlagPerf 公式）",
            "FlagPerf's own formula, which counts every padded slot.", _NO_PEAK, "higher",
        ),
        Metric(
            "tokens_per_s", "1/s", "Tokens", "每秒 token 数", "Token rows computed per second, all ranks.",
            _NO_STEP, "higher",
        ),
        Metric(
            "candidates_per_s", "1/s", "Candidates", "每秒候选数", "Candidates scored per second, all ranks.",
            _NO_STEP, "higher",
        ),
        Metric(
            "rank_imbalance", "", "Load imbalance of ranks", "各 rank 负载不均衡度",
            "Rows of the busiest rank over the mean, minus 1, averaged over steps.", "training has not ended", "lower",
        ),
        Metric(
            "energy_j", "J", "Energy", "能耗",
            "Power of the devices integrated over each node's training time, summed over all nodes.",
            _NO_POWER, "lower", is_compared=True,
        ),
        Metric(
            "samples_per_joule", "1/J", "Samples per joule", "每焦耳样本数", "num_trained_samples / energy_j.",
            _NO_POWER, "higher", "{:.3g}".format, is_compared=True,
        ),
        Metric(
            "energy_bridged_share", "", "Energy: bridged share", "能耗：插值时间占比",
            "Share of the training time in which readings are missing and power was interpolated.", _NO_POWER,
        ),
        Metric(
            "power_mean_w", "W", "Mean power of all devices", "平均功率（所有卡合计）",
            "energy_j / training time, the sum over all devices.", _NO_POWER,
        ),
        Metric(
            "power_max_w", "W", "Peak power of a device", "最高功率（单卡）", "Largest reading of any one device.",
            "no reading",
        ),
        Metric("temperature_mean_c", "C", "Mean temperature", "平均温度", "Mean of all readings.", "no reading"),
        Metric("temperature_max_c", "C", "Highest temperature", "最高温度", "Maximum of all readings.", "no reading"),
        Metric(
            "num_trained_samples", "", "Samples trained on", "训练样本数",
            "Examples processed in training steps; a partial last batch counts its actual size.", "never",
            "lower", is_compared=True,
        ),
        Metric("global_steps", "", "Steps", "步数", "Completed training steps.", "never", "lower", is_compared=True),
        Metric(
            "skipped_steps", "", "Steps without an update", "未更新的步数",
            "Steps whose loss or gradient was not finite.", "before the first step", "lower", is_compared=True,
        ),
        Metric(
            "external_cpu_load", "", "Load of other processes", "其他进程占用",
            "Share of the machine's CPUs used by other processes; maximum over the parts of a run.", "not yet known",
            form=lambda share: f"{100 * share:.0f}%",
        ),
    )
}  # fmt: skip
TABLE_METRICS = tuple(metric for metric in METRICS.values() if metric.column)
"""Metrics with a column in report tables; the order of columns is that of `TABLE_COLUMNS`."""
PUBLISHED_METRICS = tuple(metric for metric in TABLE_METRICS if metric.is_published)
"""Columns that the published table also has."""
_USUAL = ("acc", "p_core")
OBJECTIVES = (*_USUAL, *(name for name, metric in METRICS.items() if metric.better and name not in _USUAL))
"""Metrics by which sweeps and reports can be ranked, the most common first."""
PUBLISHED_COLUMNS = ("config", "precision", "fix_hp", *(metric.column for metric in PUBLISHED_METRICS))
"""Column names of the published table, in order (its first column is named 配置 there)."""
TABLE_COLUMNS = (*PUBLISHED_COLUMNS, *(metric.column for metric in TABLE_METRICS if not metric.is_published))
"""Column names of report tables."""


def cell_text(metric: Metric, value: Optional[float], total: Optional[float] = None) -> str:
    """Format a value for tables; "" if it is unknown."""
    if value is None:
        return ""
    return metric.form(value) + ("" if total is None else f"/{metric.form(total)}")
