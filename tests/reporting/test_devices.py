"""Energy, the cards' readings and the verification in the document."""

from pathlib import Path

import pytest

from conftest import lit_glm_here
from lit_glm.check_result import CheckResult
from lit_glm.hardware.device_monitor import COLUMNS
from lit_glm.runs import environment
from reporting.folders import make_run


@pytest.fixture(autouse=True)
def _chdir_to_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def read(path: Path) -> str:
    assert lit_glm_here("report", str(path), "--format", "md,html", "--out", "out") == 0
    return Path("out/report.en.md").read_text() + Path("out/report.en.html").read_text()


@pytest.mark.slow
def test_report_has_device_readings_figure_and_energy_column(tmp_path: Path) -> None:
    run = make_run(tmp_path / "outputs" / "day" / "run", energy_j=7_200_000.0, samples_per_joule=0.0125)
    lines = [f"{5 * number},0,{card},31.5,{140 + card},60,98" for number in range(20) for card in range(8)]
    (run / "devices.csv").write_text(",".join(COLUMNS) + "\n" + "\n".join(lines) + "\n")
    text = read(run)
    assert "energy (kJ)" in text
    assert "7200.0" in text
    assert "0.0125" in text
    assert 'aria-label="Device readings' in text
    assert "power (W)" in text


def test_report_without_readings_omits_figure_and_energy_column(tmp_path: Path) -> None:
    text = read(make_run(tmp_path / "outputs" / "day" / "run"))
    assert "energy (kJ)" not in text
    assert 'aria-label="Device readings' not in text


@pytest.mark.parametrize(
    ("driver", "passed", "said"),
    [
        ("4.0.25", True, "were verified on"),
        ("4.0.25", False, "FAILED"),
        ("5.0", True, "fp32: no verification of this hardware, driver and precision"),
    ],
)
def test_report_row_shows_the_verification_of_its_driver(driver: str, passed: bool, said: str, tmp_path: Path) -> None:
    told = {"hardware": "r300", "driver": driver}
    status = "ok" if passed else "fail"
    environment.write_verification(
        tmp_path / "outputs/verify/day/time", told, [CheckResult("clock", status, "x")], {"fp32": passed}
    )
    assert said in read(make_run(tmp_path / "outputs" / "day" / "run"))


def test_simulated_run_has_no_verification_note(tmp_path: Path) -> None:
    assert "no verification of this hardware" not in read(make_run(tmp_path / "run", simulated=True))
