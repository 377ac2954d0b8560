"""Import encoders and autoencoders of the official MAE, timm and Hugging Face: config, weights and a report.

Our own files are read too, as a folder or as a file with its config.json beside it.

Tensor shapes do not determine the whole config. The rest comes from the caller, or else from the folder's config.json and
preprocessor_config.json (or a checkpoint's arguments), or else from a default that the report names. Weights become float32,
which changes no value. layer_norm_eps follows config.json, so that outputs equal those of transformers; facebook/vit-mae-* has
1e-12 there although it was trained with 1e-6, so pass layer_norm_eps=1e-6 for the outputs of the original. Weights that are
not finite are refused: no later step would say why its scores are those of chance.
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
    check_autoencoder,
    check_encoder,
    detect_layout,
    encoder_from,
    infer_autoencoder_config,
    infer_encoder_config,
)
from pipeline.errors import ConfigError, DataError
from pipeline.storage import FileStore
from pipeline.weights.foreign import ForeignWeights, read_foreign_weights
from pipeline.weights.own import CONFIG, ENCODER, MODEL, read_autoencoder_config, read_encoder_config

OWN_LAYOUT = "mae_pipeline"
"""What reports call the names of this project."""


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
    """Names in the file that were not imported: a head, a pooler, a decoder, an optimiser, whatever lies outside the encoder."""
    assumed: tuple[str, ...]
    """`field=value` for each field that neither the caller nor the file states."""
    notes: tuple[str, ...] = ()
    """Which of several models in the file was taken, and how to take another; empty if there is one."""

    def lines(self) -> list[str]:
        """Return the report as text, one fact per line."""
        left_out = f"{', '.join(self.left_out[:6])}{f' and {len(self.left_out) - 6} more' * (len(self.left_out) > 6)}"
        return [
            f"{self.source}: layout {self.layout}",
            f"left out: {left_out or 'nothing'}",
            f"assumed: {', '.join(self.assumed) or 'nothing'}",
            *self.notes,
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
    prefix: str | None = None,
    image_size: tuple[int, int] | None = None,
    num_heads: int | None = None,
    layer_norm_eps: float | None = None,
    pixel_mean: Sequence[float] | None = None,
    pixel_std: Sequence[float] | None = None,
    assume: Mapping[str, Any] | None = None,
) -> ImportedEncoder:
    """Import the encoder of a weight file or folder, leaving out any decoder, pooler or classification head.

    `image_size` is the size the weights were made for; mae_core.resized_encoder changes it. `prefix` chooses among several
    models in one file, such as "model_ema" or "teacher.backbone". `assume` holds values of these fields for where nothing states
    them; without it, defaults are assumed. Our own weights (encoder.safetensors or model.safetensors,
    beside config.json) are read as they are and take no overrides.
    """
    caller = StatedFields(
        image_size=image_size,
        num_heads=num_heads,
        layer_norm_eps=layer_norm_eps,
        pixel_mean=None if pixel_mean is None else tuple(pixel_mean),
        pixel_std=None if pixel_std is None else tuple(pixel_std),
    )
    own_file = path / ENCODER
    # A folder of a pretraining holds both files; the encoder's is the smaller one.
    found = read_foreign_weights(own_file if layout is None and own_file.is_file() else path, prefix=prefix)
    return encoder_in(path, found, caller, layout=layout, assume=assume)


def encoder_in(
    path: Path,
    found: ForeignWeights,
    caller: StatedFields,
    *,
    layout: LayoutName | None = None,
    assume: Mapping[str, Any] | None = None,
) -> ImportedEncoder:
    """Import the encoder in what was read from `path`. `caller`: what its caller states. The rest is as in `import_encoder`."""
    if layout is None and is_own(found):
        return _import_own_encoder(path, found, caller)
    try:
        layout = layout or detect_layout(found.state_dict)
        stated = _stated_fields(path, found, layout).stated() | caller.stated()
        # A ViTMAE's config.json also states the decoder's fields, which this inference does not take.
        stated = {name: value for name, value in stated.items() if name in _ENCODER_FIELDS}
        config = infer_encoder_config(found.state_dict, layout=layout, **{**(assume or {}), **stated})
        weights, left_out = encoder_from(found.state_dict, config, layout=layout)
    except ConfigError as cause:
        raise ConfigError(f"{path}: {cause}") from cause
    report = ImportReport(str(path), layout, (*left_out, *found.left_out), _assumed(config, stated), found.notes)
    return ImportedEncoder(config, _in_float32(path, weights), report)


def import_autoencoder(
    path: Path,
    *,
    layout: LayoutName | None = None,
    prefix: str | None = None,
    image_size: tuple[int, int] | None = None,
    num_heads: int | None = None,
    decoder_num_heads: int | None = None,
    layer_norm_eps: float | None = None,
    pixel_mean: Sequence[float] | None = None,
    pixel_std: Sequence[float] | None = None,
    mask_ratio: float | None = None,
    target: Target | None = None,
    assume: Mapping[str, Any] | None = None,
) -> ImportedAutoencoder:
    """Import the whole autoencoder of a weight file or folder; raise a ConfigError naming what is missing if it has no decoder.

    The arguments are those of `import_encoder`, and the decoder's.
    """
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
    found = read_foreign_weights(path, prefix=prefix)
    if layout is None and is_own(found):
        return _import_own_autoencoder(path, found, caller)
    try:
        layout = layout or detect_layout(found.state_dict)
        if layout == "timm":  # the official layout without a decoder: the error must name the decoder
            layout = "official_mae"
        # Later entries win: what the caller states overrides the file.
        stated = _stated_fields(path, found, layout).stated() | caller.stated()
        config = infer_autoencoder_config(found.state_dict, layout=layout, **{**(assume or {}), **stated})
        weights, left_out = autoencoder_from(found.state_dict, config, layout=layout)
    except ConfigError as cause:
        raise ConfigError(f"{path}: {cause}") from cause
    report = ImportReport(str(path), layout, (*left_out, *found.left_out), _assumed(config, stated), found.notes)
    return ImportedAutoencoder(config, _in_float32(path, weights), report)


def is_own(found: ForeignWeights) -> bool:
    """Return whether the tensors have our names: our patch embedding is a matrix, where others have a convolution."""
    kernels = (found.state_dict.get(name) for name in ("patch_embed.weight", "encoder.patch_embed.weight"))
    return any(kernel is not None and kernel.ndim == 2 for kernel in kernels)


def _import_own_encoder(path: Path, found: ForeignWeights, caller: StatedFields) -> ImportedEncoder:
    store = _own_store(path, caller)
    config, weights, left_out = read_encoder_config(store), dict(found.state_dict), found.left_out
    if "encoder.patch_embed.weight" in weights:  # an autoencoder
        left_out = (*left_out, *sorted(name for name in weights if not name.startswith("encoder.")))
        weights = {
            name.removeprefix("encoder."): value for name, value in weights.items() if name.startswith("encoder.")
        }
    try:
        check_encoder(weights, config)
    except ConfigError as cause:
        raise ConfigError(f"{path}, {CONFIG} beside it: {cause}") from cause
    return ImportedEncoder(
        config, _in_float32(path, weights), ImportReport(str(path), OWN_LAYOUT, left_out, (), found.notes)
    )


def _import_own_autoencoder(path: Path, found: ForeignWeights, caller: StatedFields) -> ImportedAutoencoder:
    if "patch_embed.weight" in found.state_dict:
        raise ConfigError(
            f"{path} holds an encoder alone, and a decoder with random weights is never added: use {MODEL}, or import only the "
            f"encoder"
        )
    config, weights = read_autoencoder_config(_own_store(path, caller)), found.state_dict
    try:
        check_autoencoder(weights, config)
    except ConfigError as cause:
        raise ConfigError(f"{path}, {CONFIG} beside it: {cause}") from cause
    report = ImportReport(str(path), OWN_LAYOUT, found.left_out, (), found.notes)
    return ImportedAutoencoder(config, _in_float32(path, weights), report)


def _own_store(path: Path, caller: StatedFields) -> FileStore:
    """Return the folder of our own weights, whose config.json says everything about them."""
    folder = path if path.is_dir() else path.parent
    if not (folder / CONFIG).is_file():
        raise DataError(
            f"{path} has the tensor names of this project, whose {CONFIG} describes the model, and {folder / CONFIG} does not "
            f"exist: copy it there from where the weights came from"
        )
    # Refused rather than ignored: an override that has no effect would go unnoticed.
    if caller.stated():
        raise ConfigError(f"{path} sets {', '.join(caller.stated())} itself, in {CONFIG}: leave out these arguments")
    return FileStore(folder.absolute())


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
        # pydantic's message goes on for a line per field and a link.
        lines = "; ".join(str(cause).splitlines()[:3])
        raise DataError(f"{path}: the description of its model is invalid ({lines}): download it again") from cause


def _stated_by_huggingface(config: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> dict[str, Any]:
    # save_pretrained leaves out values at their defaults. Without any config.json nothing is known.
    config = {**_HF_DEFAULTS, **config} if config else config
    if (activation := config.get("hidden_act", "gelu")) != "gelu":
        raise ConfigError(
            f"config.json: hidden_act={activation!r} is not supported: the blocks here use the exact GELU"
        )
    # Where nothing is stated, transformers normalises, and images have three channels.
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
        # model_args describe the model as built; input_size is what it was evaluated at, channels first.
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


def _in_float32(path: Path, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    ours = {name: value.to(torch.float32).contiguous() for name, value in weights.items()}
    if broken := [name for name, value in ours.items() if not value.isfinite().all()]:
        first = ours[broken[0]]
        raise DataError(
            f"{path} holds weights that are not finite: {int((~first.isfinite()).sum())} of the {first.numel()} values of "
            f"{broken[0]} are NaN or infinite, as are some in {len(broken)} of {len(ours)} tensors. The training diverged: use "
            f"an earlier checkpoint"
        )
    return ours
