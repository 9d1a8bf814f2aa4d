import subprocess
import sys
from pathlib import Path

import pytest

from conftest import lit_glm_here
from lit_glm.errors import InputError
from lit_glm.runs.run_folder import is_running, lock_directory


def test_run_folder_lock_is_exclusive(tmp_path: Path) -> None:
    with lock_directory(tmp_path / "run"):
        assert is_running(tmp_path / "run")
        with pytest.raises(InputError, match="in use by another process"), lock_directory(tmp_path / "run"):
            pass
    assert not is_running(tmp_path / "run")
    with lock_directory(tmp_path / "run"):
        pass


def test_a_killed_process_leaves_no_lock(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from lit_glm.runs.run_folder import lock_directory
with lock_directory(Path({str(tmp_path)!r})):
    print("inside", flush=True)
    input()
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "inside\n"
    assert is_running(tmp_path)
    process.kill()
    process.wait()
    assert not is_running(tmp_path)


@pytest.mark.process
def test_train_rejects_the_folder_of_a_running_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """And leaves the live run's files alone; run.resume=auto does not take a live run for an unfinished one."""
    monkeypatch.chdir(tmp_path)
    debug = ["experiment=debug", "run.max_steps=2", "topology=1x1"]
    with lock_directory(tmp_path / "live"):
        (tmp_path / "live" / "steps.csv").write_text("the live run's")
        assert lit_glm_here("train", *debug, "hydra.run.dir=live") == 2
        assert "live: is not a run folder (no job.json) but contains steps.csv" in capfd.readouterr().err
        (tmp_path / "live" / "job.json").write_text("{}")
        assert lit_glm_here("train", *debug, "hydra.run.dir=live") == 2
        assert "live: in use by another run" in capfd.readouterr().err
        assert (tmp_path / "live" / "steps.csv").read_text() == "the live run's"
    assert lit_glm_here("train", *debug, "hydra.run.dir=outputs/a/b") == 0
    result = tmp_path / "outputs" / "a" / "b" / "result.json"
    result.write_text(result.read_text().replace('"finished"', '"running"'))
    with lock_directory(result.parent):
        assert lit_glm_here("train", *debug, "run.resume=auto") == 0
    assert len(list((tmp_path / "outputs").rglob("result.json"))) == 2  # a new run
