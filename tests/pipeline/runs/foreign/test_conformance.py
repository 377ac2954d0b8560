"""`mae conformance`: what is checked without images, how a score is judged, and what it says when something is wrong."""

import json
import shutil

import pytest
import timm
import torch
from foreign_kit import CLASSIFIERS, CONFIG, KINDS
from peer_kit import timm_peer
from run_kit import mae, write_images
from safetensors.torch import load_file, save_file

from mae_core.config import base, huge, large
from pipeline.runs.foreign.conformance import checks_without_images, judged, likely_reasons, published, published_score
from pipeline.weights import StatedFields

HEADS = StatedFields(num_heads=4)


def states(checks):
    return {check.name: check.state for check in checks}


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_of_each_kind_equal_those_of_both_libraries(tmp_path, kind):
    given, checks = checks_without_images(
        KINDS[kind](tmp_path), StatedFields() if kind == "ours" else HEADS, prefix=None
    )
    assert given is not None
    found = states(checks)
    assert found["tensors"] == "passed"
    assert "failed" not in found.values(), checks
    # each is compared with the library that made it; an export exists unless there are registers
    native = "transformers tokens" if kind.startswith("Hugging Face") else "timm tokens"
    assert found[native] == "passed"
    both = given.config.num_register_tokens == 0
    assert (found["timm tokens"] == found["transformers tokens"] == "passed") == both


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_scores_of_classifiers_equal_the_librarys(tmp_path, kind):
    _, checks = checks_without_images(CLASSIFIERS[kind](tmp_path, 3), HEADS, prefix=None)
    found = states(checks)
    assert found["transformers scores" if kind.startswith("Hugging Face") else "timm scores"] == "passed", checks
    assert "failed" not in found.values(), checks


def test_a_wrong_reading_is_found(tmp_path):
    """transformers reads config.json's number of heads, and a person insists on another one for us: the tokens differ."""
    from pipeline.runs.foreign.conformance import _compared
    from pipeline.runs.foreign.libraries import our_outputs, timm_outputs
    from pipeline.weights import read_given

    path = KINDS["timm .pth"](tmp_path)
    right, wrong = (read_given(path, StatedFields(num_heads=heads)) for heads in (4, 2))
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    (check,) = _compared("timm", our_outputs(wrong, pixels), timm_outputs(path, right, pixels, prefix=None))
    assert check.state == "failed"
    assert "up to 0.001 is rounding (timm's loader)" in check.detail


def test_files_that_cannot_be_read_fail_the_first_check(tmp_path):
    folder = KINDS["Hugging Face ViT"](tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights.pop(next(name for name in weights if "layernorm" in name))
    save_file(weights, folder / "model.safetensors")
    given, (check,) = checks_without_images(folder, StatedFields(), prefix=None)
    assert given is None
    assert (check.name, check.state) == ("tensors", "failed")
    assert "missing" in check.detail


def test_published_figures_are_those_of_the_released_forms():
    assert [published(size(), classes=None).accuracy for size in (base, large, huge)] == [67.8, 76.0, 77.2]
    tuned = [published(size(), classes=1000) for size in (base, large, huge)]
    assert [(one.protocol, round(one.accuracy, 2)) for one in tuned] == [
        ("own_head", 83.66),
        ("own_head", 85.95),
        ("own_head", 86.93),
    ]
    assert published(base(), classes=10) is None
    assert published(base(image_size=(448, 448)), classes=None) is None
    assert published(base(num_register_tokens=4), classes=None) is None
    assert published(CONFIG, classes=None) is None


def test_a_score_is_judged_within_its_tolerance_and_reasons_follow_what_was_assumed(tmp_path):
    given, _ = checks_without_images(KINDS["timm .pth"](tmp_path), HEADS, prefix=None)
    expected = published(base(), classes=1000)
    assert judged(given, 83.60, "own_head", expected).state == "passed"
    low = judged(given, 83.40, "own_head", expected)
    assert low.state == "failed"
    assert low.detail.startswith(
        "own_head 83.40 %, published 83.664 % (-0.26, allowed 0.1). Likely: another normalisation"
    )
    assert judged(given, 50.0, "own_head", None).state == "not checked"
    classifier, _ = checks_without_images(CLASSIFIERS["timm"](tmp_path, 3), HEADS, prefix=None)
    assert likely_reasons(classifier, 0.1, -83.5)[0].startswith("the class folders are not in the order")
    hf, _ = checks_without_images(KINDS["Hugging Face ViT"](tmp_path), StatedFields(layer_norm_eps=1e-12), prefix=None)
    assert any("--layer-norm-eps 1e-6" in reason for reason in likely_reasons(hf, 67.0, -0.8))


def test_with_images_a_classifier_is_scored_with_its_own_head(tmp_path):
    weights = CLASSIFIERS["official fine-tuned"](tmp_path, 2)
    shutil.copytree(write_images(tmp_path / "images", 20), tmp_path / "imagenet" / "val")
    given, _ = checks_without_images(weights, HEADS, prefix=None)
    options = {"store": str(tmp_path / "store"), "prefix": None, "options": {"num_heads": 4}}
    asked = {"overrides": ["tracking.uri=none"], "executor": "in_process"}
    check = published_score(weights, given, str(tmp_path / "imagenet"), **options, **asked)
    assert check.state == "not checked"
    assert check.detail.startswith("own_head ")
    assert check.detail.endswith("no figure is published for such an encoder")
    assert "--imagenet DIR" in published_score(weights, given, "", **options, **asked).detail


def test_the_command_prints_a_table_or_json_and_its_exit_code_tells(tmp_path):
    weights = KINDS["timm .pth"](tmp_path)
    done = mae("conformance", weights, "--num-heads", "4")
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["passed", "not", "passed", "passed", "not"]
    broken = tmp_path / "broken.pth"
    state = timm_peer(CONFIG, positions="trained").state_dict()
    state["blocks.0.mlp.w12.weight"] = torch.ones(2, 2)
    torch.save(state, broken)
    failed = mae("conformance", broken, "--num-heads", "4", "--json")
    assert failed.returncode == 1
    (check,) = json.loads(failed.stdout)["checks"]
    assert check["state"] == "failed"
    assert "a gated MLP" in check["detail"]


def test_tolerance_leaves_room_for_rounding_and_none_for_mistakes(tmp_path):
    """A deep encoder of timm's own, as in TOLERANCE's reasoning: 40 blocks."""
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=64, depth=40, num_heads=4, num_classes=0
    )
    torch.save(model.state_dict(), tmp_path / "deep.pth")
    _, checks = checks_without_images(tmp_path / "deep.pth", HEADS, prefix=None)
    (check,) = [one for one in checks if one.name == "timm tokens"]
    share = float(check.detail.split(", ")[1].split()[0])
    assert share < 1e-4
