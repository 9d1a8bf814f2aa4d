"""mlperf.log keeps its rules, and the checker of the mlperf-logging package says when one does not."""

from pathlib import Path

import pytest

from conftest import lit_glm

pytest.importorskip("mlperf_logging")

from lit_glm.bench import mlperf


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mlperf")
    done = lit_glm("train", "experiment=debug", "callbacks=mlperf", "hydra.run.dir=run", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "run" / mlperf.FILE


def test_a_run_keeps_the_rules_and_claims_no_submission(log: Path) -> None:
    assert mlperf.check(log)
    text = log.read_text()
    assert "submission_" not in text
    for key in ("init_start", "init_stop", "run_start", "epoch_start", "eval_accuracy", "run_stop"):
        assert f'"key": "{key}"' in text


@pytest.mark.parametrize(
    ("found", "instead"),
    [
        ('"key": "run_stop"', '"key": "other"'),
        ('"key": "global_batch_size"', '"key": "other"'),
        ('"status": "aborted"', '"status": "success"'),
        ('"key": "run_start"', '"key": "other"'),
    ],
)
def test_a_log_that_breaks_a_rule_is_found_out(log: Path, tmp_path: Path, found: str, instead: str) -> None:
    text = log.read_text()
    assert found in text
    broken = tmp_path / "broken.log"
    broken.write_text(text.replace(found, instead))
    assert not mlperf.check(broken)
