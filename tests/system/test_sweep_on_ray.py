"""A sweep on a real Ray: its pretrainings run side by side, and `mae run` of a member finds everything cached."""

import json

import pytest
from run_kit import document, mae, write_config, write_images

pytestmark = pytest.mark.system


def test_pretrainings_run_side_by_side_and_mae_run_finds_a_member_cached(tmp_path):
    content = document(tmp_path / "store", write_images(tmp_path / "images", 60))
    content["evaluation"]["datasets"] = [{"name": "toy", "protocols": ["linear"]}]
    content["pretrain"]["epochs"] = 60  # several seconds, longer than the start of a worker differs from another's
    content["resources"] |= {"cpus_per_worker": 0.5}
    path = write_config(tmp_path / "run.yaml", content | {"tracking": {"uri": "none"}})
    done = mae("sweep", path, "--grid", "model.mask_ratio=0.5,0.75", "--json", timeout=600)
    assert done.returncode == 0, done.stderr
    members = json.loads(done.stdout.splitlines()[-1])["members"]
    assert [member["verdict"] for member in members] == ["done", "done"]
    receipts = [json.loads(one.read_text()) for one in (tmp_path / "store").glob("pretrain-*/receipt.json")]
    (began, ended), (other_began, other_ended) = (
        (r["made"]["time"] - r["made"]["seconds"], r["made"]["time"]) for r in receipts
    )
    assert max(began, other_began) < min(ended, other_ended)
    run = mae("run", path, "--set", "model.mask_ratio=0.75", "--json")
    assert {step["state"] for step in json.loads(run.stdout.splitlines()[-1])["steps"]} == {"cached"}
