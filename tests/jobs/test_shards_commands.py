"""`mae shards` as a user types it: exit codes, JSON, the picture, and the index of existing tars."""

import csv
import io
import json
from pathlib import Path

import pytest
from data_kit import all_objects, picture, write_tars
from PIL import Image
from run_kit import document, mae, write_config, write_images
from typer.testing import CliRunner

from jobs.groups.shards import app
from pipeline.config import load_config
from pipeline.errors import ConfigError, DataError
from pipeline.runs.finished.datasets import datasets_of, make_datasets
from pipeline.runs.workflow import build


class Silent:
    tracking_uri = ""

    def begin(self, step):
        return ""

    def progress(self, *said):
        pass

    def end(self, outcome):
        assert outcome.error is None


@pytest.fixture
def config(tmp_path):
    """A run whose shards have been made."""
    source = write_images(tmp_path / "images", 40)
    (source / "cat" / "empty.jpg").write_bytes(b"")
    path = write_config(tmp_path / "run.yaml", document(tmp_path / "store", source))
    make_datasets(load_config(path), executor="in_process", hooks=Silent())
    return path


def shards(*arguments):
    """Return exit code and standard output. In this process, since importing torch takes seconds."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout


def test_verify_ends_with_0_when_clean_and_1_when_not(config):
    code, said = shards("verify", config)
    assert (code, "all as written" in said) == (0, True)
    step = datasets_of(load_config(config))[0].step_uri
    assert shards("verify", step)[0] == 0
    tar = next(Path(step.removeprefix("file://")).rglob("*.tar"))
    tar.write_bytes(tar.read_bytes()[:-2000])
    code, said = shards("verify", config, "--workers", 1)
    assert code == 1
    assert "delete receipt, row and shard" in said
    assert str(tar) in said.replace("\n", "")
    code, said = shards("verify", config, "--json")
    line = json.loads(said)
    assert (code, line["clean"], line["findings"][0]["damage"]) == (1, False, "cut")
    assert tar.as_uri() in line["findings"][0]["delete"]


@pytest.mark.system
def test_verify_from_a_shell_on_a_cluster(config):
    step = datasets_of(load_config(config))[0].step_uri
    next(Path(step.removeprefix("file://")).rglob("*.tar")).unlink()
    done = mae("shards", "verify", config, "--workers", 2, "--json")
    assert done.returncode == 1, done.stderr
    assert json.loads(done.stdout)["findings"][0]["damage"] == "missing"
    assert "Traceback" not in done.stderr


def test_inspect_draws_and_tells(config, tmp_path):
    code, said = shards("inspect", config, "--out", tmp_path / "new" / "look.png", "--samples", 9)
    assert code == 0
    assert "quarantine  empty  1\n  cat/empty.jpg  0 bytes" in said
    with Image.open(tmp_path / "new" / "look.png") as drawn:
        assert drawn.width > 1000
    before = (tmp_path / "new" / "look.png").read_bytes()
    assert shards("inspect", config, "--out", tmp_path / "new" / "look.png", "--samples", 9) == (0, said)
    assert (tmp_path / "new" / "look.png").read_bytes() == before
    _, said = shards("inspect", config, "--out", tmp_path / "test.png", "--split", "test")
    assert "\ntest" in said
    assert "\ntrain" not in said


def test_inspect_lists_every_near_duplicate_pair(tmp_path):
    for name, number in {"train/cat/1": 0, "train/dog/2": 1, "test/cat/3": 2, "test/dog/4": 0}.items():
        path = tmp_path / "images" / f"{name}.jpg"
        path.parent.mkdir(parents=True)
        path.write_bytes(picture(number))
    run = write_config(tmp_path / "run.yaml", document(tmp_path / "store", tmp_path / "images"))
    make_datasets(load_config(run), executor="in_process", hooks=Silent())
    table = tmp_path / "new" / "leaks.csv"
    code, said = shards("inspect", run, "--out", tmp_path / "look.png", "--leaks", table)
    assert code == 0
    assert (
        "copies across splits  1 images are in several splits, byte for byte, 1 of them with different labels" in said
    )
    assert (
        "1 of 2 images of val and test seem to be copies of one of train (1 pixel for pixel, 1 with another label)"
        in said
    )
    assert f"leaks    {table}  1 pairs" in said
    (pair,) = csv.DictReader(table.open())
    assert (pair["held_out"], pair["train"]) == ("test/dog/4.jpg", "train/cat/1.jpg")
    assert (pair["held_out_label"], pair["train_label"], pair["similarity"]) == ("dog", "cat", "0.999")


def test_wrong_input_is_refused_with_a_reason(config, tmp_path):
    with pytest.raises(ConfigError, match="--split 'dev' is none of this dataset's: write test or train"):
        shards("inspect", config, "--split", "dev", "--out", tmp_path / "x.png")
    with pytest.raises(ConfigError, match="--set changes a configuration"):
        shards("verify", tmp_path / "store", "--set", "data.seed=1")
    with pytest.raises(DataError, match="shards of this configuration do not exist yet"):
        shards("verify", config, "--set", "data.seed=1")
    assert not (tmp_path / "x.png").exists()


def test_index_leaves_the_tars_and_a_run_goes_on_from_it(tmp_path):
    tars = {
        f"train-{name}.tar": [
            *[(f"{name}{number}.jpg", picture(10 * name + number)) for number in range(6)],
            (f"{name}9.txt", b"no image"),
        ]
        for name in range(2)
    }
    source = write_tars(tmp_path / "tars", tars)
    before = all_objects(source)
    code, said = shards("index", source, "--store", tmp_path / "store", "--set", "data.bad_share_stop=0.5")
    assert code == 0
    assert "quarantine  no_image  2\n  train-0.tar/09  only txt" in said
    assert "12 of 12 images kept their bytes" in said
    assert all_objects(source) == before
    assert not [key for key in all_objects(tmp_path / "store") if key.endswith(".tar")]
    written = all_objects(tmp_path / "store")
    assert shards("index", source, "--store", tmp_path / "store", "--set", "data.bad_share_stop=0.5") == (0, said)
    again = all_objects(tmp_path / "store")
    assert again == written  # a re-run writes nothing
    run = {"store": str(tmp_path / "store"), "data": {"source": source}, "model": {"size": "large"}}
    config = load_config(write_config(tmp_path / "run.yaml", run))
    step = next(step for step in build(config) if step.name == "shard")
    assert datasets_of(config)[0].receipt.fingerprint == step.fingerprint
    assert shards("verify", tmp_path / "run.yaml")[0] == 0


def test_index_refuses_images_before_it_writes(tmp_path):
    source = write_images(tmp_path / "images", 3)
    with pytest.raises(
        ConfigError, match=r"holds images \(cat/0000\.png\), and only tars are indexed: `mae run` takes"
    ):
        shards("index", source, "--store", tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_the_picture_is_a_png(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shards("inspect", config, "--samples", 1)[0] == 0
    (picture,) = tmp_path.glob("shards-*.png")  # named by the dataset, so that another dataset's picture stays
    assert Image.open(io.BytesIO(picture.read_bytes())).format == "PNG"
