"""Small answers of the commands: which store `mae ui` opens, addresses without a scheme, a plan without credentials."""

import pytest
from run_kit import document, mae, write_config
from typer.testing import CliRunner

from jobs.cli import app


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    stores: list[str] = []
    monkeypatch.setattr("pipeline.tracking.serve", lambda uri, **_: stores.append(uri))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return stores


def test_ui_shows_the_demo_only_where_there_is_nothing_else(tmp_path, monkeypatch, opened):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".demo/store").mkdir(parents=True)
    done = CliRunner().invoke(app, ["ui"])
    assert (done.exit_code, "shows the demo's runs in .demo/store" in done.output) == (0, True)
    assert str(tmp_path / ".demo/store") in opened[-1]
    (tmp_path / ".mae/store").mkdir(parents=True)
    assert "demo" not in CliRunner().invoke(app, ["ui"]).output
    assert str(tmp_path / ".mae/store") in opened[-1]


def test_an_address_without_a_scheme_is_the_dashboards(monkeypatch):
    asked: list[str] = []
    monkeypatch.setattr("pipeline.cluster.jobs.list_runs", lambda *, address: asked.append(address) or [])
    for address in ("127.0.0.1:8299", "http://127.0.0.1:8299"):
        assert CliRunner().invoke(app, ["job", "list", "--address", address]).exit_code == 0
    assert asked == ["http://127.0.0.1:8299"] * 2


def test_a_plan_without_credentials_says_so_and_is_exit_code_2(tmp_path):
    path = write_config(tmp_path / "run.yaml", document(tmp_path / "store", "s3://bucket/images"))
    away = {"AWS_EC2_METADATA_DISABLED": "true", "AWS_DEFAULT_REGION": "eu-west-1"}
    files = {"AWS_CONFIG_FILE": str(tmp_path / "none"), "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none")}
    done = mae("plan", path, **away, **files)
    assert (done.returncode, done.stdout) == (2, "")
    assert "credentials" in done.stderr.splitlines()[-1]
