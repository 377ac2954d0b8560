"""What four kinds of weight files call their tensors: tables, and the names of a file brought into a table's spelling.

    official_mae  facebookresearch/mae, encoder and decoder           hf_vitmae  transformers ViTMAEForPreTraining
    timm          timm VisionTransformer; the official encoder alone  hf_vit     transformers ViTModel, ViTMAEModel
                  (pretrained or fine-tuned) has these very names                and what holds one as `vit.`
Shapes: a `name.*` of a table stands for name.weight and name.bias. A fused qkv [3D, D] here is q, k and v [D, D] at Hugging
        Face. A position table is [1, 1 + L, D], the class token's row first.
Errors: ConfigError for names that fit no layout, or that mean one tensor twice.
Source: the names found in files of each kind; Hugging Face: parameter names of transformers 5 in memory, of 5 on disk,
and of the released facebook/vit-mae-* files (4.x)."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Literal, TypeVar

from mae_core.errors import ConfigError

LayoutName = Literal["official_mae", "timm", "hf_vit", "hf_vitmae"]

Value = TypeVar("Value")

WRAPPERS = ("module.", "model.", "encoder.")
"""Prefixes that a wrapper puts before every name (DistributedDataParallel, a training module): taken off when all carry it."""


@dataclass(frozen=True, kw_only=True)
class Half:
    """Names of an encoder or of a decoder, ours -> theirs. Shapes: the module's. Errors: none. Source: the module's."""

    names: Mapping[str, str]
    """Everything outside blocks."""
    blocks: str
    """Where blocks are: `blocks` for blocks.0, blocks.1, ...; ours are `blocks`."""
    block: Mapping[str, tuple[str, ...]]
    """A block's modules -> those whose tensors, one under the other, they hold."""
    positions: str
    """The position table."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One kind of file. Shapes: the module's. Errors: none. Source: the module's."""

    encoder: Half
    decoder: Half | None = None
    decoder_names: tuple[str, ...] = ()
    """Patterns of the decoder's names: what an import of the encoder alone leaves out, and reports."""
    optional: tuple[str, ...] = ()
    """Patterns of names that are no part of an encoder and may stand beside it: left out, and reported."""
    spellings: tuple[tuple[str, str], ...] = ()
    """Patterns and what they become, in this order: turns a spelling of files into that of the table."""


_FUSED_BLOCK = {name: (name,) for name in ("norm1.*", "attn.qkv.*", "attn.proj.*", "norm2.*", "mlp.fc1.*", "mlp.fc2.*")}
_SPLIT_BLOCK = {
    "norm1.*": ("layernorm_before.*",),
    "attn.qkv.*": ("attention.q_proj.*", "attention.k_proj.*", "attention.v_proj.*"),
    "attn.proj.*": ("attention.o_proj.*",),
    "norm2.*": ("layernorm_after.*",),
    "mlp.fc1.*": ("mlp.fc1.*",),
    "mlp.fc2.*": ("mlp.fc2.*",),
}
_HF_BLOCK_SPELLINGS = (
    (r"\.attention\.attention\.query\.", ".attention.q_proj."),
    (r"\.attention\.attention\.key\.", ".attention.k_proj."),
    (r"\.attention\.attention\.value\.", ".attention.v_proj."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
)

_TIMM_ENCODER = Half(
    names={"cls_token": "cls_token", "patch_embed.*": "patch_embed.proj.*", "norm.*": "norm.*"},
    blocks="blocks",
    block=_FUSED_BLOCK,
    positions="pos_embed",
)


def _hf_encoder(prefix: str) -> Half:
    return Half(
        names={
            "cls_token": f"{prefix}embeddings.cls_token",
            "patch_embed.*": f"{prefix}embeddings.patch_embeddings.projection.*",
            "norm.*": f"{prefix}layernorm.*",
        },
        blocks=f"{prefix}layers",
        block=_SPLIT_BLOCK,
        positions=f"{prefix}embeddings.position_embeddings",
    )


LAYOUTS: Mapping[LayoutName, Layout] = MappingProxyType(
    {
        "official_mae": Layout(
            encoder=_TIMM_ENCODER,
            decoder=Half(
                names={
                    "mask_token": "mask_token",
                    "embed.*": "decoder_embed.*",
                    "norm.*": "decoder_norm.*",
                    "head.*": "decoder_pred.*",
                },
                blocks="decoder_blocks",
                block=_FUSED_BLOCK,
                positions="decoder_pos_embed",
            ),
            decoder_names=("decoder_*", "mask_token"),
        ),
        # fc_norm is a norm of the mean of tokens: it is no replacement for `norm`, which stays required
        "timm": Layout(encoder=_TIMM_ENCODER, optional=("head.*", "fc_norm.*")),
        "hf_vitmae": Layout(
            encoder=_hf_encoder("vit."),
            decoder=Half(
                names={
                    "mask_token": "decoder.mask_token",
                    "embed.*": "decoder.decoder_embed.*",
                    "norm.*": "decoder.decoder_norm.*",
                    "head.*": "decoder.decoder_pred.*",
                },
                blocks="decoder.decoder_layers",
                block=_SPLIT_BLOCK,
                positions="decoder.decoder_pos_embed",
            ),
            decoder_names=("decoder.*",),
            spellings=(
                (r"^vit\.encoder\.layer\.", "vit.layers."),
                (r"^decoder\.decoder_encoder\.layer\.", "decoder.decoder_layers."),
                *_HF_BLOCK_SPELLINGS,
            ),
        ),
        "hf_vit": Layout(
            encoder=_hf_encoder(""),
            optional=("pooler.dense.*", "classifier.*"),
            spellings=((r"^vit\.", ""), (r"^encoder\.layer\.", "layers."), *_HF_BLOCK_SPELLINGS),
        ),
    }
)
"""Layouts with a decoder stand before those without, which fit their encoders too."""

_HF_FILE_SPELLINGS = (
    (r"^(vit\.|)layers\.", r"\1encoder.layer."),
    (r"^decoder\.decoder_layers\.", "decoder.decoder_encoder.layer."),
    (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."),
    (r"\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)


def names_of(half: Half, *, depth: int) -> dict[str, tuple[str, ...]]:
    """Our name -> their names whose tensors, one under the other, it holds; the position table is apart.

    Shapes: depth blocks. Errors: none. Source: the module's.
    """
    pairs: list[tuple[str, tuple[str, ...]]] = [(ours, (theirs,)) for ours, theirs in half.names.items()]
    for index in range(depth):
        here, there = f"blocks.{index}.", f"{half.blocks}.{index}."
        pairs += [(here + ours, tuple(there + name for name in theirs)) for ours, theirs in half.block.items()]
    names: dict[str, tuple[str, ...]] = {}
    for ours, theirs in pairs:
        for kind in ("weight", "bias") if ours.endswith(".*") else ("",):
            names[ours.replace("*", kind)] = tuple(name.replace("*", kind) for name in theirs)
    return names


def depth_of(names: Iterable[str], half: Half) -> int:
    """How many blocks stand there: one more than the highest number. Shapes, errors: none. Source: none."""
    pattern = re.compile(rf"{re.escape(half.blocks)}\.(\d+)\.")
    return max((int(found[1]) + 1 for name in names if (found := pattern.match(name))), default=0)


def matching(names: Iterable[str], patterns: Iterable[str]) -> set[str]:
    """The names that fit one of the patterns, which are those of fnmatch. Shapes, errors: none. Source: none."""
    patterns = tuple(patterns)
    return {name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)}


def spelled(state_dict: Mapping[str, Value], layout: Layout) -> dict[str, Value]:
    """The same under the table's spelling: wrappers' prefixes are off, older spellings are turned into the current one.

    Shapes: untouched. Errors: ConfigError when two names mean the same. Source: the module's.
    """
    found: dict[str, Value] = {}
    for name, value in _unwrapped(state_dict).items():
        current = name
        for pattern, new in layout.spellings:
            current = re.sub(pattern, new, current)
        if current in found:
            raise ConfigError(f"the weights hold {current} twice, once as {name}: remove one of them")
        found[current] = value
    return found


def detect_layout(names: Iterable[str]) -> LayoutName:
    """Which layout the names of a file are in. An official MAE file without its decoder has the names of `timm`.

    Shapes: none. Errors: ConfigError listing the known layouts. Source: the module's.
    """
    given = dict.fromkeys(names, None)
    for title, layout in LAYOUTS.items():
        found = spelled(given, layout)
        patch_embed = layout.encoder.names["patch_embed.*"].replace("*", "weight")
        if patch_embed in found and (layout.decoder is None or matching(found, layout.decoder_names)):
            return title
    raise ConfigError(
        f"weights named {', '.join(sorted(given)[:4]) or '(none)'} ... are in no known layout: known are "
        f"official_mae (facebookresearch/mae), timm (VisionTransformer), hf_vit (transformers ViTModel), "
        f"hf_vitmae (transformers ViTMAEForPreTraining)"
    )


def hf_file_names(state_dict: Mapping[str, Value]) -> dict[str, Value]:
    """Names of transformers 5 in memory as those of its files, which transformers 4 reads as well.

    Shapes: untouched. Errors: none. Source: what save_pretrained of 5.23 writes, and the released files.
    """
    found: dict[str, Value] = {}
    for name, value in state_dict.items():
        current = name
        for pattern, new in _HF_FILE_SPELLINGS:
            current = re.sub(pattern, new, current)
        found[current] = value
    return found


def _unwrapped(state_dict: Mapping[str, Value]) -> Mapping[str, Value]:
    while state_dict:
        prefix = next((wrap for wrap in WRAPPERS if all(name.startswith(wrap) for name in state_dict)), None)
        if prefix is None:
            break
        state_dict = {name.removeprefix(prefix): value for name, value in state_dict.items()}
    return state_dict
