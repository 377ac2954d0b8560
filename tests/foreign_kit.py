"""Tiny files of weights in every layout that `mae evaluate` takes, made by the libraries themselves from seeded generators."""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

import timm
import torch
import transformers
from peer_kit import hf_settings, hf_vit_peer, hf_vitmae_peer, moved, official_names, timm_peer
from safetensors.torch import save_file
from torch import nn

from mae_core import MAEConfig, MaskedAutoencoder, ViTConfig
from pipeline.storage import FileStore
from pipeline.weights import write_weights

CONFIG = ViTConfig(image_size=(16, 16), patch_size=4, embed_dim=32, depth=2, num_heads=4)
WHOLE = MAEConfig(encoder=CONFIG, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)


def dinov2(*, classes: int = 0) -> nn.Module:
    """timm's DINOv2 with registers, shrunk."""
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_small_patch14_reg4_dinov2",
        img_size=16,
        patch_size=4,
        embed_dim=32,
        depth=2,
        num_heads=4,
        init_values=0.1,
        num_classes=classes,
    )
    moved(model, width=32)
    return model.eval()


def hf_dinov2(*, registers: int, classes: int = 0) -> nn.Module:
    torch.manual_seed(0)
    stem = "Dinov2WithRegisters" if registers else "Dinov2"
    settings = {**hf_settings(CONFIG), "mlp_ratio": 4, "num_labels": classes or 2}
    config = getattr(transformers, f"{stem}Config")(
        **settings, **({"num_register_tokens": registers} if registers else {})
    )
    model = getattr(transformers, f"{stem}{'ForImageClassification' if classes else 'Model'}")(config)
    moved(model, width=32)
    return model.eval()


def _folder(model: nn.Module, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def _saved(content: object, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def _safetensors(weights: Mapping[str, torch.Tensor], path: Path) -> Path:
    save_file(dict(weights), path)
    return path


def _ours(folder: Path) -> Path:
    model = MaskedAutoencoder(WHOLE, generator=torch.Generator().manual_seed(0))
    moved(model, width=32)
    folder.mkdir()
    write_weights(FileStore(folder), model.state_dict(), WHOLE)
    return folder


def _deepspeed(folder: Path) -> Path:
    weights = {f"_forward_module.model.{k}": v for k, v in timm_peer(CONFIG, positions="trained").state_dict().items()}
    _saved({"module": weights, "ds_version": "0.19"}, folder / "global_step7" / "mp_rank_00_model_states.pt")
    (folder / "latest").write_text("global_step7\n")
    return folder


def _prefixed(prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in timm_peer(CONFIG, positions="trained").state_dict().items()}


def official(folder: Path) -> Path:
    weights = official_names(hf_vitmae_peer(WHOLE).state_dict())
    return _saved({"model": weights, "args": argparse.Namespace(norm_pix_loss=True)}, folder / "mae.pth")


KINDS: Mapping[str, Callable[[Path], Path]] = {
    "official MAE": official,
    "timm safetensors": lambda at: _safetensors(
        timm_peer(CONFIG, positions="trained").state_dict(), at / "t.safetensors"
    ),
    "timm .pth": lambda at: _saved(timm_peer(CONFIG, positions="fixed").state_dict(), at / "t.pth"),
    "timm DINOv2 with registers": lambda at: _saved(dinov2().state_dict(), at / "d.pth"),
    "Hugging Face ViT": lambda at: _folder(hf_vit_peer(CONFIG), at / "hf"),
    "Hugging Face ViTMAE": lambda at: _folder(hf_vitmae_peer(WHOLE), at / "hf"),
    "Hugging Face DINOv2": lambda at: _folder(hf_dinov2(registers=0), at / "hf"),
    "Hugging Face DINOv2 with registers": lambda at: _folder(hf_dinov2(registers=3), at / "hf"),
    "ours": lambda at: _ours(at / "ours"),
    "module.": lambda at: _saved(_prefixed("module."), at / "w.pth"),
    "student and EMA": lambda at: _saved(
        {"student": _prefixed("module.backbone."), "student_ema": _prefixed("backbone.")}, at / "w.pth"
    ),
    "Lightning": lambda at: _saved({"state_dict": _prefixed("model."), "epoch": 3, "callbacks": {}}, at / "w.ckpt"),
    "DeepSpeed folder": lambda at: _deepspeed(at / "ds"),
}
"""Kind -> what writes such a file or folder into an empty folder, and returns its path."""

CLASSIFIERS: Mapping[str, Callable[[Path, int], Path]] = {
    "official fine-tuned": lambda at, n: _saved(
        {"model": timm_peer(CONFIG, positions="trained", num_classes=n, global_pool="avg").state_dict()}, at / "f.pth"
    ),
    "timm": lambda at, n: _saved(timm_peer(CONFIG, positions="trained", num_classes=n).state_dict(), at / "f.pth"),
    "timm DINOv2": lambda at, n: _saved(dinov2(classes=n).state_dict(), at / "f.pth"),
    "Hugging Face ViT": lambda at, n: _folder(_hf_classifier(n), at / "hf"),
    "Hugging Face DINOv2": lambda at, n: _folder(hf_dinov2(registers=3, classes=n), at / "hf"),
}
"""The same for classifiers, with their number of classes."""


def _hf_classifier(classes: int) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.ViTConfig(**hf_settings(CONFIG), num_labels=classes)
    model = transformers.ViTForImageClassification(config)
    moved(model, width=32)
    return model.eval()
