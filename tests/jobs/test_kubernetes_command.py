"""`mae job submit --kubernetes --dry-run`: what it prints, and what it refuses."""

import pytest
import yaml
from run_kit import MODEL, write_config
from typer.testing import CliRunner

from jobs.cli import app, guarded
from pipeline.config import load_config

PLANTED = "planted-0123456789"


@pytest.fixture
def submit(tmp_path, monkeypatch, capsys):
    """Run the command on a configuration for a bucket; return (exit code, standard output, standard error)."""
    for name in (
        "RAY_API_SERVER_ADDRESS",
        "MLFLOW_TRACKING_URI",
        "AWS_ENDPOINT_URL",
        "AWS_DEFAULT_REGION",
        "AWS_REGION",
    ):
        monkeypatch.delenv(name, raising=False)
    content = {"name": "tiny", "store": "s3://b/mae", "data": {"source": "s3://b/images"}, "model": MODEL}
    config = write_config(tmp_path / "run.yaml", content)

    def run(*options: str) -> tuple[int, str, str]:
        code = 0
        try:
            guarded(lambda: app(["job", "submit", str(config), *options], standalone_mode=False))
        except SystemExit as end:
            code = int(end.code or 0)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def test_the_output_is_yaml_alone_and_its_configuration_is_the_one_given(submit, tmp_path):
    code, out, err = submit("--kubernetes", "--dry-run", "--image", "r/mae:1", "--set", "resources.workers=[2, 3]")
    assert (code, err) == (0, "")
    config, _, job = yaml.safe_load_all(out)
    assert [config["kind"], job["kind"]] == ["ConfigMap", "RayJob"]
    path = tmp_path / "again.yaml"
    path.write_text(config["data"]["run.yaml"])
    assert load_config(path).resources.worker_range == (2, 3)
    assert load_config(path).store == "s3://b/mae"


def test_addresses_travel_and_secrets_do_not(submit, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://objects.example")
    for name in (
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "RAY_AUTH_TOKEN",
        "MLFLOW_TRACKING_TOKEN",
    ):
        monkeypatch.setenv(name, PLANTED)
    _, out, _ = submit("--kubernetes", "--dry-run", "--image", "r/mae:1")
    settings = list(yaml.safe_load_all(out))[1]["data"]
    assert settings == {"MLFLOW_TRACKING_URI": "https://mlflow.example", "AWS_ENDPOINT_URL": "https://objects.example"}
    assert PLANTED not in out


def test_a_password_in_an_address_is_refused_and_not_repeated(submit, monkeypatch):
    code, out, err = submit(
        "--kubernetes", "--dry-run", "--image", "r", "--set", f"tracking.uri=https://me:{PLANTED}@mlflow.example"
    )
    assert (code, out) == (2, "")
    assert "tracking.uri holds a password or key" in err
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"https://me:{PLANTED}@objects.example")
    _, out, second = submit("--kubernetes", "--dry-run", "--image", "r")
    assert "AWS_ENDPOINT_URL holds a password or key" in second
    assert PLANTED not in out + err + second


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kubernetes", "--image", "r"], "add --dry-run, and | kubectl apply -f -"),
        (["--kubernetes", "--dry-run"], "--kubernetes needs --image NAME:TAG"),
        (["--kubernetes", "--dry-run", "--image", "r", "--priority", "low"], "needs --queue NAME"),
        (
            ["--kubernetes", "--dry-run", "--image", "r", "--set", "store=/data/mae"],
            "store = /data/mae is on this machine",
        ),
        (
            ["--kubernetes", "--dry-run", "--image", "r", "--set", "tracking.uri=sqlite:////m.db"],
            "address of an MLflow server",
        ),
        (["--dry-run"], "add --kubernetes"),
        ([], "--address is missing"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line_that_says_what_to_do(submit, options, message):
    code, out, err = submit(*options)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_the_help_lists_the_options_for_pods():
    said = CliRunner().invoke(app, ["job", "submit", "--help"]).stdout
    for option in (
        "--kubernetes",
        "--dry-run",
        "--image",
        "--workers-per-pod",
        "--memory-gib",
        "--queue",
        "--priority",
    ):
        assert option in said
