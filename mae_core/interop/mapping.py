"""Conversion of weights from other layouts and into them: every name is accounted for, and no value is changed but two.

Shapes: our patch_embed.weight [D, P * P * C] is a convolution kernel [D, C, P, P] elsewhere. Our qkv [3D, D] is q, k and v,
[D, D] each, at Hugging Face. Other layouts store position tables as [1, 1 + L, D]; here the fixed table is computed, and a
learned one is kept as [L, D].

Our class token has no position. On import, its row of the position table, if there is one, is added to the token itself, which
is what the other programs do in every forward pass; exported tables have a zero row. Register tokens are treated alike.

Our blocks have no LayerScale. On import, its factors are multiplied into the linear layer whose outputs they scale, in float32. The
features are the same up to rounding; only fine-tuning differs, since the factors are no longer parameters of their own.

Errors: ConfigError if names are missing or unknown, if a shape does not fit the config, or if a position table is not the
fixed one where it has to be."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from mae_core.config import MAEConfig, ViTConfig
from mae_core.errors import ConfigError
from mae_core.interop.infer import (
    check_floating_point,
    decoder_table,
    encoder_only_hint,
    format_names,
    is_sine_cosine,
    parts_message,
    patch_rows,
    positions_error,
)
from mae_core.interop.layouts import (
    LAYOUTS,
    LayoutName,
    NameTable,
    canonical_names,
    names_matching,
    part_names,
    scale_names,
    tensor_names,
)
from mae_core.interop.unsupported import unsupported_parts
from mae_core.mae import MaskedAutoencoder
from mae_core.positions import sine_cosine_2d
from mae_core.vit import ViTEncoder

_FROZEN_TOLERANCE = 4e-3
"""How far a position table of an autoencoder, which is never trained, may be from the fixed one. bfloat16 rounds by up to 2e-3
below 1, while a table of one-dimensional positions would differ by tenths."""


class Imported(NamedTuple):
    """Imported weights, and the names of what was left out."""

    weights: dict[str, Tensor]
    """Tensors under our names, ready for load_state_dict."""
    left_out: tuple[str, ...]
    """Tensors of the file that were not imported, under the layout's names; the layout declares every one of them."""


def encoder_from(state_dict: Mapping[str, Tensor], config: ViTConfig, *, layout: LayoutName) -> Imported:
    """Convert a state dict of another layout into the weights of ViTEncoder(config).

    Values and dtypes are kept, apart from LayerScale. A tensor that is neither concatenated nor changed is shared with
    state_dict, not copied. A decoder, a pooler or a classification head is left out and reported. When config.positions is
    "learned" the stored position table becomes a weight; otherwise it has to be the fixed one.

    Raises:
        ConfigError: Names are missing or unknown, a shape does not fit the config, or the position table does not.
    """
    known = LAYOUTS[layout]
    theirs, names = canonical_names(state_dict, known), tensor_names(known.encoder, depth=config.depth)
    if config.num_register_tokens:
        names["register_tokens"] = (known.encoder.registers,)
    ignored = names_matching(theirs, (*known.decoder_patterns, *known.optional_patterns))
    # the position table is expected in every file, although ours may not keep it
    scales = part_names(theirs, known.encoder, depth=config.depth) - {known.encoder.registers}
    wanted = {known.encoder.positions, *scales, *(name for group in names.values() for name in group)}
    # timm's models with average pooling drop `norm`; saying so beats "missing norm.weight"
    pooled = "fc_norm.weight" in theirs and "norm.weight" not in theirs
    hint = "fc_norm normalises the mean of the tokens, and these weights have no norm for the tokens" if pooled else ""
    _check_names(theirs, wanted, ignored=ignored, hint=hint)
    weights = _import_tensors(theirs, names, _encoder_shapes(config), config)
    weights |= _scaled(weights, theirs, scale_names(known.encoder, depth=config.depth))
    weights |= _import_positions(theirs[known.encoder.positions], weights, known.encoder, config)
    return Imported(weights, tuple(sorted(set(theirs) - wanted)))


def autoencoder_from(state_dict: Mapping[str, Tensor], config: MAEConfig, *, layout: LayoutName) -> Imported:
    """Convert a state dict of another layout into the weights of MaskedAutoencoder(config).

    This works as `encoder_from`, and refuses a file without a decoder. The decoder's position table has to be the fixed
    one.

    Raises:
        ConfigError: As in `encoder_from`; also if the layout or the file has no decoder, or if the config describes a model
            that other layouts cannot hold.
    """
    _check_expressible(config)
    known, decoder = LAYOUTS[layout], decoder_table(layout)
    theirs, names = canonical_names(state_dict, known), _autoencoder_names(config, known.encoder, decoder)
    wanted = {
        known.encoder.positions,
        decoder.positions,
        *(name for group in names.values() for name in group),
    }
    ignored = names_matching(theirs, known.optional_patterns)
    _check_names(theirs, wanted, ignored=ignored, hint=encoder_only_hint(theirs, layout))
    weights = _import_tensors(theirs, names, _autoencoder_shapes(config), config.encoder)
    encoder = _import_positions(
        theirs[known.encoder.positions],
        {"cls_token": weights["encoder.cls_token"]},
        known.encoder,
        config.encoder,
        tolerance=_FROZEN_TOLERANCE,
    )
    stored = theirs[decoder.positions]
    grid, width = config.encoder.grid, config.decoder_embed_dim
    if not _is_position_table(stored, config.encoder, width) or not (
        is_sine_cosine(stored[0, 1:], grid=grid, tolerance=_FROZEN_TOLERANCE)
        and stored[0, 0].abs().max() <= _FROZEN_TOLERANCE
    ):
        raise positions_error(decoder.positions, stored, config.encoder)
    weights |= {f"encoder.{name}": value for name, value in encoder.items()}
    return Imported(weights, tuple(sorted(set(theirs) - wanted)))


def check_encoder(state_dict: Mapping[str, Tensor], config: ViTConfig) -> None:
    """Raise a ConfigError unless a state dict under our names is one of ViTEncoder(config)."""
    shapes = _encoder_shapes(config)
    _check_names(state_dict, shapes)
    _check_shapes(state_dict, shapes)


def check_autoencoder(state_dict: Mapping[str, Tensor], config: MAEConfig) -> None:
    """Raise a ConfigError unless a state dict under our names is one of MaskedAutoencoder(config)."""
    shapes = _autoencoder_shapes(config)
    _check_names(state_dict, shapes)
    _check_shapes(state_dict, shapes)


def from_hf_vitmae(state_dict: Mapping[str, Tensor], config: MAEConfig) -> dict[str, Tensor]:
    """Convert the weights of a Hugging Face ViTMAEForPreTraining into those of MaskedAutoencoder(config).

    The released models were trained with a layer_norm_eps of 1e-6, but Hugging Face configures them with 1e-12; here the
    config decides. Errors are those of `autoencoder_from`.
    """
    return autoencoder_from(state_dict, config, layout="hf_vitmae").weights


def to_timm(state_dict: Mapping[str, Tensor], config: ViTConfig) -> dict[str, Tensor]:
    """Convert the weights of ViTEncoder(config) into those of timm's VisionTransformer with num_classes=0.

    Build the timm model with norms of config.layer_norm_eps.

    Raises:
        ConfigError: Names or shapes do not fit the config, or it has registers or more than one class token.
    """
    return _encoder_to(state_dict, config, layout="timm")


def to_hf_vit(state_dict: Mapping[str, Tensor], config: ViTConfig) -> dict[str, Tensor]:
    """Convert the weights of ViTEncoder(config) into those of ViTModel(..., add_pooling_layer=False).

    The names are those of transformers 5 in memory; `hf_file_names` turns them into those of files.

    Raises:
        ConfigError: Names or shapes do not fit the config, or it has registers or more than one class token.
    """
    return _encoder_to(state_dict, config, layout="hf_vit")


def to_hf_vitmae(state_dict: Mapping[str, Tensor], config: MAEConfig) -> dict[str, Tensor]:
    """Convert the weights of MaskedAutoencoder(config) into those of ViTMAEForPreTraining, including position tables.

    The names are those of transformers 5 in memory; `hf_file_names` turns them into those of files. Tensors that have to
    be split are copied.

    Configure the other model with the same image_size, patch_size, widths, depths, heads, layer_norm_eps, mask_ratio and
    norm_pix_loss. Weights do not carry `masking` and `loss_on`: that model hides patches at random, and its loss is on the
    hidden ones.

    Raises:
        ConfigError: Names or shapes do not fit the config, or the config describes a model that other layouts cannot hold:
            mask tokens in the encoder, a "pca" target, registers, or more than one class token.
    """
    return _autoencoder_to(state_dict, config, layout="hf_vitmae")


def to_official_mae(state_dict: Mapping[str, Tensor], config: MAEConfig) -> dict[str, Tensor]:
    """Convert the weights of MaskedAutoencoder(config) into those of facebookresearch/mae.

    What holds for `to_hf_vitmae` holds here too, except for the names.
    """
    return _autoencoder_to(state_dict, config, layout="official_mae")


def _encoder_to(state_dict: Mapping[str, Tensor], config: ViTConfig, *, layout: LayoutName) -> dict[str, Tensor]:
    _check_prefix(config)
    names = LAYOUTS[layout].encoder
    shapes = _encoder_shapes(config)
    _check_names(state_dict, shapes)
    theirs = _export_tensors(state_dict, tensor_names(names, depth=config.depth), shapes, config)
    return theirs | {names.positions: _export_positions(state_dict["cls_token"], state_dict.get("positions"), config)}


def _autoencoder_to(state_dict: Mapping[str, Tensor], config: MAEConfig, *, layout: LayoutName) -> dict[str, Tensor]:
    _check_expressible(config)
    encoder, decoder = LAYOUTS[layout].encoder, decoder_table(layout)
    shapes = _autoencoder_shapes(config)
    _check_names(state_dict, shapes)
    theirs = _export_tensors(state_dict, _autoencoder_names(config, encoder, decoder), shapes, config.encoder)
    cls_token, mask_token = state_dict["encoder.cls_token"], state_dict["decoder.mask_token"]
    return theirs | {
        encoder.positions: _export_positions(cls_token, state_dict.get("encoder.positions"), config.encoder),
        # the mask token has the decoder's width and dtype, which is all that is taken from it
        decoder.positions: _export_positions(mask_token, None, config.encoder),
    }


def _autoencoder_names(config: MAEConfig, encoder: NameTable, decoder: NameTable) -> dict[str, tuple[str, ...]]:
    parts = (("encoder", encoder, config.encoder.depth), ("decoder", decoder, config.decoder_depth))
    return {
        f"{part}.{ours}": theirs
        for part, names, depth in parts
        for ours, theirs in tensor_names(names, depth=depth).items()
    }


def _encoder_shapes(config: ViTConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in ViTEncoder(config).state_dict().items()}


def _autoencoder_shapes(config: MAEConfig) -> dict[str, torch.Size]:
    generator = torch.Generator("cpu")  # required, but it draws nothing: parameters on the meta device are left alone
    with torch.device("meta"):
        return {
            name: tensor.shape for name, tensor in MaskedAutoencoder(config, generator=generator).state_dict().items()
        }


def _check_names(found: Iterable[str], wanted: Iterable[str], *, ignored: Iterable[str] = (), hint: str = "") -> None:
    found, wanted = set(found), set(wanted)
    missing, unknown = wanted - found, found - wanted - set(ignored)
    if missing or unknown:
        if parts := unsupported_parts(unknown):
            hint = parts_message(parts)
        raise ConfigError(
            f"the weights do not fit the config: missing {format_names(missing)}, unknown {format_names(unknown)}; "
            f"{hint or 'give the config they were trained with, or the complete weights of a plain ViT'}"
        )


def _check_prefix(config: ViTConfig) -> None:
    if config.num_register_tokens:
        raise ConfigError(
            f"num_register_tokens={config.num_register_tokens} cannot be converted: exported layouts have no register tokens; "
            f"keep the file that the encoder was imported from, or export as safetensors"
        )
    if config.cls_tokens != 1:
        raise ConfigError(
            f"cls_tokens={config.cls_tokens} cannot be converted: other layouts hold exactly one class token"
        )


def _check_expressible(config: MAEConfig) -> None:
    _check_prefix(config.encoder)
    if config.encoder_input != "visible":
        raise ConfigError(
            f"encoder_input={config.encoder_input!r} cannot be converted: other layouts have no mask token in the encoder; "
            f"convert only the encoder"
        )
    if config.target == "pca":
        raise ConfigError("target='pca' cannot be converted: other layouts predict pixels; convert only the encoder")


def _foreign_shape(name: str, shape: torch.Size, parts: int, config: ViTConfig) -> tuple[int, ...]:
    """Return the shape of each of the `parts` foreign tensors that make up one of ours."""
    if name.endswith("patch_embed.weight"):
        return shape[0], config.in_channels, config.patch_size, config.patch_size
    return shape[0] // parts, *shape[1:]


def _import_tensors(
    theirs: Mapping[str, Tensor],
    names: Mapping[str, tuple[str, ...]],
    shapes: Mapping[str, torch.Size],
    config: ViTConfig,
) -> dict[str, Tensor]:
    expected = {
        part: _foreign_shape(name, shapes[name], len(group), config) for name, group in names.items() for part in group
    }
    _check_shapes(theirs, expected)
    ours = {
        name: theirs[group[0]] if len(group) == 1 else torch.cat([theirs[part] for part in group])
        for name, group in names.items()
    }
    kernel = next(name for name in names if name.endswith("patch_embed.weight"))
    # our patches order their values by row, column, channel; a convolution's kernel has channels first
    ours[kernel] = ours[kernel].permute(0, 2, 3, 1).flatten(1)  # [D, C, P, P] -> [D, P * P * C]
    return ours


def _export_tensors(
    ours: Mapping[str, Tensor],
    names: Mapping[str, tuple[str, ...]],
    shapes: Mapping[str, torch.Size],
    config: ViTConfig,
) -> dict[str, Tensor]:
    _check_shapes(ours, shapes)
    theirs: dict[str, Tensor] = {}
    for name, group in names.items():
        tensor = ours[name]
        if name.endswith("patch_embed.weight"):
            side = config.patch_size
            tensor = tensor.reshape(len(tensor), side, side, -1).permute(0, 3, 1, 2).contiguous()  # [D, C, P, P]
        # cloned, because safetensors refuses tensors that share memory
        parts = [tensor] if len(group) == 1 else [part.clone() for part in tensor.chunk(len(group))]
        theirs.update(zip(group, parts, strict=True))
    return theirs


def _check_shapes(found: Mapping[str, Tensor], expected: Mapping[str, Iterable[int]]) -> None:
    for name, shape in expected.items():
        tensor = found[name]
        if tuple(tensor.shape) != tuple(shape):
            raise ConfigError(
                f"{name} of shape {tuple(tensor.shape)} should be {tuple(shape)}: give the config the weights were trained with"
            )
        check_floating_point(name, tensor)


def _is_position_table(stored: Tensor, config: ViTConfig, width: int) -> bool:
    return tuple(stored.shape) == (1, 1 + config.num_patches, width) and stored.is_floating_point()


def _scaled(
    weights: Mapping[str, Tensor], theirs: Mapping[str, Tensor], scales: Mapping[str, str]
) -> dict[str, Tensor]:
    """Return the linear layers that a LayerScale follows, with its factors multiplied into them."""
    found: dict[str, Tensor] = {}
    for layer, name in scales.items():
        if name in theirs:
            weight, bias = weights[f"{layer}.weight"], weights[f"{layer}.bias"]
            _check_shapes(theirs, {name: bias.shape})
            factors = theirs[name].float()
            found |= {f"{layer}.weight": factors[:, None] * weight.float(), f"{layer}.bias": factors * bias.float()}
    return found


def _import_positions(
    stored: Tensor, tokens: Mapping[str, Tensor], names: NameTable, config: ViTConfig, *, tolerance: float | None = None
) -> dict[str, Tensor]:
    """Return class and register tokens with their rows of the table added and, if positions are learned, the rest of the table."""
    fixed = config.positions == "sine_cosine"
    rows = stored.shape[1] - config.num_patches if stored.ndim == 3 else -1  # of class and register tokens
    expected = (1, max(0, rows) + config.num_patches, config.embed_dim)
    if rows not in (0, 1, 1 + config.num_register_tokens) or tuple(stored.shape) != expected:
        raise positions_error(names.positions, stored, config)
    check_floating_point(names.positions, stored)
    table = patch_rows(stored, num_patches=config.num_patches)
    if fixed and not is_sine_cosine(table, grid=config.grid, tolerance=tolerance):
        raise positions_error(names.positions, stored, config)
    found = {"cls_token": tokens["cls_token"] + stored[:, :1]} if rows else {}
    if rows > 1:
        found["register_tokens"] = tokens["register_tokens"] + stored[:, 1:rows]
    return found if fixed else found | {"positions": table.clone()}  # a slice would keep the whole stored table alive


def _export_positions(like: Tensor, learned: Tensor | None, config: ViTConfig) -> Tensor:
    """Return the position table [1, 1 + L, D] that other layouts store, with a zero row for the class token.

    Width, dtype and device are those of `like` [1, 1, D].
    """
    table = sine_cosine_2d(config.grid, like.shape[2]) if learned is None else learned
    # the zero row keeps the class token as it is, since its position was added on import
    return torch.cat([torch.zeros_like(like[0]), table.to(like)])[None]
