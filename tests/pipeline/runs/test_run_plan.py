"""The plan of a run as people read it: why a step runs again."""

import json

from run_kit import document, write_config, write_images

from pipeline.config import load_config
from pipeline.planning.forecast import Assumptions
from pipeline.runs.plan import forecast_run
from pipeline.runs.workflow import build
from pipeline.storage import open_store


def test_a_pretraining_that_the_rounding_of_visible_patches_changed_says_so(tmp_path):
    content = document(tmp_path / "store", write_images(tmp_path / "images", 8))
    config = load_config(write_config(tmp_path / "run.yaml", content), ["model.mask_ratio=0.7"])
    (step,) = (step for step in build(config) if step.name == "pretrain")
    before = step.identity()
    count = before["config"].pop("visible_patches_rounded_down")
    open_store(config.store).write("history/pretrain/0123456789ab.json", json.dumps(before).encode())
    plan = forecast_run(config, Assumptions(hardware="H100"))
    (row,) = (row for row in plan.rows if row.name == "pretrain")
    assert (row.state, row.differs) == (
        "to_run",
        f"{count} visible patches: rounded down, as in the official code, where earlier versions kept one more",
    )
    (as_json,) = (one for one in plan.as_json()["steps"] if one["name"] == "pretrain")
    assert as_json["differs"] == [f"config.visible_patches_rounded_down: absent -> {count}"]
