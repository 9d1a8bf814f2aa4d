"""Writes docs/schema.md, the fields of every file: metrics from the registry, the others from here.

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
    "earlier_e2e_time": "the part of e2e_time before the latest interruption; null: unknown",
    "training_spans": "begin and end of training of each part, seconds since the entry of train; null: unknown",
    "training_spans_by_node": "the same of each node, in the time of its devices.csv",
    "missing_data": "what is lost of the parts before an interruption; metrics that depend on it are null",
    "environment_changes": "in what the machines or software of the parts differ",
    "external_device_processes": "largest number of other processes seen on the devices; null: unknown",
    "mem_total_source": "device, or hardware file where the device does not report it; null with mem_total_gib",
    "data_fingerprint": "hash of all tokens and answers of training and evaluation data; reports keep runs on "
    "different data apart",
    "runtime": "what computed: cpu, cuda, xmlir, xpytorch, simulated, or the name of the class of hardware._target_",
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
    "hardware, topology, runtime, simulated, computed_on_cpu": "what was verified",
    "driver, device_name, host, torch": "where",
    "precisions": "name -> whether all that belongs to it passed; those that were not tried are not there",
    "checks": "a list: name, status (ok, warn, fail, skip), message, value, bound, advice",
}


STEPS: Dict[str, str] = {
    "step": "number of the step, from 1; a step is a micro-step with optimizer.gradient_accumulation_steps",
    "epoch": "from 0",
    "samples": "step x global batch, the published counter",
    "loss": "mean over the ranks, before the update",
    "lr": "learning rate of the update, 0 in step 1",
    "grad_norm": "global L2 norm before clipping, averaged over the ranks first",
    "data_s": "seconds of waiting for data",
    "compute_s": "seconds of forward and backward pass and update, the device synchronised at both ends",
    "step_s": "seconds from the end of the step before to the end of this one, without evaluations and checkpoints",
    "loss_scale": "of fp16 and amp",
}
EVALS: Dict[str, str] = {
    "step, samples": "after which step, and how many samples; 0 before training",
    "acc": "share of examples whose best candidate is a right answer",
    "seconds": "of the evaluation",
}
DEVICES: Dict[str, str] = {
    "time_s": "seconds since the node's entry",
    "node, device": "number of the node, and of the device on it",
    "mem_gib, power_w, temperature_c, utilisation": "GiB, watts, degrees Celsius, percent; empty where unknown",
}
MEMORY: Dict[str, str] = {
    "step, seconds": "steps done, and seconds since the entry of train",
    "gib": "memory in use on the device of rank 0",
}
SWEEP: Dict[str, str] = {
    "config, precision, fix_hp, e2e_time, p_whole, p_train, p_core, acc, mem": "as in the published table",
    "scoring, status": "of the run",
    "run_dir": "folder of the run",
    "overrides": "of the combination, with commas",
    "reused_from": "folder of an earlier run whose result was taken",
}
TUNE: Dict[str, str] = {
    "hardware, topology, precision, scoring, model, tf32, simulated, max_seq_length": "what the result holds for",
    "num_layers, hidden_size, num_attention_heads, vocab_size, activation_checkpointing": "of the model",
    "config_hash": "hash of the configuration of the trials",
    "complete": "whether the search has ended by itself; false: larger or faster values may exist",
    "seconds": "spent so far, all parts",
    "largest_bs, fastest_bs": "among the batch sizes that fit; null: none yet",
    "next": "the trial that runs, for the other nodes",
    "trials": "a list: bs, status (fits, out of memory, not tried, no time), p_core, mfu, memory_gib, "
    "samples_per_joule, message",
}
EVALUATION: Dict[str, str] = {
    "acc": "share of examples whose best candidate is a right answer",
    "em, f1": "the official scores; null without the texts (eval_examples.jsonl)",
    "num_examples": "number of examples",
    "truncated_candidates, truncated_contexts": "shares that were cut to length; missing without the texts",
    "checkpoint, eval_file, precision, scoring, hardware, runtime, device, simulated": "what was scored, and on what",
}
PREDICTIONS: Dict[str, str] = {
    "idx, label": "as in SuperGLUE's submission format; without the texts, numbers of example and candidate",
    "query, answers, prediction": "texts; prediction is null where no candidate has a score",
    "score": "of the prediction: sum of log-probabilities; null where it is not finite",
    "rank": "of the best right answer among all candidates, from 1",
    "scores": "a list: candidate, score",
}
ENVIRONMENT: Dict[str, str] = {
    "lit_glm, git_commit, git_dirty, command": "what ran",
    "host, pid, os, kernel, cpu, cpu_count, cores, threads, memory_gib": "the machine; cores: usable by the job",
    "machine, server, network, container_image": "detected, or given by report.*; null: unknown",
    "python, executable, packages, libraries": "versions of the software",
    "runtime, simulated, device_name, devices, driver, has_driver": "the devices",
    "variables": "environment variables from a list of known names",
    "parts": "the same for each part of a resumed run",
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
        "# Fields of the files",
        "",
        "What the files of runs, sweeps and commands contain. `python scripts/write_schema.py` writes this page from",
        "the registry of metrics (`metrics/registry.py`).",
        "",
        "## Metrics of result.json",
        "",
        "Unknown values are null. `sweep.objective` and `report --sort` take metrics with a better direction.",
        "",
        "| metric | unit | better | meaning | null when |",
        "| --- | --- | --- | --- | --- |",
    ]
    for metric in METRICS.values():
        json_path = f" (`{metric.path}`)" if metric.path else ""
        cells = (f"`{metric.name}`{json_path}", metric.unit, metric.better, metric.meaning, metric.unknown)
        lines.append("| " + " | ".join(cells) + " |")
    for heading, rows in (
        ("Other fields of result.json", RESULT),
        ("steps.csv", STEPS),
        ("evals.csv", EVALS),
        ("devices.csv", DEVICES),
        ("memory.csv", MEMORY),
        ("environment.json", ENVIRONMENT),
        ("sweep.csv", SWEEP),
        ("evaluation.json", EVALUATION),
        ("predictions.jsonl: a line per example", PREDICTIONS),
        ("plan --json: a list of rows", PLAN),
        ("verify.json", VERIFY),
        ("tune.json", TUNE),
    ):
        lines += ["", f"## {heading}", "", *_table(rows)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(0 if PAGE.read_text(encoding="utf-8") == page() else "docs/schema.md is old: run this script")
    PAGE.write_text(page(), encoding="utf-8")
