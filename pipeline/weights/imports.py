"""Import encoders and autoencoders of the official MAE, timm and Hugging Face: config, weights and a report.

Tensor shapes do not determine the whole config. The rest comes from the caller, or else from the folder's config.json and
preprocessor_config.json (or a checkpoint's arguments), or else from a default that the report names. Weights become float32,
which changes no value. layer_norm_eps follows config.json, so that outputs equal those of transformers; facebook/vit-mae-* has
1e-12 there although it was trained with 1e-6, so pass layer_norm_eps=1e-6 for the outputs of the original.
Errors: DataError for an unreadable file; ConfigError, naming the file, for unusable contents."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from mae_core.config import MAEConfig, Target, ViTConfig
from mae_core.interop import (
    LayoutName,
    autoencoder_from,
    detect_layout,
    encoder_from,
    infer_autoencoder_config,
    infer_encoder_config,
)
from pipeline.errors import ConfigError, DataError
from pipeline.storage import FileStore
from pipeline.weights.foreign import ForeignWeights, read_foreign_weights
from pipeline.weights.own import CONFIG, ENCODER, read_encoder


class StatedFields(BaseModel):
    """The fields that tensor shapes do not determine; None where they are not stated. Validated, since files of others set them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    image_size: tuple[int, int] | None = None
    num_heads: int | None = None
    layer_norm_eps: float | None = None
    pixel_mean: tuple[float, ...] | None = None
    pixel_std: tuple[float, ...] | None = None
    decoder_num_heads: int | None = None
    mask_ratio: float | None = None
    target: Target | None = None

    def stated(self) -> dict[str, Any]:
        """Return the fields that are stated."""
        return {name: value for name, value in self if value is not None}


_HF_DEFAULTS = {
    "num_attention_heads": 12,
    "layer_norm_eps": 1e-12,
    "decoder_num_attention_heads": 16,
    "mask_ratio": 0.75,
    "norm_pix_loss": False,
}
"""transformers' defaults for fields that a config.json omits."""

_ENCODER_FIELDS = ("image_size", "num_heads", "layer_norm_eps", "pixel_mean", "pixel_std")


class ImportReport(NamedTuple):
    """What to check before trusting the numbers."""

    source: str
    layout: str
    left_out: tuple[str, ...]
    """Names in the file that were not imported, all of a known kind: a head, a pooler, a decoder, an optimiser."""
    assumed: tuple[str, ...]
    """`field=value` for each field that neither the caller nor the file states."""

    def lines(self) -> list[str]:
        """Return the report as text, one fact per line."""
        left_out = f"{', '.join(self.left_out[:6])}{f' and {len(self.left_out) - 6} more' * (len(self.left_out) > 6)}"
        return [
            f"{self.source}: layout {self.layout}",
            f"left out: {left_out or 'nothing'}",
            f"assumed: {', '.join(self.assumed) or 'nothing'}",
        ]


class ImportedEncoder(NamedTuple):
    """Weights of ViTEncoder(config)."""

    config: ViTConfig
    weights: dict[str, Tensor]
    report: ImportReport


class ImportedAutoencoder(NamedTuple):
    """Weights of MaskedAutoencoder(config)."""

    config: MAEConfig
    weights: dict[str, Tensor]
    report: ImportReport


def import_encoder(
    path: Path,
    *,
    layout: LayoutName | None = None,
    image_size: tuple[int, int] | None = None,
    num_heads: int | None = None,
    layer_norm_eps: float | None = None,
    pixel_mean: Sequence[float] | None = None,
    pixel_std: Sequence[float] | None = None,
) -> ImportedEncoder:
    """Import the encoder of a weight file or folder, leaving out any decoder, pooler or classification head.

    `image_size` is the size the weights were made for; mae_core.resized_encoder changes it. A folder of our own
    (encoder.safetensors, config.json) is read as it is and takes no overrides.
    """
    caller = StatedFields(
        image_size=image_size,
        num_heads=num_heads,
        layer_norm_eps=layer_norm_eps,
        pixel_mean=None if pixel_mean is None else tuple(pixel_mean),
        pixel_std=None if pixel_std is None else tuple(pixel_std),
    )
    if layout is None and (path / ENCODER).is_file() and (path / CONFIG).is_file():
        if caller.stated():
            raise ConfigError(
                f"{path} sets {', '.join(caller.stated())} itself, in {CONFIG}: leave out these arguments"
            )
        config, weights = read_encoder(FileStore(path.absolute()))
        return ImportedEncoder(config, weights, ImportReport(str(path), "mae_pipeline", (), ()))
    found = read_foreign_weights(path)
    try:
        layout = layout or detect_layout(found.state_dict)
        stated = _stated_fields(path, found, layout).stated() | caller.stated()
        stated = {name: value for name, value in stated.items() if name in _ENCODER_FIELDS}
        config = infer_encoder_config(found.state_dict, layout=layout, **stated)
        weights, left_out = encoder_from(found.state_dict, config, layout=layout)
    except ConfigError as cause:
        raise ConfigError(f"{path}: {cause}") from cause
    report = ImportReport(str(path), layout, (*left_out, *found.left_out), _assumed(config, stated))
    return ImportedEncoder(config, _in_float32(weights), report)


def import_autoencoder(
    path: Path,
    *,
    layout: LayoutName | None = None,
    image_size: tuple[int, int] | None = None,
    num_heads: int | None = None,
    decoder_num_heads: int | None = None,
    layer_norm_eps: float | None = None,
    pixel_mean: Sequence[float] | None = None,
    pixel_std: Sequence[float] | None = None,
    mask_ratio: float | None = None,
    target: Target | None = None,
) -> ImportedAutoencoder:
    """Import the whole autoencoder of a weight file or folder; raise a ConfigError naming what is missing if it has no decoder."""
    caller = StatedFields(
        image_size=image_size,
        num_heads=num_heads,
        decoder_num_heads=decoder_num_heads,
        layer_norm_eps=layer_norm_eps,
        pixel_mean=None if pixel_mean is None else tuple(pixel_mean),
        pixel_std=None if pixel_std is None else tuple(pixel_std),
        mask_ratio=mask_ratio,
        target=target,
    )
    found = read_foreign_weights(path)
    try:
        layout = layout or detect_layout(found.state_dict)
        if layout == "timm":  # the official layout without a decoder: the error must name the decoder
            layout = "official_mae"
        stated = _stated_fields(path, found, layout).stated() | caller.stated()
        config = infer_autoencoder_config(found.state_dict, layout=layout, **stated)
        weights, left_out = autoencoder_from(found.state_dict, config, layout=layout)
    except ConfigError as cause:
        raise ConfigError(f"{path}: {cause}") from cause
    report = ImportReport(str(path), layout, (*left_out, *found.left_out), _assumed(config, stated))
    return ImportedAutoencoder(config, _in_float32(weights), report)


def _stated_fields(path: Path, found: ForeignWeights, layout: LayoutName) -> StatedFields:
    """Return what the files beside the weights, or a checkpoint's arguments, state."""
    try:
        if layout in ("hf_vit", "hf_vitmae"):
            return StatedFields.model_validate(_stated_by_huggingface(found.config, found.preprocessor))
        if "architecture" in found.config:
            return StatedFields.model_validate(_stated_by_timm(found.config))
        arguments = found.arguments
        return StatedFields(mask_ratio=arguments.get("mask_ratio"), target=_target(arguments.get("norm_pix_loss")))
    except (ValidationError, TypeError, AttributeError) as cause:
        lines = "; ".join(str(cause).splitlines()[:3])
        raise DataError(f"{path}: the description of its model is invalid ({lines}): download it again") from cause


def _stated_by_huggingface(config: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> dict[str, Any]:
    config = {**_HF_DEFAULTS, **config} if config else config
    if (activation := config.get("hidden_act", "gelu")) != "gelu":
        raise ConfigError(
            f"config.json: hidden_act={activation!r} is not supported: the blocks here use the exact GELU"
        )
    normalises, channels = preprocessor.get("do_normalize", True), config.get("num_channels", 3)
    return {
        "image_size": _pair(config.get("image_size")),
        "num_heads": config.get("num_attention_heads"),
        "layer_norm_eps": config.get("layer_norm_eps"),
        "pixel_mean": preprocessor.get("image_mean") if normalises else (0.0,) * channels,
        "pixel_std": preprocessor.get("image_std") if normalises else (1.0,) * channels,
        "decoder_num_heads": config.get("decoder_num_attention_heads"),
        "mask_ratio": config.get("mask_ratio"),
        "target": _target(config.get("norm_pix_loss")),
    }


def _stated_by_timm(config: Mapping[str, Any]) -> dict[str, Any]:
    arguments = config.get("model_args") or {}
    pretrained = config.get("pretrained_cfg", config)  # older folders keep everything in one mapping
    if "quickgelu" in config["architecture"] or arguments.get("act_layer", "gelu") != "gelu":
        raise ConfigError(
            f"config.json: {config['architecture']} uses another activation: the blocks here use the exact GELU"
        )
    return {
        "image_size": _pair(arguments.get("img_size")) or tuple(pretrained.get("input_size", ())[1:]) or None,
        "num_heads": arguments.get("num_heads"),
        "pixel_mean": pretrained.get("mean"),
        "pixel_std": pretrained.get("std"),
    }


def _target(norm_pix_loss: object) -> Target | None:
    if norm_pix_loss is None:
        return None
    return "normalised" if norm_pix_loss else "raw"


def _pair(size: Any) -> Any:
    return (size, size) if isinstance(size, int) else size


def _assumed(config: ViTConfig | MAEConfig, stated: Mapping[str, Any]) -> tuple[str, ...]:
    """Return `field=value` for each field that is not stated, except image_size, which the position table determines."""
    encoder = config if isinstance(config, ViTConfig) else config.encoder
    names = _ENCODER_FIELDS if config is encoder else tuple(StatedFields.model_fields)
    return tuple(
        f"{name}={getattr(encoder if name in _ENCODER_FIELDS else config, name)}"
        for name in names
        if name not in stated and name != "image_size"
    )


def _in_float32(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to(torch.float32).contiguous() for name, value in weights.items()}
