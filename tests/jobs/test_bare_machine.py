"""A machine without Ray, MLflow and boto3, such as a GPU machine with a folder of wheels: a run in one process needs none."""

import json

from run_kit import ROOT, bare_site, document, mae, write_config, write_images


def test_a_run_in_one_process_takes_every_step_and_finds_all_of_them_done(tmp_path):
    site = bare_site(tmp_path)
    content = document(tmp_path / "store", write_images(tmp_path / "images", 60)) | {"tracking": {"uri": "none"}}
    config = write_config(tmp_path / "run.yaml", content)

    def steps() -> dict[str, str]:
        ran = mae("run", config, "--in-process", "--json", PYTHONPATH=f"{site}:{ROOT}")
        assert ran.returncode == 0, ran.stderr
        line = json.loads(ran.stdout)
        assert (line["run"], line["addresses"]["tracking"]) == ("", "none")
        assert line["scores"]["toy"].keys() == {"linear", "finetune"}
        return {step["name"]: step["state"] for step in line["steps"]}

    first = steps()
    assert set(first.values()) == {"done"}
    assert {name.partition("-")[0] for name in first} == {
        "snapshot",
        "shard",
        "pretrain",
        "linear",
        "finetune",
        "report",
    }
    assert set(steps().values()) == {"cached"}
    assert not list(tmp_path.glob("**/mlflow*"))


def test_the_user_interface_of_a_run_without_tracking_is_refused(tmp_path):
    config = write_config(tmp_path / "run.yaml", document("store", "images") | {"tracking": {"uri": "none"}})
    shown = mae("ui", config)
    assert (shown.returncode, shown.stdout) == (2, "")
    assert shown.stderr.startswith("mae: tracking.uri is none")
