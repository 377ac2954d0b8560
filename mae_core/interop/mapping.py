"""Weights carried over from other layouts and into them: every name accounted for, no bit changed.

Shapes: patch_embed.weight [D, P * P * C] here is a kernel [D, C, P, P] there; qkv [3D, D] here is q, k and v [D, D] at Hugging
        Face; position tables [1, 1 + L, D] are stored there, computed here or, when learned, kept as [L, D].
Errors: ConfigError listing missing and unknown names or wrong shapes, or naming a position table that is not the fixed one.
Source: the names: mae_core.interop.layouts.

The class token has no position here. Its row of a learned table is added to the token, which is what the other programs do at
every pass; exported tables have a zero row."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from mae_core.config import MAEConfig, ViTConfig
from mae_core.errors import ConfigError
from mae_core.interop.infer import decoder_of, encoder_alone_hint, is_fixed, listed, other_positions
from mae_core.interop.layouts import LAYOUTS, Half, LayoutName, matching, names_of, spelled
from mae_core.mae import MaskedAutoencoder
from mae_core.positions import sine_cosine_2d
from mae_core.vit import ViTEncoder

_FROZEN_TOLERANCE = 4e-3
"""For tables that no autoencoder trains: half a step of bfloat16 below 1 is 2e-3; one-dimensional positions differ by tenths."""


class Imported(NamedTuple):
    """Weights by our names, and what of the file is not among them.

    Shapes, errors and source: the module's.
    """

    weights: dict[str, Tensor]
    left_out: tuple[str, ...]  # names in the layout's spelling, all of them declared in its table


def encoder_from(state_dict: Mapping[str, Tensor], config: ViTConfig, *, layout: LayoutName) -> Imported:
    """Weights of ViTEncoder(config). Values and dtypes are kept; single tensors are shared with state_dict, not copied.

    A decoder, a pooler or a classification head is left out and reported. With config.positions "learned" the stored table
    becomes a weight, otherwise it must be the fixed one. Shapes, errors and source: the module's.
    """
    table = LAYOUTS[layout]
    theirs, names = spelled(state_dict, table), names_of(table.encoder, depth=config.depth)
    may_stay = matching(theirs, (*table.decoder_names, *table.optional))
    wanted = {table.encoder.positions, *(name for group in names.values() for name in group)}
    pooled = "fc_norm.weight" in theirs and "norm.weight" not in theirs
    hint = "fc_norm normalises the mean of the tokens, and these weights have no norm of tokens" if pooled else ""
    _check_names(theirs, wanted, may_stay=may_stay, hint=hint)
    weights = _taken(theirs, names, _encoder_shapes(config), config)
    weights |= _positions_taken(theirs[table.encoder.positions], weights["cls_token"], table.encoder, config)
    return Imported(weights, tuple(sorted(set(theirs) - wanted)))


def autoencoder_from(state_dict: Mapping[str, Tensor], config: MAEConfig, *, layout: LayoutName) -> Imported:
    """Weights of MaskedAutoencoder(config), as `encoder_from`: a file without its decoder is refused.

    Shapes, errors and source: the module's.
    """
    _check_expressible(config)
    table, decoder = LAYOUTS[layout], decoder_of(layout)
    theirs, names = spelled(state_dict, table), _autoencoder_names(config, table.encoder, decoder)
    wanted = {
        table.encoder.positions,
        decoder.positions,
        *(name for group in names.values() for name in group),
    }
    _check_names(theirs, wanted, may_stay=matching(theirs, table.optional), hint=encoder_alone_hint(theirs, layout))
    weights = _taken(theirs, names, _autoencoder_shapes(config), config.encoder)
    encoder = _positions_taken(
        theirs[table.encoder.positions],
        weights["encoder.cls_token"],
        table.encoder,
        config.encoder,
        tolerance=_FROZEN_TOLERANCE,
    )
    stored = theirs[decoder.positions]
    grid, width = config.encoder.grid, config.decoder_embed_dim
    if not _fits(stored, config.encoder, width) or not (
        is_fixed(stored[0, 1:], grid=grid, tolerance=_FROZEN_TOLERANCE)
        and stored[0, 0].abs().max() <= _FROZEN_TOLERANCE
    ):
        raise other_positions(decoder.positions, stored, config.encoder)
    weights |= {f"encoder.{name}": value for name, value in encoder.items()}
    return Imported(weights, tuple(sorted(set(theirs) - wanted)))


def from_hf_vitmae(state_dict: Mapping[str, Tensor], config: MAEConfig) -> dict[str, Tensor]:
    """Weights of a Hugging Face ViTMAEForPreTraining as those of MaskedAutoencoder(config), see `autoencoder_from`.

    The released models were trained with layer_norm_eps 1e-6 and are configured with 1e-12 over there: config decides here.
    Shapes, errors and source: the module's.
    """
    return autoencoder_from(state_dict, config, layout="hf_vitmae").weights


def to_timm(state_dict: Mapping[str, Tensor], config: ViTConfig) -> dict[str, Tensor]:
    """Weights of ViTEncoder(config) as those of timm's VisionTransformer with num_classes=0; its norms must use config's eps.

    Shapes, errors and source: the module's; also ConfigError for more than one class token.
    """
    return _encoder_to(state_dict, config, layout="timm")


def to_hf_vit(state_dict: Mapping[str, Tensor], config: ViTConfig) -> dict[str, Tensor]:
    """Weights of ViTEncoder(config) as those of ViTModel(..., add_pooling_layer=False), in transformers 5's names in memory.

    Shapes, errors and source: as `to_timm`.
    """
    return _encoder_to(state_dict, config, layout="hf_vit")


def to_hf_vitmae(state_dict: Mapping[str, Tensor], config: MAEConfig) -> dict[str, Tensor]:
    """Weights of MaskedAutoencoder(config) as those of ViTMAEForPreTraining, in transformers 5's names, position tables added.

    Set image_size, patch_size, widths, depths, heads, layer_norm_eps, mask_ratio and norm_pix_loss over there like config.
    Masking and what the loss is taken on are not in weights: over there patches are hidden at random and judged alone.
    Shapes: see the module; tensors that are split are copies. Errors: the module's; also ConfigError for a config with
    mask tokens in the encoder, a target that is no pixels, or more than one class token. Source: see the module.
    """
    return _autoencoder_to(state_dict, config, layout="hf_vitmae")


def to_official_mae(state_dict: Mapping[str, Tensor], config: MAEConfig) -> dict[str, Tensor]:
    """Weights of MaskedAutoencoder(config) by the names of facebookresearch/mae. Shapes, errors, source: as `to_hf_vitmae`."""
    return _autoencoder_to(state_dict, config, layout="official_mae")


def _encoder_to(state_dict: Mapping[str, Tensor], config: ViTConfig, *, layout: LayoutName) -> dict[str, Tensor]:
    _check_class_tokens(config)
    half = LAYOUTS[layout].encoder
    shapes = _encoder_shapes(config)
    _check_names(state_dict, shapes)
    theirs = _given(state_dict, names_of(half, depth=config.depth), shapes, config)
    return theirs | {half.positions: _positions_given(state_dict["cls_token"], state_dict.get("positions"), config)}


def _autoencoder_to(state_dict: Mapping[str, Tensor], config: MAEConfig, *, layout: LayoutName) -> dict[str, Tensor]:
    _check_expressible(config)
    encoder, decoder = LAYOUTS[layout].encoder, decoder_of(layout)
    shapes = _autoencoder_shapes(config)
    _check_names(state_dict, shapes)
    theirs = _given(state_dict, _autoencoder_names(config, encoder, decoder), shapes, config.encoder)
    cls_token, mask_token = state_dict["encoder.cls_token"], state_dict["decoder.mask_token"]
    return theirs | {
        encoder.positions: _positions_given(cls_token, state_dict.get("encoder.positions"), config.encoder),
        decoder.positions: _positions_given(mask_token, None, config.encoder),
    }


def _autoencoder_names(config: MAEConfig, encoder: Half, decoder: Half) -> dict[str, tuple[str, ...]]:
    halves = (("encoder", encoder, config.encoder.depth), ("decoder", decoder, config.decoder_depth))
    return {
        f"{part}.{ours}": theirs for part, half, depth in halves for ours, theirs in names_of(half, depth=depth).items()
    }


def _encoder_shapes(config: ViTConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in ViTEncoder(config).state_dict().items()}


def _autoencoder_shapes(config: MAEConfig) -> dict[str, torch.Size]:
    generator = torch.Generator("cpu")  # draws nothing: parameters on the meta device are left alone
    with torch.device("meta"):
        return {
            name: tensor.shape for name, tensor in MaskedAutoencoder(config, generator=generator).state_dict().items()
        }


def _check_names(found: Iterable[str], wanted: Iterable[str], *, may_stay: Iterable[str] = (), hint: str = "") -> None:
    found, wanted = set(found), set(wanted)
    missing, unknown = wanted - found, found - wanted - set(may_stay)
    if missing or unknown:
        raise ConfigError(
            f"the weights do not fit the config: missing {listed(missing)}, unknown {listed(unknown)}; "
            f"{hint or 'give the config they were trained with'}"
        )


def _check_class_tokens(config: ViTConfig) -> None:
    if config.cls_tokens != 1:
        raise ConfigError(f"cls_tokens={config.cls_tokens}: the other layouts have room for one class token alone")


def _check_expressible(config: MAEConfig) -> None:
    _check_class_tokens(config.encoder)
    if config.encoder_input != "visible":
        raise ConfigError(
            f"encoder_input={config.encoder_input!r}: other layouts have no mask token in the encoder; carry the encoder alone"
        )
    if config.target == "pca":
        raise ConfigError("target='pca': other layouts predict pixels; carry the encoder alone")


def _their_shape(name: str, shape: torch.Size, parts: int, config: ViTConfig) -> tuple[int, ...]:
    """Shape of each of the `parts` tensors that make up ours."""
    if name.endswith("patch_embed.weight"):
        return shape[0], config.in_channels, config.patch_size, config.patch_size
    return shape[0] // parts, *shape[1:]


def _taken(
    theirs: Mapping[str, Tensor],
    names: Mapping[str, tuple[str, ...]],
    shapes: Mapping[str, torch.Size],
    config: ViTConfig,
) -> dict[str, Tensor]:
    expected = {
        part: _their_shape(name, shapes[name], len(group), config) for name, group in names.items() for part in group
    }
    _check_shapes(theirs, expected)
    ours = {
        name: theirs[group[0]] if len(group) == 1 else torch.cat([theirs[part] for part in group])
        for name, group in names.items()
    }
    kernel = next(name for name in names if name.endswith("patch_embed.weight"))
    ours[kernel] = ours[kernel].permute(0, 2, 3, 1).flatten(1)  # [D, C, P, P] -> [D, P * P * C]
    return ours


def _given(
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
        if not tensor.is_floating_point():
            raise ConfigError(
                f"{name} is {tensor.dtype}, no floating point: take the weights before they were quantised"
            )


def _fits(stored: Tensor, config: ViTConfig, width: int) -> bool:
    return tuple(stored.shape) == (1, 1 + config.num_patches, width) and stored.is_floating_point()


def _positions_taken(
    stored: Tensor, cls_token: Tensor, half: Half, config: ViTConfig, *, tolerance: float | None = None
) -> dict[str, Tensor]:
    """The class token with its row, and the rest when it is learned."""
    fixed = config.positions == "sine_cosine"
    if not _fits(stored, config, config.embed_dim) or (
        fixed and not is_fixed(stored[0, 1:], grid=config.grid, tolerance=tolerance)
    ):
        raise other_positions(half.positions, stored, config)
    token = {"cls_token": cls_token + stored[:, :1]}
    return token if fixed else token | {"positions": stored[0, 1:].clone()}


def _positions_given(like: Tensor, learned: Tensor | None, config: ViTConfig) -> Tensor:
    """The table that others store, [1, 1 + L, D], class token's zero row first; width, dtype and device of `like` [1, 1, D]."""
    table = sine_cosine_2d(config.grid, like.shape[2]) if learned is None else learned
    return torch.cat([torch.zeros_like(like[0]), table.to(like)])[None]
