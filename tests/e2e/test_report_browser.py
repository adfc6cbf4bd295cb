"""The report as a browser sees it: Chromium without a window lays the page out and hands back what it built."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape

import pytest

from sparsmith.reporting import write_report
from tests.kit.runfolder import make_run
from tests.kit.softfolder import make_soft_run

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on this machine (Debian: apt-get install chromium)"
)
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--host-resolver-rules=MAP * ~NOTFOUND",
]  # fmt: skip

# A page that measures another one: it is put at the end of a copy of the report, so that layout can be asked for without a driver.
PROBE = """<script>
const page = document.documentElement, wide = [...document.querySelectorAll('main *')].filter(e => !e.closest('svg, .scroll') &&
  e.getBoundingClientRect().right > page.clientWidth + 1).map(e => e.tagName + '.' + e.className);
const small = [...document.querySelectorAll('figure svg')].filter(e => e.getBoundingClientRect().height < 60).length;
const asked = performance.getEntriesByType('resource').length;
document.body.dataset.seen = JSON.stringify({scroll: page.scrollWidth, client: page.clientWidth, wide, small, asked,
  svgs: document.querySelectorAll('figure svg').length, paths: document.querySelectorAll('figure svg path').length,
  tables: document.querySelectorAll('table').length, samples: document.querySelectorAll('.sample').length,
  scripts: document.querySelectorAll('script').length, images: document.querySelectorAll('img').length});
</script>"""


def browse(page, profile, *more: str) -> str:
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", *more, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, check=True).stdout


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    runs = [make_run(root / "dense-lora", control=True, seed=1, lift=0.8), make_run(root / "pesc")]
    return write_report(runs, root / "report.html")


def laid_out(page, folder, width):
    """What the probe saw in a window of that width."""
    probed = folder / "probed.html"
    probed.write_text(page.read_text(encoding="utf-8").replace("</body>", PROBE + "</body>"), encoding="utf-8")
    dom = browse(probed, folder / "profile", f"--window-size={width},900", "--dump-dom")
    seen = json.loads(unescape(re.search(r'data-seen="(.*?)"', dom).group(1)))
    assert seen["scroll"] <= seen["client"], f"the page is wider than the window: {seen['wide'][:5]}"
    assert seen["small"] == 0
    assert seen["scripts"] == 1, "only the probe's own script"
    assert seen["asked"] == seen["images"] == 0
    return seen


@pytest.mark.parametrize("width", [1280, 500])
def test_figures_tables_and_samples_are_laid_out(report, tmp_path, width):
    seen = laid_out(report, tmp_path, width)
    assert seen["svgs"] == 11 and seen["paths"] > 500
    assert seen["tables"] >= 12 and seen["samples"] == 3


@pytest.mark.parametrize("width", [1280, 500])
def test_a_run_of_many_depths_is_laid_out(tmp_path, width):
    runs = [make_soft_run(tmp_path / "soft"), make_soft_run(tmp_path / "longer", lift=1.1, gap=0.05)]
    seen = laid_out(write_report(runs, tmp_path / "report.html"), tmp_path, width)
    assert seen["svgs"] >= 10 and seen["tables"] >= 16


def test_the_page_as_the_browser_holds_it(report, tmp_path):
    dom = browse(report, tmp_path / "profile", "--dump-dom")
    assert "stories-3m, crafted with PESC" in dom and "How many eggs are in 3 boxes?" in dom
    assert not re.search(r'(?:src|href)="(?!#|data:image/png)|https?://', dom)
    assert "<script" not in dom


def test_a_picture_of_it_is_not_blank(report, tmp_path):
    picture = tmp_path / "report.png"
    browse(report, tmp_path / "profile", "--window-size=1280,2000", f"--screenshot={picture}")
    from matplotlib.image import imread

    pixels = imread(picture)[..., :3]
    assert pixels.shape[:2] == (2000, 1280)
    assert len({tuple(pixel) for pixel in (pixels[::7, ::7].reshape(-1, 3) * 255).astype(int)}) > 40
