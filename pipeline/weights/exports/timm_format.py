"""timm's VisionTransformer: an encoder, or a classifier on the mean of the patch tokens (`global_pool="avg"`, with fc_norm).

Errors: ConfigError for a config that timm does not build."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from safetensors.torch import save
from torch import Tensor

from mae_core.config import SIZES, ViTConfig
from mae_core.interop import to_timm
from pipeline.errors import ConfigError
from pipeline.storage import Store
from pipeline.weights.exports.card import README, Origin, Usage, card, normalised_pixels
from pipeline.weights.exports.classifier_tensors import as_encoder, head_of
from pipeline.weights.own import CONFIG, MODEL

TIMM_NAMES = {
    "tiny": "vit_tiny_patch16_224",
    "small": "vit_small_patch16_224",
    "base": "vit_base_patch16_224",
    "large": "vit_large_patch16_224",
    "huge": "vit_huge_patch14_224",
}
"""timm's names for the named sizes of mae_core."""
TIMM_LAYER_NORM_EPS = 1e-6


def write_timm(
    store: Store, weights: Mapping[str, Tensor], config: ViTConfig, *, origin: Origin, classes: Sequence[str] = ()
) -> tuple[str, ...]:
    """Write an encoder or, with `classes`, a classifier; return the keys of the files."""
    if config.layer_norm_eps != TIMM_LAYER_NORM_EPS:
        raise ConfigError(
            f"layer_norm_eps={config.layer_norm_eps}: timm builds these models with {TIMM_LAYER_NORM_EPS}. If that small "
            f"difference is acceptable, export with replace(config, layer_norm_eps={TIMM_LAYER_NORM_EPS})"
        )
    tensors = _classifier_tensors(weights, config) if classes else to_timm(weights, config)
    name, arguments = timm_model(config)
    # among the arguments: timm takes it from nowhere else
    arguments |= {"global_pool": "avg"} if classes else {}
    # config.json comes last: a folder that has one is complete
    store.write(MODEL, save({key: value.contiguous() for key, value in tensors.items()}))
    store.write(README, card(config, _usage(config, name, arguments, classes), origin, classes=classes))
    store.write(CONFIG, json.dumps(_settings(config, name, arguments, classes), indent=1, sort_keys=True).encode())
    return MODEL, README, CONFIG


def timm_model(config: ViTConfig) -> tuple[str, dict[str, Any]]:
    """Return the name and keyword arguments with which timm.create_model builds a model of this shape.

    A named size at 224 pixels needs no arguments."""
    images = {"img_size": list(config.image_size), "in_chans": config.in_channels}
    for size, name in TIMM_NAMES.items():
        named = SIZES[size]()
        if _blocks(named) == _blocks(config):
            standard = {"img_size": list(named.image_size), "in_chans": named.in_channels}
            return name, {key: value for key, value in images.items() if value != standard[key]}
    # Any model will do as a template once its sizes are all given as arguments.
    return TIMM_NAMES["base"], {**images, **_blocks(config)}


def _blocks(config: ViTConfig) -> dict[str, Any]:
    """Return the part of a model's shape that does not depend on its images, in timm's terms."""
    return {
        "patch_size": config.patch_size,
        "embed_dim": config.embed_dim,
        "depth": config.depth,
        "num_heads": config.num_heads,
        "mlp_ratio": config.mlp_ratio,
    }


def _classifier_tensors(weights: Mapping[str, Tensor], config: ViTConfig) -> dict[str, Tensor]:
    named = to_timm(as_encoder(weights), config)
    return {
        key.replace("norm.", "fc_norm.") if key.startswith("norm.") else key: value for key, value in named.items()
    } | {f"head.{name}": value for name, value in head_of(weights).items()}


def _settings(config: ViTConfig, name: str, arguments: Mapping[str, Any], classes: Sequence[str]) -> dict[str, Any]:
    labels = {"label_names": list(classes)} if classes else {}
    return {
        "architecture": name,
        "num_classes": len(classes),
        "num_features": config.embed_dim,
        "global_pool": "avg" if classes else "token",
        "model_args": dict(arguments),
        **labels,
        "pretrained_cfg": {
            "input_size": [config.in_channels, *config.image_size],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "mean": list(config.pixel_mean),
            "std": list(config.pixel_std),
            "num_classes": len(classes),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            **labels,
        },
    }


def _usage(config: ViTConfig, name: str, arguments: Mapping[str, Any], classes: Sequence[str]) -> Usage:
    calls = "logits = model(pixels)" if classes else "tokens = model.forward_features(pixels)  # class token first"
    options = f"num_classes={len(classes)}"
    options += "".join(f", {key}={value!r}" for key, value in arguments.items())
    return Usage(
        library="timm",
        what="image classifier" if classes else "encoder",
        code=f'import timm\n\nmodel = timm.create_model("local-dir:.", pretrained=True).eval()\n{calls}',
        pixels=normalised_pixels(config),
        notes=f"With an older timm:\n\n"
        f"```python\n"
        f"import timm\n"
        f"from safetensors.torch import load_file\n\n"
        f'model = timm.create_model("{name}", {options}).eval()\n'
        f'model.load_state_dict(load_file("{MODEL}"))\n'
        f"```",
    )
