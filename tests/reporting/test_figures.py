"""Every figure: no formulas, no texts over each other, none outside of the canvas."""

import itertools
import json
from pathlib import Path
from typing import Any, Dict, List

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from conftest import lit_glm_here
from lit_glm.hardware.device_monitor import COLUMNS
from lit_glm.report import main as report
from lit_glm.reporting.plots import plot_trials
from reporting.folders import make_run

_TOUCH = 1.0  # pixels


def faults(figure: Figure) -> List[str]:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    hidden = set()  # labels of ticks beyond the limits, which are not drawn
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            margin = 1e-9 * (high - low)
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                if not low - margin <= tick.get_loc() <= high + margin:
                    hidden.update((tick.label1, tick.label2))
    boxes = {
        text: text.get_window_extent(renderer)
        for text in figure.findobj(Text)
        if text.get_text().strip() and text.get_visible() and text not in hidden
    }
    said = [f"formula {text.get_text()!r}" for text in boxes if "$" in text.get_text()]
    bounds = figure.bbox.padded(_TOUCH)
    said += [
        f"outside {text.get_text()!r}"
        for text, box in boxes.items()
        if not (bounds.x0 <= box.x0 and box.x1 <= bounds.x1 and bounds.y0 <= box.y0 and box.y1 <= bounds.y1)
    ]
    for (one, left), (other, right) in itertools.combinations(boxes.items(), 2):
        width = min(left.x1, right.x1) - max(left.x0, right.x0)
        height = min(left.y1, right.y1) - max(left.y0, right.y0)
        if width > _TOUCH and height > _TOUCH and one.axes is other.axes:
            said.append(f"{one.get_text()!r} over {other.get_text()!r}")
    return said


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Dict[str, List[str]]:
    """Faults of each figure that is saved, by its number."""
    found: Dict[str, List[str]] = {}
    real = Figure.savefig

    def savefig(figure: Figure, *arguments: Any, **more: Any) -> None:
        real(figure, *arguments, **more)
        found[str(len(found))] = faults(figure)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return found


@pytest.mark.parametrize("language", ["en", pytest.param("zh", marks=pytest.mark.slow)])
def test_report_figures_have_no_overlapping_text(
    language: str, drawn: Dict[str, List[str]], tmp_path: Path, capfd: Any
) -> None:
    for bs, lr in ((4, "1e-5"), (5, "1e-5"), (4, "2e-5"), (5, "2e-5")):
        run = make_run(tmp_path / f"{bs}{lr}", f"bs={bs}", f"lr={lr}", simulated=bs == 4)
        lines = [f"{time},0,{card},20.5,{300 + card},60,90" for time in range(0, 60, 5) for card in range(8)]
        (run / "devices.csv").write_text(",".join(COLUMNS) + "\n" + "\n".join(lines))
    assert report([str(tmp_path), "--format", "html", "--lang", language]) == 0
    capfd.readouterr()
    assert len(drawn) >= 8
    assert [text for texts in drawn.values() for text in texts] == []


@pytest.mark.slow
def test_plan_figure_has_no_overlapping_text(
    drawn: Dict[str, List[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert lit_glm_here("plan", "hardware=r300,a100", "topology=1x1,2x8", "hydra.run.dir=plan") == 0
    assert drawn == {"0": []}
    picture = Path("plan/plan.svg").read_text()
    for chip in ("r300", "a100"):
        assert picture.count(f"{chip}, scoring=published<") == 1  # no legend twice
    rows = json.loads(Path("plan/plan.json").read_text())
    assert [row["samples"] for row in rows] == [76_800] * 4
    assert "76,800 samples, as in the published R300 1x8 run" in Path("plan/plan.md").read_text()


def test_tune_figure_has_no_overlapping_text(drawn: Dict[str, List[str]]) -> None:
    rates = {2**power: [20.0 * (power + 1)] for power in range(8)}
    plot_trials(rates, [256], "cpu 1x1 fp32 shared_context")
    assert drawn == {"0": []}
