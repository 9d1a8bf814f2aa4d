"""A device's first day: what the time allows is measured, the rest is listed."""

import importlib
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "bring_up.sh"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chip", "minutes"), [(["hardware=cpu"], "0.4"), (["hardware=r300", "hardware.runtime=simulated"], "0.2")]
)
def test_bring_up_page_lists_the_steps_within_the_time_limit(chip: "list[str]", minutes: str, tmp_path: Path) -> None:
    out = tmp_path / "page"
    command = ["bash", str(SCRIPT), *chip, "--minutes", minutes, "--out", str(out)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (out / "bring_up.md").read_text()
    assert f"# Bring-up: {' '.join(chip)}" in page
    assert "| debug run" in page
    if "| debug run on the CPU | ok |" in page or "| debug run on the CPU (SIMULATED) | ok |" in page:
        assert "Losses of the debug run (fp32, 10 steps): largest difference from the CPU's" in page
    assert "- conformance tests: not run" in page  # of which the time allows no more, on any machine
    assert ("(SIMULATED)" in page) == (len(chip) > 1)
    if "| ok |" in page:  # on a machine at work elsewhere no run may have ended in time
        assert (out / "report" / "report.en.html").is_file()
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert again.returncode == 2  # what is there stays


@pytest.mark.slow
def test_stop_signal_terminates_the_running_bring_up_step(tmp_path: Path) -> None:
    out = tmp_path / "page"
    command = [sys.executable, str(SCRIPT.with_suffix(".py")), "hardware=cpu", "run.max_steps=1000000"]
    page = subprocess.Popen([*command, "--out", str(out)], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    while not list(out.glob("runs/debug_run/steps.csv")):
        assert page.poll() is None
        time.sleep(0.1)
    while not (steps := psutil.Process(page.pid).children(recursive=True)):
        time.sleep(0.01)
    page.send_signal(signal.SIGTERM)
    page.communicate(timeout=100)
    assert page.returncode == 143
    assert not any(step.is_running() and step.status() != psutil.STATUS_ZOMBIE for step in steps)


def test_bring_up_rejects_keys_set_by_its_steps(tmp_path: Path) -> None:
    command = ["bash", str(SCRIPT), "hardware=cpu", "bs=3", "++model.compile=true", "--out", str(tmp_path / "page")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "lit_glm: bs=3, ++model.compile=true: is set by the steps themselves; leave it out\n"


def test_conformance_step_without_pytest_is_listed_as_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the environment that the quickstart installs."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    bring_up = importlib.import_module("bring_up")
    monkeypatch.setattr(bring_up.importlib.util, "find_spec", lambda name: None if name == "pytest" else name)
    step = bring_up.Step("conformance tests", "kit")
    bring_up.BringUp(tmp_path, [], bring_up.hardware_of([]), 1.0).run(step)
    assert step.status.startswith("not run: needs pytest; ")


def test_losses_that_are_not_finite_are_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    bring_up = importlib.import_module("bring_up")
    steps = [bring_up.Step(name, "train", run_dir=tmp_path / name) for name in ("debug run", "debug run on the CPU")]
    for step, losses in zip(steps, (["0.5", "nan", "0.4"], ["0.5", "0.4", "0.4"])):
        step.run_dir.mkdir()
        rows = [f"{number},0,4,{loss}" for number, loss in enumerate(losses, 1)]
        (step.run_dir / "steps.csv").write_text("\n".join(["step,epoch,samples,loss", *rows]) + "\n")
    (line,) = bring_up._compare_losses(steps)
    assert line == "FAIL: the loss of the debug run (fp32) is not finite on the device from step 2 on."
    steps[0].run_dir = steps[1].run_dir
    assert bring_up._compare_losses(steps)[0].endswith("largest difference from the CPU's 0.")


def test_relative_user_paths_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    with_absolute_path = importlib.import_module("bring_up")._with_absolute_path
    Path("w.pt").touch()
    assert with_absolute_path("model.init_checkpoint=w.pt") == f"model.init_checkpoint='{tmp_path}/w.pt'"
    for other in ("model.init_checkpoint=none.pt", "hardware=w.pt", "data.raw_dir="):
        assert with_absolute_path(other) == other
