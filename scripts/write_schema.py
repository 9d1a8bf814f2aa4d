"""Writes docs/schema.md, the fields of every JSON file: metrics from the registry, the others from here.

python scripts/write_schema.py            # tests/documents/test_schema.py compares it with the page
"""

import sys
from pathlib import Path
from typing import Dict, Iterator

from lit_glm.metrics.registry import METRICS

PAGE = Path(__file__).parent.parent / "docs" / "schema.md"
RESULT: Dict[str, str] = {
    "status": "running, success (target reached), finished (limit reached below the target), interrupted, failed",
    "error": "of a failed run: the reason, with the rank",
    "hardware, topology, precision, scoring, model": "names of the files chosen in conf/; topology as nodes x devices",
    "fix_hp, bs, lr, seed, gelu": "the hyperparameters of the row",
    "fix_hp_source": "the pair whose published values were taken; none",
    "converged": "whether the last evaluation reached run.target_accuracy",
    "step_s": "p50, p90, p99, mean (seconds) and count of the steps after the warm-up; null where rows are lost",
    "first_steps": "count and seconds of the warm-up, and its slowdown against the same work later; null: unknown",
    "model_flops": "model FLOPs of all steps, all ranks",
    "repeated_steps": "steps that were done again after an interruption, because no checkpoint had them",
    "interruptions": "how often the run was resumed",
    "training_spans": "begin and end of training of each part, seconds since the entry of train; null: unknown",
    "training_spans_by_node": "the same of each node, in the time of its devices.csv",
    "missing_data": "what is lost of the parts before an interruption; metrics that depend on it are null",
    "environment_changes": "in what the machines or software of the parts differ",
    "external_device_processes": "largest number of other processes seen on the devices; null: unknown",
    "mem_total_source": "device, or hardware file where the device does not report it; null with mem_total_gib",
    "data_fingerprint": "hash of counts and largest values of training and evaluation data; reports keep runs on "
    "different data apart",
    "runtime": "what computed: cpu, cuda, xmlir, xpytorch, simulated, _target_",
    "simulated": "whether the device was simulated on the CPU: no value was measured on the device",
    "computed_on_cpu": "whether a class given by hardware._target_ computes on the CPU",
    "profiled": "whether callbacks=profile was on: such results are not comparable",
    "tf32": "whether fp32 products were rounded to TF32",
    "mfu_above_one": "an impossible mfu, left out as mfu: the peak in the hardware file is wrong",
    "schema_version": "3",
}
PLAN: Dict[str, str] = {
    "hardware, topology, precision, scoring, bs": "of the combination",
    "samples": "that total_s and energy_j are of: run.max_samples, else those of the published R300 1x8 run",
    "predicted": "true: nothing here was measured",
    "memory_gib": "[low, high] of a device",
    "fits": "true, false, or null between, or where the device's memory is unknown",
    "step_s": "[low, high] seconds of a step",
    "p_core": "[low, high] samples/s, all ranks together",
    "total_s": "[low, high] seconds from the first step to the end, evaluations included",
    "energy_j": "[low, high] of all devices; null without the power of a device",
    "all_reduce_s": "[low, high] seconds of an all-reduce of all gradients",
    "steps": "of the run",
    "basis": "what the prediction rests on",
}
VERIFY: Dict[str, str] = {
    "schema_version": "1",
    "complete": "whether all checks have ended; the file grows as they end",
    "ok": "whether no check failed",
    "finished": "date and time",
    "hardware, topology, runtime, simulated, driver, device_name, host, torch": "what was verified, and where",
    "precisions": "name -> whether all that belongs to it passed; those that were not tried are not there",
    "checks": "a list: name, status (ok, warn, fail, skip), message, value, bound, advice",
}


def _table(rows: Dict[str, str]) -> Iterator[str]:
    yield "| field | meaning |"
    yield "| --- | --- |"
    for name, meaning in rows.items():
        names = ", ".join(f"`{part}`" for part in name.split(", "))
        yield f"| {names} | {meaning.replace('|', chr(92) + '|')} |"


def page() -> str:
    """The whole page."""
    lines = [
        "# Fields of the JSON files",
        "",
        "What `result.json`, the JSON of `plan` and `verify.json` hold. `python scripts/write_schema.py` writes this",
        "page from the registry of metrics (`metrics/registry.py`).",
        "",
        "## Metrics of result.json",
        "",
        "Unknown values are null. `sweep.objective` and `report --sort` take metrics with a better direction.",
        "",
        "| metric | unit | better | meaning | null when |",
        "| --- | --- | --- | --- | --- |",
    ]
    for metric in METRICS.values():
        where = f" (`{metric.path}`)" if metric.path else ""
        cells = (f"`{metric.name}`{where}", metric.unit, metric.better, metric.meaning, metric.unknown)
        lines.append("| " + " | ".join(cells) + " |")
    for heading, rows in (
        ("Other fields of result.json", RESULT),
        ("plan --json: a list of rows", PLAN),
        ("verify.json", VERIFY),
    ):
        lines += ["", f"## {heading}", "", *_table(rows)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(0 if PAGE.read_text(encoding="utf-8") == page() else "docs/schema.md is old: run this script")
    PAGE.write_text(page(), encoding="utf-8")
