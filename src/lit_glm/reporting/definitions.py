"""The table of general figures: task, model, data, what each column means, what was changed."""

from typing import Any, Dict, List

from lit_glm.reporting.i18n import Words
from lit_glm.reporting.run_reader import Row, Run
from lit_glm.reporting.table import Table


def distinct_of(values: List[Any]) -> List[str]:
    """As texts, each once, without what is unknown."""
    return list(dict.fromkeys(str(value) for value in values if value not in (None, "")))


def general(name: str, found: List[Row], words: Words) -> Table:
    """What the columns mean and what is not as published, for the rows of one chip."""
    runs = [run for row in found for run in row.runs]

    def distinct(key: str, otherwise: str) -> str:
        return ", ".join(distinct_of([run.settings.get(key) for run in runs])) or otherwise

    cards = distinct_of([run.environment.get("card") for run in runs])
    precisions = ", ".join(distinct_of([row["precision"] for row in found]))
    data = {"record": "ReCoRD", "synthetic": "synthetic"}
    sets = ", ".join(data.get(text, text) for text in distinct_of([run.settings.get("data.name") for run in runs]))
    lines = [
        ("task", words("task_value"), ""),
        ("model", f"GLM ({distinct('model.name', str(runs[0].result.get('model')))})", ""),
        ("data", sets, ""),
        ("precision", words("see", precisions), words("precision_remark")),
        ("fix_hp", words("see", "fix_hp"), words("fix_hp_remark")),
        ("short_name", ", ".join(cards) or name, ""),
        ("mem", words("see", "mem"), words("mem_remark")),
        ("e2e_time", words("see", "e2e_time"), words("e2e_remark")),
        ("p_whole", words("see", "p_whole"), words("p_whole_remark")),
        ("p_train", words("see", "p_train"), words("p_train_remark")),
        ("p_core", words("see", "p_core"), words("p_core_remark")),
        ("acc", words("see", "acc"), words("acc_remark")),
        ("changes", "; ".join(_changes(runs)) or words("none"), words("changes_remark")),
    ]
    columns = [words("name"), words("value"), words("remark")]
    return Table(columns, [[words(key), value, remark] for key, value, remark in lines], heading=name)


def _changes(runs: List[Run]) -> List[str]:
    """Settings that are not those of the published case, with their values."""
    from lit_glm.config.hydra_main import checked, compose
    from lit_glm.config.schema import TrainConfig, walk
    from lit_glm.errors import InputError

    try:
        published = dict(walk(checked(compose("train", ["experiment=flagperf"]), TrainConfig)))
    except InputError:
        return []
    judged = (
        "model.", "optimizer.", "scoring.name", "data.name", "data.max_seq_length", "precision.tf32",
        "run.target_accuracy", "run.max_steps", "seed",
    )  # fmt: skip
    pair = ("model.activation_checkpointing", "model.gelu", "optimizer.lr", "model.init_checkpoint")
    changed: Dict[str, List[str]] = {}
    for run in runs:
        for key, value in run.settings.items():
            other_shape = run.settings.get("model.name") != published["model.name"]
            if key.startswith("model.") and key != "model.name" and other_shape:
                continue  # another model has another shape
            if key.startswith(judged) and key not in pair and key in published and published[key] != value:
                changed.setdefault(key, []).append(str(value))
    return [f"{key}={', '.join(dict.fromkeys(values))}" for key, values in sorted(changed.items())]
