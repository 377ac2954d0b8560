"""`mae sweep` as a command: help, wrong input, its JSON line and its plan."""

import json

import pytest
from run_kit import ROOT, document, mae, write_config, write_images
from typer.testing import CliRunner

from jobs.cli import app


@pytest.fixture
def config(tmp_path):
    content = document(tmp_path / "store", write_images(tmp_path / "images", 40))
    content["evaluation"]["datasets"] = [{"name": "toy", "protocols": ["linear"]}]
    return write_config(tmp_path / "run.yaml", content | {"tracking": {"uri": "none"}})


def test_wrong_input_is_told_in_one_line_each_with_exit_code_2(config):
    done = mae("sweep", config, "--grid", "model.mask_ration=0.4,0.5")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == ["mae: --grid: model.mask_ration is not a field; did you mean mask_ratio?"]
    assert not (config.parent / "store").exists()


def test_a_sweep_ends_with_one_line_of_json_and_a_dry_run_then_finds_it_cached(config):
    call = ["sweep", str(config), "--grid", "model.mask_ratio=0.5,0.75", "--json"]
    done = CliRunner().invoke(app, [*call, "--in-process"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["sweep"], found["verdict"]) == ("mask_ratio", "done")
    assert [one["overrides"] for one in found["members"]] == [{"model.mask_ratio": 0.5}, {"model.mask_ratio": 0.75}]
    for member in found["members"]:
        assert member["verdict"] == "done"
        assert member["loss"] > 0
        assert {"pretrained", "random"} == member["scores"]["toy"]["linear"].keys()
    assert "0.75" in done.stderr
    assert found["addresses"]["sweep"] in done.stderr
    planned = json.loads(CliRunner().invoke(app, [*call, "--dry-run"]).stdout)
    assert {step["state"] for one in planned["members"] for step in one["steps"]} == {"cached"}
    more = CliRunner().invoke(app, [*call[:3], "model.mask_ratio=0.5,0.6", "--dry-run"])
    assert "2 members, 9 different steps, 3 of them to run" in more.stdout


def test_a_shipped_sweep_is_planned_for_another_device_without_its_data(tmp_path):
    done = mae(
        "sweep", ROOT / "jobs/configs/ablations/decoder_depth.yaml", "--set", f"data.source={tmp_path}", "--dry-run",
        "--set", f"store={tmp_path / 'store'}", "--hardware", "H100", "--images", "1281167",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "5 members, 24 different steps" in done.stdout
