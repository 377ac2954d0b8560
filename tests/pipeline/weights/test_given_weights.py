"""Weights as they are given to be evaluated: folders of DeepSpeed, digests, sizes, heads, and what of them is refused."""

import hashlib

import pytest
import torch
from foreign_kit import CLASSIFIERS, CONFIG, KINDS
from peer_kit import timm_peer

from pipeline.errors import ConfigError, DataError
from pipeline.weights import StatedFields, digest_of, read_given

HEADS = StatedFields(num_heads=4)


def test_a_deepspeed_folder_is_the_checkpoint_that_latest_names(tmp_path):
    folder = KINDS["DeepSpeed folder"](tmp_path)
    whole, step = (read_given(path, HEADS) for path in (folder, folder / "global_step7"))
    assert whole.config == step.config
    assert whole.facts.sha256 == step.facts.sha256
    older = folder / "global_step3"
    (folder / "global_step7").rename(older)
    with pytest.raises(DataError, match="holds none of"):  # `latest` names a folder that is gone: no other is guessed
        read_given(folder, HEADS)
    (folder / "latest").write_text("../elsewhere")
    with pytest.raises(DataError, match="holds none of"):
        read_given(folder, HEADS)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (
            ["zero_pp_rank_0_mp_rank_00_model_states.pt"],
            "of ZeRO 3, whose weights are split over its files: gather them",
        ),
        (["mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt"], "2 tensor-parallel parts"),
    ],
)
def test_deepspeed_folders_whose_weights_are_split_are_refused(tmp_path, names, words):
    for name in names:
        torch.save({"module": timm_peer(CONFIG, positions="trained").state_dict()}, tmp_path / name)
    with pytest.raises(DataError, match=words):
        read_given(tmp_path, HEADS)


def test_a_digest_is_of_the_content(tmp_path):
    file = KINDS["timm .pth"](tmp_path)
    assert digest_of(file) == hashlib.sha256(file.read_bytes()).hexdigest()
    folder = KINDS["Hugging Face ViT"](tmp_path)
    before = digest_of(folder)
    folder = folder.rename(tmp_path / "other")
    assert digest_of(folder) == before
    (folder / "README.md").write_text("not read")
    assert digest_of(folder) == before
    config = folder / "config.json"
    config.write_text(config.read_text().replace("1e-06", "1e-05"))
    assert digest_of(folder) != before


def test_an_image_size_with_as_many_patches_is_the_one_the_weights_were_made_for(tmp_path):
    wide = timm_peer(type(CONFIG)(**{**vars(CONFIG), "image_size": (8, 32)}), positions="trained")
    torch.save(wide.state_dict(), tmp_path / "wide.pth")
    assert read_given(tmp_path / "wide.pth", HEADS).config.image_size == (16, 16)  # a square is assumed
    given = read_given(tmp_path / "wide.pth", HEADS.model_copy(update={"image_size": (8, 32)}))
    assert torch.equal(given.weights["positions"], wide.pos_embed[0, 1:])
    assert given.facts.notes == ()


def test_our_own_config_wins_and_contradicting_it_is_refused(tmp_path):
    folder = KINDS["ours"](tmp_path)
    assert read_given(folder, HEADS).config == CONFIG
    with pytest.raises(ConfigError, match=r"num_heads=8, but its config\.json says 4: leave the option out"):
        read_given(folder, StatedFields(num_heads=8))
    assert read_given(folder, StatedFields(image_size=(32, 32))).config.image_size == (32, 32)


@pytest.mark.parametrize(
    ("kind", "reads"),
    [
        ("official fine-tuned", "mean of unnormalised"),
        ("timm", "cls"),
        ("Hugging Face ViT", "cls"),
        ("Hugging Face DINOv2", "cls and mean"),
    ],
)
def test_what_a_head_reads_is_told_by_its_file(tmp_path, kind, reads):
    given = read_given(CLASSIFIERS[kind](tmp_path, 3), HEADS)
    assert (given.facts.classes, given.facts.head_reads) == (3, reads)
    assert any("fc_norm also stands in" in note for note in given.facts.notes) == (kind == "official fine-tuned")


def test_of_several_heads_none_is_taken(tmp_path):
    weights = timm_peer(CONFIG, positions="trained").state_dict()
    heads = {f"{name}.weight": torch.ones(3, 32) for name in ("head", "aux.head")}
    torch.save({**{f"backbone.{k}": v for k, v in weights.items()}, **heads}, tmp_path / "two.pth")
    given = read_given(tmp_path / "two.pth", HEADS)
    assert given.head is None
    assert given.facts.notes == ("2 heads are in the file (aux.head.weight, head.weight), and none is taken",)
    torch.save(
        {**weights, "head.weight": torch.full((3, 32), torch.nan), "head.bias": torch.ones(3)}, tmp_path / "nan.pth"
    )
    with pytest.raises(DataError, match=r"head\.weight holds values that are not finite"):
        read_given(tmp_path / "nan.pth", HEADS)
