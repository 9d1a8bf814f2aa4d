"""A device's first day: what the time allows is measured, the rest is listed."""

import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "bring_up.sh"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chip", "minutes"), [(["hardware=cpu"], "0.4"), (["hardware=r300", "hardware.runtime=simulated"], "0.2")]
)
def test_a_page_of_what_the_time_allows(chip: "list[str]", minutes: str, tmp_path: Path) -> None:
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
