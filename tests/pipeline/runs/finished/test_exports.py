"""What a run leaves, exported by the command: encoder and classifier, with a card that tells where they come from."""

import json
import re
from pathlib import Path

import pytest
import timm
import torch
import transformers
import yaml
from huggingface_hub import ModelCard
from run_kit import document, migrated_database, write_config, write_images  # noqa: F401 - a fixture
from safetensors.torch import load_file
from typer.testing import CliRunner

from jobs.cli import app
from mae_core import Classifier, ViTEncoder
from pipeline.config import RunConfig, load_config
from pipeline.errors import ConfigError, DataError
from pipeline.runs.finished.pretrainings import pretrain_step
from pipeline.runs.workflow import build
from pipeline.storage import FileStore
from pipeline.weights import read_encoder

CLASSIFIER = "finetune-toy-pretrained-s0"


def invoke(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.stderr
    return result


def export(*arguments):
    return invoke("model", "export", *arguments)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The YAML file of a finished run with two seeds."""
    folder = tmp_path_factory.mktemp("run")
    content = document(folder / "store", write_images(folder / "images", 30))
    content["tracking"] = {"uri": "none"}
    content["evaluation"]["seeds"] = 2
    content["evaluation"]["datasets"][0]["protocols"] = ["linear", "finetune", "rankme"]
    path = write_config(folder / "run.yaml", content)
    invoke("run", path, "--in-process")
    return path


def directory(run, name):
    config = load_config(run)
    (step,) = (step for step in build(config) if step.name == name)
    return FileStore(run.parent / "store").at(step.directory)


def test_the_card_of_an_encoder_tells_where_it_comes_from(run, tmp_path):
    export(run, "--format", "timm", "--out", tmp_path / "timm", "--data-terms", "CC BY 4.0")
    text = (tmp_path / "timm/README.md").read_text()
    card = ModelCard(text)
    assert card.data.library_name == "timm"
    assert {one.metric_name for one in card.data.eval_results} == {
        "top-1 accuracy, linear (2 seeds)",
        "top-1 accuracy, finetune (2 seeds)",
    }
    assert {one.dataset_name for one in card.data.eval_results} == {"toy"}
    sections = dict(re.findall(r"^## (.*?)\n\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE))
    assert list(sections) == ["Use", "Architecture", "Data", "Lineage", "Scores", "Reproduce"]
    assert "| terms | CC BY 4.0 |" in sections["Data"]
    assert f"`{run.parent / 'images'}`" in sections["Data"]
    steps = {step.name: step for step in build(load_config(run))}
    for name in ("pretrain", "shard", "snapshot"):
        assert f"`{steps[name].directory}`" in sections["Lineage"]
    receipt = json.loads(directory(run, "shard").read("receipt.json"))
    assert f"manifest digest `{receipt['facts']['digest']}`" in sections["Lineage"]
    assert steps["pretrain"].fingerprint in sections["Lineage"]
    assert re.search(r"code revision `([0-9a-f]{40}\+?|unknown)`, Python .*torch 2", sections["Lineage"])
    assert re.search(
        r"\| toy \| linear \| [\d.]+ ± [\d.]+ % \| [\d.]+ ± [\d.]+ % \| 2 \| \d+ \| \d+ \|", sections["Scores"]
    )
    assert re.search(r"\| toy \| rankme \(effective rank\) \| [\d.]+ ± [\d.]+ \|", sections["Scores"])


def test_the_configuration_of_a_card_is_the_run_itself(run, tmp_path):
    export(run.parent / "store", "--format", "safetensors", "--out", tmp_path / "own")
    text = (tmp_path / "own/README.md").read_text()
    assert "terms | not stated (`mae model export --data-terms TEXT` writes them here)" in text
    (block,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    again = RunConfig.model_validate(yaml.safe_load(block))
    assert pretrain_step(again).fingerprint == pretrain_step(load_config(run)).fingerprint


@pytest.mark.parametrize("form", ["timm", "hf-vit", "safetensors", "onnx"])
@torch.no_grad()
def test_a_classifier_is_exported_by_name_or_directory(run, tmp_path, form):
    root = directory(run, CLASSIFIER)
    if form == "timm":
        done = export(root.uri, "--format", form, "--out", tmp_path / "out")
    elif form == "hf-vit":
        done = export(run.parent / "store", "--step", CLASSIFIER, "--format", form, "--out", tmp_path / "out")
    else:
        done = export(run, "--step", CLASSIFIER, "--format", form, "--out", tmp_path / "out")
    assert done.stdout.splitlines()[-1] == str(tmp_path / "out" / "config.json")
    config = load_config(run).model.encoder
    ours = Classifier(ViTEncoder(config), num_classes=2, generator=torch.Generator()).eval()
    weights = load_file(Path(root.local_path("g0001/classifier.safetensors")))
    ours.load_state_dict(weights)
    raw = torch.rand(2, 3, *config.image_size, generator=torch.Generator().manual_seed(0))
    pixels = (raw - torch.tensor(config.pixel_mean)[:, None, None]) / torch.tensor(config.pixel_std)[:, None, None]
    if form == "timm":
        logits = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()(pixels)
    elif form == "hf-vit":
        model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
        assert model.config.id2label == {0: "cat", 1: "dog"}
        logits = model(pixel_values=pixels).logits
    elif form == "onnx":
        import onnxruntime

        assert re.search(r"onnxruntime and torch differ by at most \d\.\de-\d\d", done.stderr)
        session = onnxruntime.InferenceSession(tmp_path / "out/model.onnx")
        logits = torch.as_tensor(session.run(None, {"pixels": raw.numpy()})[0])
    else:
        again = load_file(tmp_path / "out/classifier.safetensors")
        assert all(torch.equal(again[name], value) for name, value in weights.items())
        logits = ours(pixels)
    torch.testing.assert_close(logits, ours(pixels), rtol=0, atol=2e-6)
    text = (tmp_path / "out/README.md").read_text()
    assert "classes | 2: cat, dog" in text
    assert f"classifier: `{root.uri.rpartition('/')[2]}`" in text
    assert f"encoder: `{pretrain_step(load_config(run)).directory}`" in text
    (result,) = ModelCard(text).data.eval_results
    facts = json.loads(root.read("receipt.json"))["facts"]
    assert result.metric_value == pytest.approx(100 * facts["top1"], abs=0.01)


def test_what_cannot_be_exported_says_why(run, tmp_path):
    out = ("--out", tmp_path / "out", "--format")
    for arguments, error, text in (
        ((run, "--step", "finetune", *out, "timm"), ConfigError, r"--step finetune: the run has pretrain, linear-toy"),
        ((run, "--step", "linear-toy-pretrained-s0", *out, "timm"), DataError, "which keeps no classifier"),
        ((run, "--step", CLASSIFIER, *out, "hf-vitmae"), ConfigError, "--format hf-vitmae is for a pretraining"),
        ((run, "--step", CLASSIFIER, "--at", 4, *out, "timm"), ConfigError, "--at 4 is for a pretraining"),
        ((run.parent / "store", "--step", "x", *out, "timm"), DataError, "holds no finished step x"),
    ):
        with pytest.raises(error, match=text):
            export(*arguments)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_has_a_card_too(run, tmp_path):
    export(run, "--at", 4, "--format", "hf-vit", "--out", tmp_path / "out")
    assert "checkpoint `g0001/checkpoints/step-00000004`" in (tmp_path / "out/README.md").read_text()


# ---------------------------------------------------------------------------------------------------------------------
# docs/use-the-encoder.md


def test_the_page_on_using_an_encoder_works_as_written(run, tmp_path, monkeypatch):
    """Its Python blocks, in order, on a tiny model; its commands made the folders."""
    page = (Path(__file__).parents[4] / "docs/use-the-encoder.md").read_text()
    commands = re.findall(r"^\$ mae (model export .*?)(?:\s+#.*)?$", page, re.MULTILINE)
    assert len(commands) >= 5
    monkeypatch.chdir(tmp_path)
    for command in commands:
        words = ["store" if word == "STORE" else word for word in command.split()]
        invoke(
            *(run.parent / "store" if word == "store" else str(run) if word == "my.yaml" else word for word in words)
        )
    write_images(tmp_path / "images", 12)
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) >= 6
    names = {}
    for block in blocks:
        exec(compile(block, "use-the-encoder.md", "exec"), names)
    # the same images through four programs
    torch.testing.assert_close(torch.as_tensor(names["mean"]), names["feature"], rtol=0, atol=2e-5)
    weights = read_encoder(FileStore(tmp_path / "encoder"))[1]
    assert set(weights) == set(ViTEncoder(read_encoder(FileStore(tmp_path / "encoder"))[0]).state_dict())
    for other in ("from_timm", "from_transformers", "from_onnx"):
        torch.testing.assert_close(torch.as_tensor(names[other]), names["from_torch"], rtol=0, atol=2e-5)
    assert names["features"].shape == (12, 12)
    assert names["losses"][-1] < names["losses"][0]
