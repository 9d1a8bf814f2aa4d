"""The page in a real browser: it shows what it holds, on a desk, a phone and paper, and loads nothing."""

import base64
import hashlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from lit_glm.report import main
from reporting.folders import make_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars"
).split()
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt-get install chromium)")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    for number, (bs, lr) in enumerate([(4, "1e-5"), (4, "2e-5"), (5, "1e-5"), (5, "2e-5")]):
        make_run(
            folder / "runs" / str(number), f"bs={bs}", f"lr={lr}", p_core=4.0 + number, environment={"host": "<b>x"}
        )
    make_run(folder / "runs" / "simulated", "topology=2x8", simulated=True)
    out = ["--format", "html", "--lang", "en,zh", "--out", str(folder)]
    assert main([str(folder / "runs"), *out]) == 0
    return folder


def browse(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [str(CHROMIUM), *QUIET, f"--user-data-dir={folder}/profile", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("language", ["en", "zh"])
def test_page_loads_no_external_resources(page: Path, language: str) -> None:
    text = (page / f"report.{language}.html").read_text(encoding="utf-8")
    assert all(place.startswith(("#", "data:")) for place in re.findall(r"""(?:src|href)=["']?([^"'> ]*)""", text))
    assert "@import" not in text
    assert text.count("<script") == 1  # the page's own, which its policy allows by the hash
    own = text[text.index("<script>") + len("<script>") : text.index("</script>")]
    digest = base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()
    assert f"script-src &#39;sha256-{digest}&#39;" in text or f"script-src 'sha256-{digest}'" in text
    assert text.count("<svg") == 8


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("language", ["en", "zh"])
def test_page_renders_in_a_browser(page: Path, language: str) -> None:
    shown = browse(page, "--dump-dom", f"file://{page}/report.{language}.html")
    for text in ("p_whole", "bs=5,lr=2e-05", "SIMULATED" if language == "en" else "模拟", "&lt;b&gt;x"):
        assert text in shown, text
    assert shown.count("<figure") == 6


@needs_browser
@pytest.mark.parametrize("size", ["1280,2000", "390,2000"])
def test_page_screenshot_at_any_width(page: Path, size: str) -> None:
    browse(page, f"--screenshot={page}/{size}.png", f"--window-size={size}", f"file://{page}/report.en.html")
    assert (page / f"{size}.png").stat().st_size > 20_000


@needs_browser
def test_page_is_not_wider_than_a_phone_screen(page: Path) -> None:
    """Measured in the page itself, in a frame as wide as a phone."""
    probe = page / "probe.html"
    probe.write_text(
        '<iframe id="f" width="390" height="800" src="report.en.html"></iframe><p id="said">nothing</p><script>'
        "onload=()=>{const d=document.getElementById('f').contentDocument;"
        "document.getElementById('said').textContent='width '+d.documentElement.scrollWidth}</script>"
    )
    shown = browse(page, "--dump-dom", "--allow-file-access-from-files", f"file://{probe}")
    found = re.search(r'id="said">width (\d+)', shown)
    assert found, shown
    assert int(found.group(1)) <= 390


@needs_browser
def test_page_prints_to_pdf(page: Path) -> None:
    browse(page, f"--print-to-pdf={page}/page.pdf", f"file://{page}/report.en.html")
    assert (page / "page.pdf").read_bytes().startswith(b"%PDF")
