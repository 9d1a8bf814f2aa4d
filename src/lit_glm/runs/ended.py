"""What a run says at its end: reached or not, at which step and time, why it stopped, what is next."""

from pathlib import Path
from typing import Any, Dict, Optional

from lit_glm.config.schema import TrainConfig

_SLOW = 1.5
"""From how many times its share of time a warm-up is worth a word."""


def how_it_ended(result: Dict[str, Any], config: TrainConfig, run_dir: Path) -> str:
    """Two lines for people.

    Args:
        result: of result.json.
        config: the run's.
        run_dir: its folder.
    """
    run, step, samples = config.run, result["global_steps"], result["num_trained_samples"]
    when = f"at step {step} ({samples:,} samples, {result['raw_train_time']:.1f} s of training)"
    accuracy, target = result.get("acc"), f"{100 * run.target_accuracy:g}%"
    has = _percent(accuracy)
    if result["status"] == "success":
        how = f"REACHED: accuracy {has}, target {target}, {when}"
    elif result["status"] == "interrupted":
        saved = run.checkpoint_interval_steps is not None
        on = (
            f"it goes on with run.resume={run_dir}"
            if saved
            else "nothing was saved (run.checkpoint_interval_steps=null)"
        )
        how = f"STOPPED {when}: accuracy {has}, target {target}; {on}"
    else:
        limit = f"run.max_samples={run.max_samples}"
        if run.max_steps is not None and step >= run.max_steps:
            limit = f"run.max_steps={run.max_steps}"
        what = f"accuracy {has}, target {target}" if run.evaluate else "nothing was evaluated (run.evaluate=false)"
        how = f"NOT REACHED: {what}; {limit} was the limit, {when}"
    skipped = result.get("skipped_steps") or 0
    how += f"; {skipped} steps without an update" if skipped else ""
    how += _slow_start(result.get("warm_up"))
    return f"{how}\nrun folder {run_dir}; the document of it: python -m lit_glm.report {run_dir}"


def _slow_start(start: Optional[Dict[str, float]]) -> str:
    """A line where the first steps took far longer than the same work later."""
    if start is None or start["slower"] < _SLOW:
        return ""
    which = "step" if start["steps"] == 1 else f"{start['steps']} steps"
    return (
        f"\nwarm-up: the first {which} took {start['seconds']:.1f} s, {start['slower']:.1f} times as long as the same "
        "work later (memory, kernels and files used for the first time); p_core, p_train and p_whole contain it"
    )


def _percent(share: Optional[float]) -> str:
    return "unknown" if share is None else f"{100 * share:.2f}%"
