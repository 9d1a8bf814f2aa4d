"""`python -m lit_glm.evaluate`: score a checkpoint on the evaluation set; prints EM and F1, writes predictions."""

import json
import logging
import math
import os
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

from lit_glm.config.command_line import CommandLine, quote
from lit_glm.config.hydra_main import is_sweep_job, output_dir, run_command
from lit_glm.config.schema import TrainConfig
from lit_glm.errors import InputError, RunError
from lit_glm.process_utils import fast_imports

log = logging.getLogger("lit_glm.evaluate")

_FILES = ("evaluation.json", "predictions.jsonl")


def read_example_metadata(eval_file: Path, split: Any) -> Optional[List[Dict[str, Any]]]:
    """Read what `prepare` wrote next to an evaluation file: idx, candidates and answers of each example as text.

    Args:
        eval_file: the evaluation file.
        split: its examples, a `MemmapDataset`.

    Returns:
        None if there is no such file (the published data has none).

    Raises:
        InputError: if it is damaged, or belongs to another evaluation file.
    """
    from lit_glm.data.prepare_hdf5 import EXAMPLE_METADATA_FILE

    path = eval_file.parent / EXAMPLE_METADATA_FILE
    if not path.is_file():
        return None
    metadata: List[Dict[str, Any]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n"), 1):
        try:
            metadata += [json.loads(line)] if line else []
        except ValueError:
            raise InputError(f"{path}: line {number} is not JSON; prepare the data again") from None
    for number, entry in enumerate(metadata, 1):
        if not isinstance(entry, dict) or not {"candidates", "answers", "tokens_removed"} <= set(entry):
            raise InputError(f"{path}: entry {number} lacks candidates, answers or tokens_removed; prepare again")
    if len(metadata) != len(split):
        raise InputError(
            f"{path}: has {len(metadata)} lines, {eval_file} has {len(split)} examples; prepare both again"
        )
    for example, entry in enumerate(metadata):
        candidates, right = entry["candidates"], set(split.answers_of(example))
        matching = {index for index, text in enumerate(candidates) if text in entry["answers"]}
        if len(candidates) != split.num_candidates_of(example) or matching != right:
            raise InputError(f"{path}: entry {example + 1} is of another evaluation file; prepare both again")
    return metadata


def describe_predictions(
    chosen: List[Tuple[int, int]],
    scores: Dict[int, List[float]],
    answers: Callable[[int], Sequence[int]],
    metadata: Optional[List[Dict[str, Any]]],
) -> List[Dict[str, Any]]:
    """Describe each prediction: `idx` and `label` as SuperGLUE's submission format has them, then what explains it.

    Args:
        chosen: (example, candidate) of all examples; -1: none, as no score is above that of padding, or one is NaN.
        scores: of the candidates of each example.
        answers: example -> its right candidates.
        metadata: texts of all examples, in the order of the evaluation file; None: candidates are numbered instead.

    Returns:
        An entry per example; `rank` is that of the best right candidate among all, from 1. Scores that are not finite,
        and ranks that depend on one, are None.
    """
    entries = []
    for example, candidate in chosen:
        source = metadata[example] if metadata is not None else {}
        texts = source.get("candidates") or list(range(len(scores[example])))
        candidate_scores, right = scores[example], list(answers(example))
        best = max(candidate_scores[index] for index in right)
        rank = (
            1 + sum(score > best for score in candidate_scores) if all(map(math.isfinite, candidate_scores)) else None
        )
        known = [score if math.isfinite(score) else None for score in candidate_scores]
        text = texts[candidate] if candidate >= 0 else None
        entry = {"idx": source.get("idx", example), "label": text, "query": source.get("query")}
        entry["answers"] = source.get("answers") or right
        entry.update(prediction=text, score=known[candidate] if candidate >= 0 else None, rank=rank)
        entry["scores"] = [{"candidate": text, "score": score} for text, score in zip(texts, known)]
        entries.append(entry)
    return entries


def score_predictions(metadata: List[Dict[str, Any]], chosen: List[Tuple[int, int]]) -> Dict[str, float]:
    """Compute the official scores, em and f1, and the shares of what was cut to length.

    Args:
        metadata: texts of all examples, in the order of the evaluation file.
        chosen: (example, candidate) of all examples.
    """
    from lit_glm.training.evaluation import em_and_f1

    exact, overlap = 0.0, 0.0
    for example, candidate in chosen:
        text = metadata[example]["candidates"][candidate] if candidate >= 0 else ""
        em, f1 = em_and_f1(text, metadata[example]["answers"])
        exact, overlap = exact + em, overlap + f1
    removed = [entry["tokens_removed"] for entry in metadata]
    candidates = sum(map(len, removed))
    return {
        "em": exact / len(chosen),
        "f1": overlap / len(chosen),
        "truncated_candidates": sum(cut > 0 for cuts in removed for cut in cuts) / candidates,
        "truncated_contexts": sum(any(cuts) for cuts in removed) / len(removed),
    }


def _scored_run(config: TrainConfig) -> Optional[Path]:
    """Return the run folder whose checkpoint is scored; None for a checkpoint of its own."""
    from lit_glm.runs.job_spec import JOB_FILE

    path = Path(config.model.init_checkpoint or "")
    run_dir = path.parent.parent if path.suffix == ".ckpt" else path
    return run_dir if (run_dir / JOB_FILE).is_file() else None


def inherit_run_config(run_dir: Path, config: TrainConfig, given: List[str], overrides: List[str]) -> TrainConfig:
    """Use model, data and device of a run; the command line takes precedence.

    If the run's device is not present, the command line's is used, with a message.

    Args:
        run_dir: folder of the run.
        config: configuration of the command line.
        given: keys and groups that the command line sets.
        overrides: overrides of the command line.
    """
    from lit_glm.runs.job_spec import read_run_config

    run: Any = read_run_config(run_dir)
    if any(key.startswith(("data.out_dir", "data.synthetic")) for key in given):  # these decide which files are meant
        given = [*given, "data.out_dir", "data.synthetic", "data.train_file", "data.eval_file"]
    for group in ("model", "data"):
        if group in given:
            continue
        for key in given:
            if key.startswith(f"{group}."):
                _copy_value(config, run, key)
        setattr(config, group, getattr(run, group))
    if not any(key.split(".")[0] == "hardware" for key in given):
        config.hardware = _hardware_of_run(run, config, overrides)
    return config


def _copy_value(source: Any, target: Any, key: str) -> None:
    """Copy the value of a dotted key from one configuration to another."""
    parent, _, name = key.rpartition(".")
    for part in parent.split("."):
        if getattr(target, part, None) is None:  # the target has no such group, as data.synthetic
            setattr(target, part, getattr(source, part))
        source, target = getattr(source, part), getattr(target, part)
    if isinstance(target, dict):
        target[name] = source[name]
    else:
        setattr(target, name, getattr(source, name))


def _hardware_of_run(run: TrainConfig, config: TrainConfig, overrides: List[str]) -> Any:
    """Return the hardware of a run if its device is present; else the command line's, with a message.

    It is looked up by name in the files of this installation or of the user, because a run folder may be foreign, and
    its configuration names classes and environment variables.
    """
    from lit_glm.config.hydra_main import load_config
    from lit_glm.hardware.env import set_hardware_env

    chosen = [f"hardware={run.hardware.name}"]
    chosen += ["hardware.runtime=simulated"] if run.hardware.runtime == "simulated" else []
    try:
        hardware = load_config("evaluate", [*overrides, *chosen], TrainConfig).hardware
        set_hardware_env(hardware)  # before anything imports torch
        from lit_glm.hardware.runtimes.selection import check_runtime_available

        check_runtime_available(hardware, config.topology)
    except InputError as error:
        reason = str(error).splitlines()[0]
        log.warning(f"device {run.hardware.name} of the run is unavailable ({reason}); using {config.hardware.name}")
        return config.hardware
    return hardware


def evaluate_checkpoint(config: TrainConfig, _composed: Any, run_dir: Optional[Path] = None) -> int:
    """Score one checkpoint on one device.

    Args:
        config: configuration of the command line.
        run_dir: run whose model and data are used with the weights of another file; None: those of the checkpoint's.
    """
    from hydra.core.hydra_config import HydraConfig

    from lit_glm.atomic_files import make_folder
    from lit_glm.hardware.env import set_hardware_env

    if config.topology.world_size > 1:
        raise InputError(f"topology={config.topology.name}: evaluate runs on one device; leave topology out")
    if config.model.init_checkpoint is None:
        raise InputError("model.init_checkpoint is not set: give the checkpoint or run folder to score")
    if not os.path.exists(config.model.init_checkpoint):
        raise InputError(f"{config.model.init_checkpoint}: no such file or folder to score")
    run_dir = run_dir or _scored_run(config)
    hydra = HydraConfig.get()
    given = [override.key_or_group for override in CommandLine(list(hydra.overrides.task)).parse()]
    out = _folder_for(config, hydra)
    _check_not_foreign(out)
    make_folder(out)
    overrides = [*hydra.overrides.task, *CommandLine.read(sys.argv[1:]).searchpath]
    run_with_same_data = None if any(key.split(".")[0] == "data" for key in given) else run_dir
    config = config if run_dir is None else inherit_run_config(run_dir, config, given, overrides)
    for line in set_hardware_env(config.hardware):
        log.warning(line)
    scores: Dict[int, List[float]] = {}
    accuracy, chosen, runtime, split, metadata = _score_checkpoint(config, scores, run_with_same_data)
    report: Dict[str, Any] = {"acc": accuracy, "em": None, "f1": None, "num_examples": len(chosen)}
    predictions = describe_predictions(chosen, scores, split.answers_of, metadata)
    if metadata is not None:
        report.update(score_predictions(metadata, chosen))
    unusable = sum(any(map(math.isnan, candidate_scores)) for candidate_scores in scores.values())
    if unusable:
        log.warning(f"{unusable} of {len(chosen)} examples have a score that is not a number; they count as wrong")
    text = _scores_text(out, report, config, runtime, metadata is not None)
    try:
        _write_results(out, predictions, report, config, runtime)
    except OSError as error:
        print(text)
        raise RunError(f"{out}: the predictions cannot be written ({error})") from error
    print(text)
    return 0


def _folder_for(config: TrainConfig, hydra: Any) -> Path:
    """Return where results go: `hydra.run.dir` or a sweep's folder, else the run folder, else a new one in outputs/."""
    from lit_glm.runs.result import SCHEMA_VERSION, read_result

    run_dir = _scored_run(config)
    is_dir_given = any(override.startswith("hydra.run.dir=") for override in hydra.overrides.hydra)
    if run_dir is None or is_dir_given or is_sweep_job() or not os.access(run_dir, os.W_OK):
        return output_dir()
    # A run of an earlier version is only read.
    is_ours = (read_result(run_dir) or {}).get("schema_version") == SCHEMA_VERSION
    return run_dir / "evaluation" if is_ours else output_dir()


def _check_not_foreign(out: Path) -> None:
    """Reject a folder with files that an evaluation would overwrite but did not write."""
    from lit_glm.atomic_files import read_json

    foreign = [name for name in _FILES if (out / name).exists()]
    if foreign and "eval_file" not in (read_json(out / "evaluation.json") or {}):
        raise InputError(f"{out}: contains {', '.join(foreign)}, not written by evaluate; give another hydra.run.dir=")


def _check_data_of_run(split: Any, run_dir: Path) -> None:
    """Reject an evaluation file that is not the one of the run."""
    from lit_glm.runs.result import read_result

    _, _, before = str((read_result(run_dir) or {}).get("data_fingerprint") or "").partition("-")
    if before not in ("", split.fingerprint):
        raise InputError(
            f"{split.source}: these are not the evaluation data of {run_dir} (data_fingerprint {split.fingerprint} "
            f"here, {before} there); to score other data, give data.eval_file="
        )


def _score_checkpoint(
    config: TrainConfig, scores: Dict[int, List[float]], run_with_same_data: Optional[Path]
) -> Tuple[Optional[float], List[Tuple[int, int]], Any, Any, Optional[List[Dict[str, Any]]]]:
    """Score the evaluation file.

    Args:
        config: configuration.
        scores: gets the scores of each example.
        run_with_same_data: run folder whose data must be those of the configuration.

    Returns:
        Accuracy, (example, chosen candidate) of all examples, runtime, data, and texts of the examples.
    """
    from lit_glm.data.synthetic import ensure_synthetic_data
    from lit_glm.hardware.runtimes.selection import make_runtime

    if config.data.synthetic is not None:
        ensure_synthetic_data(config.data)
    runtime = make_runtime(config.hardware, config.topology)

    with fast_imports(config):
        from lit_glm.data.datamodule import evaluation_batches
        from lit_glm.data.memmap_dataset import open_dataset
        from lit_glm.hardware.precision import make_precision
        from lit_glm.model.attention import check_attention_available
        from lit_glm.model.checkpoint import build_glm, find_checkpoints_in
        from lit_glm.training.evaluation import evaluate
        from lit_glm.training.module import RecordModule

    if Path(str(config.model.init_checkpoint)).is_dir():
        find_checkpoints_in(Path(str(config.model.init_checkpoint)))  # raises if it holds none, such as a sweep's
    split = open_dataset(config.data.eval_file, True, config.data.cache_dir)
    split.check_fits_model(config.model.vocab_size, config.model.max_sequence_length, config.data.max_seq_length)
    if run_with_same_data is not None:
        _check_data_of_run(split, run_with_same_data)
    metadata = read_example_metadata(Path(config.data.eval_file), split)  # an error costs no work yet
    device = runtime.device(0)
    check_attention_available(config.model.attention)
    glm, messages = build_glm(config.model, runtime.model_ops())
    for line in messages:
        log.info(f"{config.model.init_checkpoint}: {line}")
    precision = make_precision(config, runtime)
    module = precision.convert_module(RecordModule(glm, config, runtime)).to(device).eval()
    with precision.forward_context():
        batches = evaluation_batches(split, config, pin_memory=runtime.pins_memory)
        accuracy, chosen = evaluate(module, batches, runtime, scores=scores)
    return accuracy, chosen, runtime, split, metadata


def _write_results(
    out: Path, predictions: List[Dict[str, Any]], report: Dict[str, Any], config: TrainConfig, runtime: Any
) -> None:
    from lit_glm.atomic_files import write_json, write_text

    write_json(  # first: it marks the folder as written by this command
        out / "evaluation.json",
        {
            **report,
            "checkpoint": config.model.init_checkpoint,
            "eval_file": config.data.eval_file,
            "precision": config.precision.name,
            "scoring": config.scoring.name,
            "hardware": config.hardware.name,
            "runtime": runtime.name,
            "device": runtime.device_name(0) or None,
            "simulated": runtime.simulated,
        },
    )
    lines = (json.dumps(entry, ensure_ascii=False) + "\n" for entry in predictions)
    write_text(out / "predictions.jsonl", "".join(lines))


def _scores_text(out: Path, report: Dict[str, Any], config: TrainConfig, runtime: Any, has_predictions: bool) -> str:
    lines = [f"SIMULATED on the CPU, not measured on {config.hardware.name}"] if runtime.simulated else []
    lines.append(f"device  {runtime.device_name(0) or config.hardware.name} (hardware={config.hardware.name})")
    lines.append(f"computed with  precision={config.precision.name} scoring={config.scoring.name}")
    scores = {key: value for key, value in report.items() if key != "num_examples" and value is not None}
    lines += [f"{key}  {100 * value:.2f}%" for key, value in scores.items()]
    lines.append(f"examples  {report['num_examples']}")
    if not has_predictions:
        lines.append(
            "em, f1 and texts of the predictions need eval_examples.jsonl, which prepare writes next to the HDF5"
        )
        lines.append("file; predictions are numbered instead: idx = example, label = candidate")
    return "\n".join([*lines, f"predictions  {out / 'predictions.jsonl'}"])


def main() -> int:
    """Run the command; return the exit status.

    A first argument that is a path sets model.init_checkpoint; beside that key it gives the run's model and data.
    """
    arguments, run_dir = sys.argv[1:], None
    flags = ("--config-dir", "-cd", "--cfg", "-c", "--package", "-p", "--info", "-i", "--shell-completion", "-sc")
    flagged = {index + 1 for index, argument in enumerate(arguments) if argument in flags}
    for index, argument in enumerate(arguments):
        is_path = os.path.exists(argument) or ("=" not in argument and argument[:1] not in "-+~")
        if index in flagged or not is_path:
            continue
        if any(other.startswith("model.init_checkpoint=") for other in arguments):
            run_dir = Path(arguments.pop(index))
        else:
            arguments[index] = f"model.init_checkpoint={quote(argument)}"
        break

    def task(config: TrainConfig, composed: Any) -> int:
        if run_dir is not None and not (run_dir / "job.json").is_file():
            raise InputError(f"{run_dir}: is not a run folder (no job.json), whose model and data could be used")
        return evaluate_checkpoint(config, composed, run_dir)

    return run_command("evaluate", TrainConfig, task, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
