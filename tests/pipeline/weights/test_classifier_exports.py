"""A fine-tuned classifier in timm, transformers, plain torch and ONNX has the logits that it has here.

Tolerance: float32 on CPU, the same sums in another order; logits are of order 1, and differed by at most 2e-6."""

import json
import re

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
import transformers
from huggingface_hub import ModelCard

from mae_core import Classifier, ViTConfig, ViTEncoder, initialise
from pipeline.errors import ConfigError, PipelineError
from pipeline.storage import FileStore
from pipeline.weights import export_classifier, export_encoder, export_onnx, read_classifier
from pipeline.weights.exports import onnx_format

TOLERANCE = {"rtol": 0, "atol": 2e-5}
CLASSES = ("cat", "dog", "a: long | name")


def encoder_config(side=32, **changes):
    shape = {"image_size": (side, side), "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
    return ViTConfig(**{**shape, "pixel_mean": (0.4, 0.5, 0.6), **changes})


def moved(module):
    """Moves every weight off its start, so that swapped names and forgotten biases would show."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def encoder_of(config):
    encoder = ViTEncoder(config)
    initialise(encoder, generator=torch.Generator().manual_seed(1))
    return moved(encoder)


def classifier_of(config):
    encoder = ViTEncoder(config)
    initialise(encoder, generator=torch.Generator().manual_seed(1))
    return moved(Classifier(encoder, num_classes=len(CLASSES), generator=torch.Generator().manual_seed(2)))


def images(config, count=3):
    """Pixels in 0..1, and the same as the encoder reads them."""
    raw = torch.rand(count, 3, *config.image_size, generator=torch.Generator().manual_seed(3))
    mean, std = torch.tensor(config.pixel_mean)[:, None, None], torch.tensor(config.pixel_std)[:, None, None]
    return raw, (raw - mean) / std


@pytest.mark.parametrize("positions", ["sine_cosine", "learned"])
@torch.no_grad()
def test_timm_and_transformers_have_our_logits(tmp_path, positions):
    config = encoder_config(positions=positions)
    model = classifier_of(config)
    _, pixels = images(config)
    expected = model(pixels)
    assert expected.std() > 0.3
    for to in ("timm", "huggingface", "safetensors"):
        files = export_classifier(FileStore(tmp_path / to), model.state_dict(), config, CLASSES, to=to)
        assert {path.name for path in (tmp_path / to).iterdir()} == set(files)
        assert files[-1] == "config.json"
    theirs = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    torch.testing.assert_close(theirs(pixels), expected, **TOLERANCE)
    assert theirs.pretrained_cfg["label_names"] == list(CLASSES)
    auto = transformers.AutoModelForImageClassification
    theirs, info = auto.from_pretrained(tmp_path / "huggingface", output_loading_info=True)
    assert not any(info.values()), info
    torch.testing.assert_close(theirs.eval()(pixel_values=pixels).logits, expected, **TOLERANCE)
    assert theirs.config.id2label == dict(enumerate(CLASSES))
    found, classes, weights = read_classifier(FileStore(tmp_path / "safetensors"))
    assert (found, classes) == (config, CLASSES)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("to", ["timm", "huggingface", "safetensors"])
@torch.no_grad()
def test_the_card_of_a_classifier_works_as_written(tmp_path, to, monkeypatch):
    config = encoder_config()
    model = classifier_of(config)
    export_classifier(FileStore(tmp_path), model.state_dict(), config, CLASSES, to=to)
    text = (tmp_path / "README.md").read_text()
    card = ModelCard(text).data.to_dict()
    assert card["pipeline_tag"] == "image-classification"
    assert card["library_name"] == {"timm": "timm", "huggingface": "transformers", "safetensors": "pytorch"}[to]
    monkeypatch.chdir(tmp_path)
    _, pixels = images(config)
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        names = {"pixels": pixels}
        exec(block, names)
        logits = names["logits"] if "logits" in names else names["model"](pixels)
        torch.testing.assert_close(logits, model(pixels), **TOLERANCE)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """An encoder and a classifier as ONNX programs; exporting one takes seconds."""
    folder, config = tmp_path_factory.mktemp("onnx"), encoder_config()
    encoder, classifier = encoder_of(config), classifier_of(config)
    one = export_onnx(FileStore(folder / "encoder"), encoder.state_dict(), config)
    export_onnx(FileStore(folder / "classifier"), classifier.state_dict(), config, classes=CLASSES)
    assert one.files == ("model.onnx", "README.md", "config.json")
    assert 0 < one.difference < 1e-5
    return folder, config, encoder, classifier


@torch.no_grad()
def test_onnx_scales_pixels_itself_and_takes_any_batch(exported):
    folder, config, encoder, classifier = exported
    onnx.checker.check_model(onnx.load(folder / "encoder/model.onnx"))
    session = onnxruntime.InferenceSession(folder / "encoder/model.onnx")
    assert [one.name for one in session.get_outputs()] == ["cls", "mean", "patches"]
    logits = onnxruntime.InferenceSession(folder / "classifier/model.onnx")
    for count in (1, 2, 5):
        raw, pixels = images(config, count)
        cls, mean, patches = map(torch.as_tensor, session.run(None, {"pixels": raw.numpy()}))
        torch.testing.assert_close(cls, encoder.encode(pixels, pool="cls"), **TOLERANCE)
        torch.testing.assert_close(mean, encoder.encode(pixels, pool="mean"), **TOLERANCE)
        torch.testing.assert_close(patches, encoder(pixels)[:, 1:], **TOLERANCE)
        (found,) = logits.run(None, {"pixels": raw.numpy()})
        torch.testing.assert_close(torch.as_tensor(found), classifier(pixels), **TOLERANCE)
    stated = json.loads((folder / "classifier/config.json").read_text())
    assert stated["id2label"] == {"0": "cat", "1": "dog", "2": "a: long | name"}
    assert stated["opset"] == onnx.load(folder / "encoder/model.onnx").opset_import[0].version == 18


def test_the_card_of_an_onnx_program_works_as_written(exported, monkeypatch):
    folder, config, _, _ = exported
    for kind, outputs in (("encoder", ("cls", "mean", "patches")), ("classifier", ("logits",))):
        text = (folder / kind / "README.md").read_text()
        assert re.search(r"Opset 18\. Checked with onnxruntime .* the largest difference is \d", text)
        assert ModelCard(text).data.to_dict()["library_name"] == "onnx"
        (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        monkeypatch.chdir(folder / kind)
        names = {"pixels": np.zeros((2, 3, *config.image_size), np.float32)}
        exec(block, names)
        assert all(len(names[output]) == 2 for output in outputs)


def test_a_program_that_computes_something_else_is_not_written(exported, tmp_path, monkeypatch):
    _, config, encoder, _ = exported
    monkeypatch.setattr(onnx_format, "TOLERANCE", 0.0)  # no two programs agree to the last bit
    with pytest.raises(PipelineError, match="onnxruntime computes other values than torch"):
        export_onnx(FileStore(tmp_path / "out"), encoder.state_dict(), config)
    monkeypatch.setattr(onnx_format, "_PACKAGES", ("onnx", "onnxtwo"))
    with pytest.raises(ConfigError, match=r"needs onnxtwo: pip install 'mae-pipeline\[onnx\]'"):
        export_onnx(FileStore(tmp_path / "out"), encoder.state_dict(), config)
    assert not (tmp_path / "out").exists()


def test_a_classifier_that_another_program_cannot_hold_is_refused(tmp_path):
    wide = encoder_config(image_size=(16, 32))
    with pytest.raises(ConfigError, match=r"only square images. Export it for timm"):
        export_classifier(FileStore(tmp_path), classifier_of(wide).state_dict(), wide, CLASSES, to="huggingface")
    other = encoder_config(layer_norm_eps=1e-12)
    with pytest.raises(ConfigError, match="timm builds these models"):
        export_classifier(FileStore(tmp_path), classifier_of(other).state_dict(), other, CLASSES, to="timm")
    assert not list(tmp_path.iterdir())


@torch.no_grad()
def test_our_own_encoder_needs_mae_core_alone(tmp_path, monkeypatch):
    config = encoder_config()
    encoder = encoder_of(config)
    export_encoder(FileStore(tmp_path), encoder.state_dict(), config, to="safetensors")
    (block,) = re.findall(r"```python\n(.*?)```", (tmp_path / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names = {"pixels": images(config)[1]}
    exec(block, names)
    assert torch.equal(names["tokens"], encoder(names["pixels"]))
    assert "import pipeline" not in block
