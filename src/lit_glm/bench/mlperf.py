"""`callbacks=mlperf`: the run as lines of MLPerf's log format, in mlperf.log beside the others.

GLM on ReCoRD is no MLPerf benchmark, and nothing here claims a submission (no `submission_` key is written): it is the
format alone, for tools that read it. The rules a log must keep are in mlperf_rules.yaml; MLPerf's own checker checks:

    python -m lit_glm.bench.mlperf RUN_DIR/mlperf.log

| event of the recorder | key                                 |
| --------------------- | ----------------------------------- |
| SUBMIT_INFO           | hyperparameters                     |
| INIT_START, INIT_END  | init_start, init_stop               |
| INIT_EVALUATION       | eval_start, eval_stop, eval_accuracy |
| TRAIN_START           | run_start                           |
| EPOCH_BEGIN, _END     | epoch_start, epoch_stop             |
| EVALUATE              | eval_start, eval_stop, eval_accuracy |
| FINISHED              | run_stop: success or aborted        |
"""

import logging
import sys
from pathlib import Path
from typing import Any, Optional

import pytorch_lightning as pl

from lit_glm.bench.recorder import recorder_of
from lit_glm.config.schema import TrainConfig

RULES = Path(__file__).with_name("mlperf_rules.yaml")
FILE = "mlperf.log"


class MLPerfLog(pl.Callback):
    """Listens to the recorder, on the first rank."""

    def __init__(self) -> None:
        from mlperf_logging.mllog.mllog import MLLogger  # missing, it is missed at start and not after training

        self._lines = logging.Logger("lit_glm.mlperf", logging.INFO)
        self._log = MLLogger(self._lines)
        self._config: Optional[TrainConfig] = None

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Open the file and listen."""
        if not trainer.is_global_zero:
            return
        recorder = recorder_of(trainer)
        self._config = recorder.config
        self._lines.addHandler(logging.FileHandler(str(Path(trainer.default_root_dir) / FILE), encoding="utf-8"))
        recorder.events.listeners.append(self.event)

    def event(self, name: str, value: Any, now: int) -> None:
        """Write down what an event of the recorder means."""
        log = self._log
        if name == "SUBMIT_INFO":
            self._parameters(value, now)
        elif name == "INIT_START":
            log.start("init_start", time_ms=now)
        elif name == "INIT_END":
            log.end("init_stop")
        elif name == "TRAIN_START":
            log.start("run_start")
        elif name == "EPOCH_BEGIN":
            log.start("epoch_start", metadata={"epoch_num": value["epoch"]})
        elif name == "EPOCH_END":
            log.end("epoch_stop", metadata={"epoch_num": value["epoch"]})
        elif name in ("EVALUATE", "INIT_EVALUATION"):
            assert self._config is not None
            where = {"samples_count": value.get("global_steps", 0) * self._config.global_batch}
            log.start("eval_start", metadata=where, time_ms=now - round(1000 * value["time"]))
            log.end("eval_stop", metadata=where, time_ms=now)
            log.event("eval_accuracy", value["eval_accuracy"], metadata=where, time_ms=now)
        elif name == "FINISHED":
            samples = {"samples_count": value["num_trained_samples"]}
            log.end("run_stop", metadata={"status": "success" if value["converged"] else "aborted", **samples})

    def _parameters(self, value: Any, now: int) -> None:
        config = self._config
        assert config is not None
        optimizer = config.optimizer
        for key, entry in {
            "seed": config.seed,
            "global_batch_size": config.global_batch,
            "gradient_accumulation_steps": optimizer.accumulate,
            "train_samples": value["train_examples"],
            "eval_samples": value["eval_examples"],
            "max_sequence_length": config.data.max_seq_length,
            "opt_name": "adamw",
            "opt_base_learning_rate": optimizer.lr,
            "opt_adamw_beta_1": optimizer.beta1,
            "opt_adamw_beta_2": optimizer.beta2,
            "opt_adamw_epsilon": optimizer.eps,
            "opt_adamw_weight_decay": optimizer.weight_decay,
            "opt_gradient_clip_norm": optimizer.clip_grad,
            "opt_learning_rate_warmup_factor": optimizer.warmup,
            "opt_learning_rate_decay_steps": optimizer.lr_decay_iters,
            "target_accuracy": config.run.target_accuracy,
            "scoring": config.scoring.name,
        }.items():
            self._log.event(key, entry, time_ms=now)


def check(path: Path) -> bool:
    """Whether a log keeps the rules; MLPerf's checker says what does not."""
    from mlperf_logging.compliance_checker import mlp_compliance

    checker = mlp_compliance.make_checker("training", "5.0.0", quiet=False, werror=False)
    valid: bool = mlp_compliance.main(str(path), str(RULES), checker)[0]
    return valid


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("python -m lit_glm.bench.mlperf RUN_DIR/mlperf.log")
    kept = check(Path(sys.argv[1]))
    print(f"{sys.argv[1]}: {'keeps' if kept else 'BREAKS'} the rules of {RULES}")
    sys.exit(0 if kept else 1)
