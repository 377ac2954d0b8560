"""What a person sees in MLflow: a real server's pages in headless Chromium, after two runs on the same data.

Screenshots are kept in `.artifacts/mlflow/` of the checkout; look at them after a change of MLflow's version."""

import json
import re
import shutil
from typing import NamedTuple

import pytest
from mlflow_kit import Server
from run_kit import ROOT, Silent, document, write_config, write_images

from pipeline import tracking
from pipeline.config import load_config
from pipeline.runs.run import run_pipeline
from pipeline.tracking import names

pytestmark = pytest.mark.system
playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SHOTS = ROOT / ".artifacts" / "mlflow"
WAIT_MS = 60_000


class Runs(NamedTuple):
    """Two runs in an experiment of a server."""

    server: str
    experiment_id: str
    ids: tuple[str, str]
    titles: tuple[str, str]

    @property
    def experiment(self) -> str:
        return f"{self.server}/#/experiments/{self.experiment_id}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    store = folder / "store"
    content = document(store, write_images(folder / "images", 60))
    content["evaluation"]["seeds"] = 2
    path = write_config(folder / "run.yaml", content)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        overrides = ([], ["model.mask_ratio=0.5"], [])  # the third is the first one again, with everything cached
        ids = [
            run_pipeline(load_config(path, more), executor="in_process", display=Silent()).run_id for more in overrides
        ]
    assert ids[2] == ids[0]
    with Server(store) as server:
        server.start()
        client = tracking.client_of(server.address)
        found = [client.get_run(run_id).info for run_id in ids[:2]]
        yield Runs(server.address, found[0].experiment_id, (ids[0], ids[1]), (found[0].run_name, found[1].run_name))


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium on PATH: apt-get install chromium")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser, request):
    opened = browser.new_page(viewport={"width": 1600, "height": 2000})
    opened.set_default_timeout(WAIT_MS)
    yield opened
    SHOTS.mkdir(parents=True, exist_ok=True)
    opened.screenshot(path=SHOTS / f"{request.node.name.removeprefix('test_')}.png")
    opened.close()


def see(page, *texts: str | re.Pattern[str]) -> None:
    """Fail unless each text becomes visible."""
    for text in texts:
        page.get_by_text(text).first.wait_for(state="visible")


def test_the_list_tells_the_runs_apart(page, runs):
    page.goto(f"{runs.experiment}/runs")
    see(page, "mae-toy", "Training runs", *runs.titles)
    assert len(set(runs.titles)) == 2
    assert "tiny mask_ratio=0.5 · toy · ViT 12x1/4" in runs.titles[1]
    see(page, re.compile(r"^toy \("), "mae run")  # dataset and source
    assert (
        page.get_by_role("link", name=re.compile("^tiny")).count() == 2
    )  # a run that was started again has no second row


def test_one_run_says_what_it_is_and_what_came_out(page, runs):
    page.goto(f"{runs.experiment}/runs/{runs.ids[0]}")
    see(page, runs.titles[0], "Finished", re.compile(r"^toy \("), "Training And Evaluation", "mae run")
    see(page, "mae.data", "mae.size", "mae.differs", "ViT 12x1/4")
    see(page, "Registered models")
    see(page, "Done.", re.compile("pretrained on toy, 2 epochs"))
    page.get_by_text("Show more").click()
    see(
        page, "To go on, or to run it again", "mae run config.yaml", "protocol", re.compile(r"^\d+\.\d ± \d+\.\d %\s*$")
    )
    see(page, "pretrain/loss", "pretrain/final_loss", "score/linear/toy/pretrained", "score_sd/linear/toy/pretrained")
    page.get_by_role("link", name="finetune-toy-random-s1").first.wait_for(state="visible")


def test_the_charts_of_a_run_have_the_curve_of_pretraining(page, runs):
    page.goto(f"{runs.experiment}/runs/{runs.ids[0]}/model-metrics")
    see(page, "pretrain", "final_loss", "images_per_s", "score/linear/toy")
    chart = page.get_by_test_id("experiment-view-compare-runs-card").filter(has=page.get_by_text("loss", exact=True))
    chart.locator(".scatterlayer .trace").first.wait_for(state="attached")  # a line, where other metrics have a bar


def test_the_charts_of_the_list_lay_the_curves_over_each_other(page, runs):
    page.goto(f"{runs.experiment}/runs?compareRunsMode=CHART")
    see(page, "pretrain/loss")
    page.locator(".scatterlayer .trace").nth(1).wait_for(state="attached")


def test_the_compare_page_shows_what_differs(page, runs):
    ids, experiments = json.dumps(runs.ids), json.dumps([runs.experiment_id])
    page.goto(f"{runs.server}/#/compare-runs?runs={ids}&experiments={experiments}".replace(" ", ""))
    see(page, "Comparing 2 Runs from 1 Experiment", *runs.titles)
    page.get_by_text("Show diff only").first.click()
    see(page, "model.mask_ratio", "pretrain/final_loss", "score/finetune/toy/pretrained")
    assert not page.get_by_text("data.min_shards").count()


def test_the_pictures_are_among_the_artifacts(page, runs):
    page.goto(f"{runs.experiment}/runs/{runs.ids[0]}/artifacts/report/reconstructions.png")
    see(page, "config.yaml", "reconstructions.png", "scores.png")
    page.locator("img").first.wait_for(state="visible")


def test_the_model_has_its_aliases(page, runs):
    page.goto(f"{runs.server}/#/models/tiny")
    see(page, re.compile(names.BEST_LINEAR_ALIAS), re.compile(names.NEWEST_ALIAS), "Version 2")
