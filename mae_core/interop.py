"""Names and shapes of other people's MAE weights, and ours: pure mappings from state dict to state dict.

Shapes: a fused qkv.weight [3D, D] here is q, k and v [D, D] each there; patch_embed.weight [D, P * P * C] here is a kernel
        [D, C, P, P] there; position tables [1, 1 + L, D] are stored there and computed here.
Errors: ConfigError listing missing and unknown names, or naming a position table that is not the fixed one.
Source: Hugging Face transformers, ViTMAEForPreTraining: parameter names of 5.x in memory, of 5.x on disk, and of the
released facebook/vit-mae-* files (4.x)."""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from mae_core.config import MAEConfig
from mae_core.errors import ConfigError
from mae_core.positions import sine_cosine_2d

_PATCH_EMBED = "encoder.patch_embed.weight"
_POSITIONS = ("vit.embeddings.position_embeddings", "decoder.decoder_pos_embed")
_POSITION_TOLERANCE = 4e-3
"""Half a step of bfloat16 below 1 is 2e-3; trained or one-dimensional positions differ by tenths."""

_OLDER_SPELLINGS = (  # tried in this order; each turns a spelling of files into that of transformers 5 in memory
    (r"^vit\.encoder\.layer\.", "vit.layers."),
    (r"^decoder\.decoder_encoder\.layer\.", "decoder.decoder_layers."),
    (r"\.attention\.attention\.query\.", ".attention.q_proj."),
    (r"\.attention\.attention\.key\.", ".attention.k_proj."),
    (r"\.attention\.attention\.value\.", ".attention.v_proj."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
)


def _names(config: MAEConfig) -> dict[str, tuple[str, ...]]:
    """Our name -> the Hugging Face names whose tensors, one under the other, it holds."""
    modules: dict[str, tuple[str, ...]] = {
        "encoder.patch_embed": ("vit.embeddings.patch_embeddings.projection",),
        "encoder.norm": ("vit.layernorm",),
        "decoder.embed": ("decoder.decoder_embed",),
        "decoder.norm": ("decoder.decoder_norm",),
        "decoder.head": ("decoder.decoder_pred",),
    }
    for ours, theirs, depth in (
        ("encoder.blocks", "vit.layers", config.encoder.depth),
        ("decoder.blocks", "decoder.decoder_layers", config.decoder_depth),
    ):
        for block in range(depth):
            here, there = f"{ours}.{block}", f"{theirs}.{block}"
            modules[f"{here}.norm1"] = (f"{there}.layernorm_before",)
            modules[f"{here}.attn.qkv"] = tuple(f"{there}.attention.{part}_proj" for part in "qkv")
            modules[f"{here}.attn.proj"] = (f"{there}.attention.o_proj",)
            modules[f"{here}.norm2"] = (f"{there}.layernorm_after",)
            modules[f"{here}.mlp.fc1"] = (f"{there}.mlp.fc1",)
            modules[f"{here}.mlp.fc2"] = (f"{there}.mlp.fc2",)
    tokens = {
        "encoder.cls_token": ("vit.embeddings.cls_token",),
        "decoder.mask_token": ("decoder.mask_token",),
    }
    return tokens | {
        f"{ours}.{kind}": tuple(f"{name}.{kind}" for name in theirs)
        for ours, theirs in modules.items()
        for kind in ("weight", "bias")
    }


def _position_tables(config: MAEConfig) -> dict[str, Tensor]:
    """The tables Hugging Face stores, class token's zero row first: two [1, 1 + L, D]."""
    widths = (config.encoder.embed_dim, config.decoder_embed_dim)
    tables = (sine_cosine_2d(config.encoder.grid, width) for width in widths)
    return {
        name: torch.cat([torch.zeros(1, table.shape[1]), table])[None]
        for name, table in zip(_POSITIONS, tables, strict=True)
    }


def _check_names(found: Iterable[str], expected: Iterable[str]) -> None:
    found, expected = set(found), set(expected)
    if found != expected:
        raise ConfigError(
            f"the weights do not fit the config: missing {sorted(expected - found)}, unknown {sorted(found - expected)}; "
            f"give the config they were trained with"
        )


def _current_spelling(name: str) -> str:
    for old, new in _OLDER_SPELLINGS:
        name = re.sub(old, new, name)
    return name


def from_hf_vitmae(state_dict: Mapping[str, Tensor], config: MAEConfig) -> dict[str, Tensor]:
    """Weights of a Hugging Face ViTMAEForPreTraining as those of MaskedAutoencoder(config).

    Accepts all three spellings of the module's docstring; values and dtypes are kept (single tensors are shared, not copied).
    The released models were trained with layer_norm_eps 1e-6 and are configured with 1e-12 over there: config decides here.
    Errors: ConfigError for missing or unknown names, or positions other than the fixed table of config's grid.
    Source: see the module.
    """
    theirs = {_current_spelling(name): tensor for name, tensor in state_dict.items()}
    names, tables = _names(config), _position_tables(config)
    _check_names(theirs, [*tables, *(name for group in names.values() for name in group)])
    for name, table in tables.items():
        stored = theirs[name].float().cpu()
        if stored.shape != table.shape or not torch.allclose(stored, table, rtol=0, atol=_POSITION_TOLERANCE):
            raise ConfigError(
                f"{name} of shape {tuple(stored.shape)} is not the fixed sine-cosine table of grid="
                f"{config.encoder.grid}: set image_size and patch_size to those of the weights; trained positions "
                f"cannot be taken over"
            )
    ours = {
        name: theirs[group[0]] if len(group) == 1 else torch.cat([theirs[part] for part in group])
        for name, group in names.items()
    }
    ours[_PATCH_EMBED] = ours[_PATCH_EMBED].permute(0, 2, 3, 1).flatten(1)  # [D, C, P, P] -> [D, P * P * C]
    return ours


def to_hf_vitmae(state_dict: Mapping[str, Tensor], config: MAEConfig) -> dict[str, Tensor]:
    """Weights of MaskedAutoencoder(config) as those of ViTMAEForPreTraining, in transformers 5's names, position tables added.

    Set image_size, patch_size, widths, depths, heads, layer_norm_eps, mask_ratio and norm_pix_loss over there like config.
    Shapes: see the module; tensors that are split are copies. Errors: ConfigError for missing or unknown names.
    Source: see the module.
    """
    names = _names(config)
    _check_names(state_dict, names)
    theirs: dict[str, Tensor] = {}
    for name, group in names.items():
        tensor = state_dict[name]
        if name == _PATCH_EMBED:
            side = config.encoder.patch_size
            tensor = tensor.reshape(len(tensor), side, side, -1).permute(0, 3, 1, 2).contiguous()  # [D, C, P, P]
        parts = [tensor] if len(group) == 1 else [part.clone() for part in tensor.chunk(len(group))]
        theirs.update(zip(group, parts, strict=True))
    weight = state_dict[_PATCH_EMBED]
    return theirs | {name: table.to(weight) for name, table in _position_tables(config).items()}
