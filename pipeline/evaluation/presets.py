"""Recipes that others have published, by name: what `evaluation.preset` gives the sections of protocols by default.

What a configuration writes itself wins, field by field. The table in docs/evaluation.md is the documented form of these values; a
test compares the two. Protocols that are not named here keep their own defaults, which are the official ones.
Sources: He et al. 2021, arXiv 2111.06377, tables 9 to 11; FINETUNE.md of the official code. `small-images` is our own."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal

from mae_core.config import ViTConfig
from pipeline.training.spec.recipe import fitting_warmup

PresetName = Literal[
    "none", "mae-paper", "mae-official-base", "mae-official-large", "mae-official-huge", "small-images"
]
Size = Literal["base", "large", "huge"]
Sections = Mapping[str, Mapping[str, Any]]
"""Protocol -> field -> value."""

_RAND_AUGMENT = "rand-m9-mstd0.5-inc1"
_LINEAR = MappingProxyType({"pool": "cls", "epochs": 90, "batch": 16384, "base_lr": 0.1, "warmup_epochs": 10.0})
_LINEAR_ONLINE = MappingProxyType(
    {
        "pool": "cls",
        "epochs": 90,
        "global_batch": 16384,
        "base_lr": 0.1,
        "warmup_epochs": 10.0,
        "min_lr": 0.0,
        "weight_decay": 0.0,
        "momentum": 0.9,
        "trust_coefficient": 0.001,
        "augment": {"kind": "clipped_crop", "scale": [0.08, 1.0], "flip": True},
    }
)
"""The paper's code ran on TPUs, and the official code draws crops as it did."""


def size_of(encoder: ViTConfig) -> Size:
    """Return the size whose recipe an encoder takes, by its width."""
    if encoder.embed_dim < 1024:
        return "base"
    return "large" if encoder.embed_dim < 1280 else "huge"


def _finetune(**changes: Any) -> dict[str, Any]:
    """What the paper and the official code have in common."""
    return {
        "global_batch": 1024,
        "warmup_epochs": 5.0,
        "min_lr": 1e-6,
        "weight_decay": 0.05,
        "betas": [0.9, 0.999],
        "label_smoothing": 0.1,
        "mixup": 0.8,
        "cutmix": 1.0,
        **changes,
    }


def _augment(**changes: Any) -> dict[str, Any]:
    return {"kind": "random_resized_crop", "scale": [0.08, 1.0], "flip": True, "rand_augment": _RAND_AUGMENT, **changes}


def _paper(size: Size) -> Sections:
    finetune = _finetune(
        epochs=100 if size == "base" else 50,
        base_lr=1e-3,
        layer_decay=0.75,
        drop_path=0.2 if size == "huge" else 0.1,
        augment=_augment(erasing=0.0),
    )
    scratch = {
        "global_batch": 4096,
        "epochs": 300 if size == "base" else 200,
        "base_lr": 1e-4,
        "warmup_epochs": 20.0,
        "min_lr": 0.0,
        "weight_decay": 0.3,
        "betas": [0.9, 0.95],
        "layer_decay": 1.0,
        "drop_path": 0.1 if size == "base" else 0.2,
        "label_smoothing": 0.1,
        "mixup": 0.8,
        "cutmix": 1.0,
        "ema": 0.9999,
        "augment": _augment(erasing=0.0),
    }
    probes = {"linear": _LINEAR, "linear_online": _LINEAR_ONLINE}
    return {**probes, "finetune": finetune, "partial": finetune, "scratch": scratch}


def _official(**changes: Any) -> Callable[[Size], Sections]:
    # The size is that of the name: the released weights of one size are fine-tuned by the recipe of that size.
    finetune = _finetune(**changes, augment=_augment(erasing=0.25))
    probes = {"linear": _LINEAR, "linear_online": _LINEAR_ONLINE}
    return lambda size: {**probes, "finetune": finetune, "partial": finetune}


def _small_images(size: Size) -> Sections:
    augment = {"kind": "shift", "shift_pixels": 4, "flip": True}
    finetune = {
        "global_batch": 128,
        "epochs": 15,
        "base_lr": 2e-3,
        "warmup_epochs": 1.0,
        "layer_decay": 0.75,
        "drop_path": 0.0,
        "label_smoothing": 0.1,
        "augment": augment,
    }
    scratch = {
        **finetune,
        "epochs": 100,
        "warmup_epochs": 5.0,
        "layer_decay": 1.0,
        "drop_path": 0.1,
        "mixup": 0.8,
        "cutmix": 1.0,
        "ema": 0.999,
    }
    # LARS moves a matrix by a share of its norm; with batches of 128 it takes rates far above the paper's to get anywhere.
    online = {
        "epochs": 30,
        "global_batch": 128,
        "base_lr": 30.0,
        "more_base_lrs": [10.0, 100.0],
        "warmup_epochs": 3.0,
        "augment": augment,
    }
    probes: Sections = {"linear": {"pool": "mean"}, "linear_online": {"pool": "mean", **online}, "attentive": online}
    return {**probes, "finetune": finetune, "partial": finetune, "scratch": scratch}


PRESETS: Mapping[PresetName, Callable[[Size], Sections]] = {
    "none": lambda size: {},
    "mae-paper": _paper,
    "mae-official-base": _official(epochs=100, base_lr=5e-4, layer_decay=0.65, drop_path=0.1),
    "mae-official-large": _official(epochs=50, base_lr=1e-3, layer_decay=0.75, drop_path=0.2),
    "mae-official-huge": _official(epochs=50, base_lr=1e-3, layer_decay=0.75, drop_path=0.3),
    "small-images": _small_images,
}


def with_preset(evaluation: Mapping[str, Any], size: Size) -> Mapping[str, Any]:
    """Return the section `evaluation` of a document, completed by its preset. An unknown name is left to the field's own check."""
    preset = PRESETS.get(evaluation.get("preset", "none"))
    if preset is None:
        return evaluation
    completed = dict(evaluation)
    for protocol, defaults in preset(size).items():
        written = evaluation.get(protocol, {})
        if isinstance(written, Mapping):
            completed[protocol] = _completed(defaults, written)
    return completed


def _completed(defaults: Mapping[str, Any], written: Mapping[str, Any]) -> dict[str, Any]:
    completed = {**defaults, **written}
    for name, value in written.items():
        if isinstance(value, Mapping) and isinstance(defaults.get(name), Mapping):
            completed[name] = {**defaults[name], **value}
    # a short trial with a preset is not refused for its warm-up
    if "warmup_epochs" in defaults and "warmup_epochs" not in written:
        completed["warmup_epochs"] = fitting_warmup(
            completed["epochs"], default=defaults["warmup_epochs"], of_epochs=defaults["epochs"]
        )
    return completed
