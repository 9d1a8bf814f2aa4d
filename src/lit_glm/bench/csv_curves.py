"""`logger=csv`: the curves as a table, whole up to its last point at any moment, continued by a run that goes on.

Lightning's own logger for CSV writes now and then, and begins anew what is there.
"""

from pathlib import Path
from typing import Any, Dict, Optional

from omegaconf import OmegaConf
from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only

from lit_glm.runs.tables import Table

COLUMNS = (
    "step", "train/loss", "train/lr", "train/grad_norm", "perf/p_core", "perf/p_train", "perf/p_whole", "val/acc",
    "mem/gib",
)  # fmt: skip


class CSVCurves(Logger):
    """RUN_DIR/csv/metrics.csv, and hparams.yaml beside it."""

    def __init__(self, save_dir: str, keep_steps: Optional[int] = None) -> None:
        """Describe the table.

        Args:
            save_dir: the run folder.
            keep_steps: points up to this step stay; None: begin anew.
        """
        super().__init__()
        self._folder, self._keep = Path(save_dir) / "csv", keep_steps
        self._table: Optional[Table] = None

    @property
    def name(self) -> str:
        """Of the logger."""
        return "csv"

    @property
    def version(self) -> str:
        """A run has one."""
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Write them down."""
        self._folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(OmegaConf.create(dict(params)), self._folder / "hparams.yaml")

    @rank_zero_only
    def log_metrics(self, metrics: Dict[str, float], step: Optional[int] = None) -> None:
        """A line of the table."""
        if self._table is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._table = Table(self._folder / "metrics.csv", COLUMNS, self._keep)
        self._table.add(step=step, **{name: value for name, value in metrics.items() if name in COLUMNS})
