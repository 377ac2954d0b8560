"""The page of `mae compare` in a real browser, without a network: charts are drawn, and the switch changes their axis."""

import shutil
import subprocess
from pathlib import Path

import pytest

from pipeline.reporting.comparison.page import render_page
from pipeline.reporting.comparison.values import Comparison, Curve, RunRow, Spread

pytestmark = pytest.mark.system
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
AFTER = """
<script>
window.onerror = (message) => document.body.setAttribute("data-error", message);
Promise.all(drawn).then(async () => {
  const labels = () => [...document.querySelectorAll("#chart-loss .role-axis-label text")].map((one) => one.textContent).join(" ");
  document.body.setAttribute("data-before", labels());
  document.querySelector("input[value=steps]").click();
  await Promise.all(curves.map((view) => view.runAsync()));
  document.body.setAttribute("data-after", labels());
});
</script>
</body>"""


def browsed(page: Path, *flags: str) -> str:
    """Return the document as it stands after the page's scripts have run; no name is resolved, so nothing can be fetched."""
    call = [
        CHROMIUM,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=20000",
        "--window-size=1300,2400",
    ]
    offline = ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={page.parent / 'profile'}"]
    done = subprocess.run(
        [*call, *offline, *flags, page.as_uri()], capture_output=True, text=True, check=True, timeout=120
    )
    return done.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")
def test_charts_are_drawn_and_the_switch_changes_their_axis(tmp_path):
    names = ("half", "three quarters")
    scores = {
        f"knn/toy/{encoder}": Spread(mean=0.5, sd=0.1, n=2, values=(0.4, 0.6)) for encoder in ("pretrained", "random")
    }
    curves = [
        Curve(run=name, images=[6400.0, 12800.0], steps=[100, 200], hours=[1.0, 2.0], loss=[1.0, 0.5], milestones={})
        for name in names
    ]
    html = render_page(Comparison(rows=[RunRow(name=name, scores=scores) for name in names], curves=curves))
    page = tmp_path / "index.html"
    own, _, rest = html.rpartition("</body>")  # the runtime has this word too
    page.write_text(own + AFTER + rest)
    document = browsed(page, "--dump-dom")
    body = document.partition("<body")[2].partition(">")[0]
    assert 'data-drawn="2"' in body, body
    assert "data-error" not in body
    assert "10k" in body.partition("data-before=")[2].partition("data-after=")[0]
    assert "200" in body.partition("data-after=")[2]
    assert "10k" not in body.partition("data-after=")[2]
    assert document.count('class="marks"') == 2
    browsed(page, f"--screenshot={tmp_path / 'page.png'}")
    assert (tmp_path / "page.png").stat().st_size > 20_000
