"""The tensor names of five kinds of weight files, as tables, and the renaming of a file's tensors to match its table.

- `official_mae`: facebookresearch/mae, encoder and decoder.
- `timm`: timm's VisionTransformer. The official encoder alone, pretrained or fine-tuned, has the same names, and so has DINOv2's.
- `hf_vitmae`: transformers' ViTMAEForPreTraining.
- `hf_vit`: transformers' ViTModel and ViTMAEModel, and any model that holds one as `vit.`.
- `hf_dinov2`: transformers' Dinov2Model and Dinov2WithRegistersModel.

"Ours" are the names of this project, "theirs" those of a layout. In a table, `name.*` means name.weight and name.bias.

Shapes: our fused qkv [3D, D] is q, k and v, [D, D] each, at Hugging Face. Stored position tables are [1, 1 + L, D], the row
of the class token first, [1, 1 + r + L, D] where r register tokens have rows too, or [1, L, D] where neither has one.

Source: the names found in files of each kind. For Hugging Face these are the parameter names of transformers 5 in memory,
of transformers 5 on disk, and of the released facebook/vit-mae-* files (transformers 4)."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Literal, TypeVar

from mae_core.errors import ConfigError

LayoutName = Literal["official_mae", "timm", "hf_vit", "hf_vitmae", "hf_dinov2"]

Value = TypeVar("Value")

_WRAPPERS = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Parts of names that torch.compile, FSDP and activation checkpointing add wherever they wrap a module, be it the whole model or
one block. No model has them of its own."""

_PATCH_EMBED = re.compile(
    r"(?P<prefix>(?:.*\.)?)(?P<name>(?:patch_embed\.(?:proj\.)?|embeddings\.patch_embeddings\.projection\.)weight)"
)
"""A name of the patch embedding: timm's, Hugging Face's or ours. What precedes it precedes every name of that encoder."""

_AUTOENCODERS = {
    "embeddings.patch_embeddings.projection.weight": ("vit.", "decoder.decoder_"),
    "patch_embed.weight": ("encoder.", "decoder."),
}
"""The prefix of an autoencoder's encoder, and how its decoder's names begin, by the patch embedding's name: Hugging Face, ours."""


@dataclass(frozen=True, kw_only=True)
class NameTable:
    """The names of an encoder's or a decoder's tensors, as a mapping from ours to theirs."""

    names: Mapping[str, str]
    """Names outside the blocks, ours -> theirs."""
    blocks: str
    """Their prefix of the blocks: `blocks` means blocks.0, blocks.1, ..., as ours do."""
    block: Mapping[str, tuple[str, ...]]
    """Names within a block, ours -> theirs. One of ours may hold several of theirs, concatenated along the first axis."""
    positions: str
    """Their name of the position table."""
    registers: str = ""
    """Their name of the register tokens, if an encoder of theirs can have some."""
    layer_scales: Mapping[str, str] = field(default_factory=dict)
    """Our linear layers within a block -> their names of the factors on the layer's outputs (LayerScale), if there can be some."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The names in one kind of weight file."""

    encoder: NameTable
    """Names of the encoder."""
    decoder: NameTable | None = None
    """Names of the decoder, or None for a kind of file that holds encoders only."""
    decoder_patterns: tuple[str, ...] = ()
    """fnmatch patterns of the decoder's names. An import of the encoder alone leaves them out and reports them."""
    optional_patterns: tuple[str, ...] = ()
    """fnmatch patterns of names that may accompany an encoder without being part of it, such as a head. Every import leaves
    them out and reports them."""
    recognised_by: tuple[str, ...] = ()
    """fnmatch patterns. A file is of this layout only if one of its names matches, or if there are none."""
    renames: tuple[tuple[str, str], ...] = ()
    """Regular expressions and their replacements, applied in order: they turn older spellings into that of the tables."""


_FUSED_BLOCK = {name: (name,) for name in ("norm1.*", "attn.qkv.*", "attn.proj.*", "norm2.*", "mlp.fc1.*", "mlp.fc2.*")}
_SPLIT_BLOCK = {
    "norm1.*": ("layernorm_before.*",),
    "attn.qkv.*": ("attention.q_proj.*", "attention.k_proj.*", "attention.v_proj.*"),
    "attn.proj.*": ("attention.o_proj.*",),
    "norm2.*": ("layernorm_after.*",),
    "mlp.fc1.*": ("mlp.fc1.*",),
    "mlp.fc2.*": ("mlp.fc2.*",),
}
_DINOV2_BLOCK = {**_SPLIT_BLOCK, "norm1.*": ("norm1.*",), "norm2.*": ("norm2.*",)}
# "attention.output.dense" must come before "output.dense", which matches its end
_HF_BLOCK_RENAMES = (
    (r"\.attention\.attention\.query\.", ".attention.q_proj."),
    (r"\.attention\.attention\.key\.", ".attention.k_proj."),
    (r"\.attention\.attention\.value\.", ".attention.v_proj."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
)

_TIMM_ENCODER = NameTable(
    names={"cls_token": "cls_token", "patch_embed.*": "patch_embed.proj.*", "norm.*": "norm.*"},
    blocks="blocks",
    block=_FUSED_BLOCK,
    positions="pos_embed",
    registers="reg_token",
    layer_scales={"attn.proj": "ls1.gamma", "mlp.fc2": "ls2.gamma"},
)


def _hf_encoder(prefix: str, block: Mapping[str, tuple[str, ...]] = _SPLIT_BLOCK) -> NameTable:
    return NameTable(
        names={
            "cls_token": f"{prefix}embeddings.cls_token",
            "patch_embed.*": f"{prefix}embeddings.patch_embeddings.projection.*",
            "norm.*": f"{prefix}layernorm.*",
        },
        blocks=f"{prefix}layers",
        block=block,
        positions=f"{prefix}embeddings.position_embeddings",
    )


LAYOUTS: Mapping[LayoutName, Layout] = MappingProxyType(
    {
        "official_mae": Layout(
            encoder=_TIMM_ENCODER,
            decoder=NameTable(
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
            decoder_patterns=("decoder_*", "mask_token"),
            recognised_by=("decoder_*",),
        ),
        # fc_norm normalises the mean of the tokens, so it cannot replace `norm`, which stays required
        "timm": Layout(
            encoder=_TIMM_ENCODER,
            optional_patterns=("head.*", "fc_norm.*", "mask_token"),
            renames=((r"^register_tokens$", "reg_token"),),
        ),
        "hf_vitmae": Layout(
            encoder=_hf_encoder("vit."),
            decoder=NameTable(
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
            decoder_patterns=("decoder.*",),
            recognised_by=("decoder.*",),
            optional_patterns=("vit.embeddings.mask_token",),
            renames=(
                (r"^vit\.encoder\.layer\.", "vit.layers."),
                (r"^decoder\.decoder_encoder\.layer\.", "decoder.decoder_layers."),
                *_HF_BLOCK_RENAMES,
            ),
        ),
        "hf_dinov2": Layout(
            encoder=replace(
                _hf_encoder("", _DINOV2_BLOCK),
                registers="embeddings.register_tokens",
                layer_scales={"attn.proj": "layer_scale1.lambda1", "mlp.fc2": "layer_scale2.lambda1"},
            ),
            optional_patterns=("classifier.*", "embeddings.mask_token"),
            recognised_by=("*.layer_scale1.lambda1",),
            renames=((r"^dinov2(_with_registers)?\.", ""), (r"^encoder\.layer\.", "layers."), *_HF_BLOCK_RENAMES),
        ),
        "hf_vit": Layout(
            encoder=_hf_encoder(""),
            optional_patterns=("pooler.dense.*", "classifier.*", "embeddings.mask_token"),
            renames=((r"^vit\.", ""), (r"^encoder\.layer\.", "layers."), *_HF_BLOCK_RENAMES),
        ),
    }
)
"""The known layouts. Those that more is needed to recognise come first, because `detect_layout` takes the first match and the
others match their encoders too."""

_HF_FILE_RENAMES = (
    (r"^(vit\.|)layers\.", r"\1encoder.layer."),
    (r"^decoder\.decoder_layers\.", "decoder.decoder_encoder.layer."),
    (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."),
    (r"\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)


def tensor_names(table: NameTable, *, depth: int) -> dict[str, tuple[str, ...]]:
    """Expand a table to `depth` blocks: our tensor name -> their names whose tensors it holds, concatenated.

    The position table is not among them.
    """
    pairs: list[tuple[str, tuple[str, ...]]] = [(ours, (theirs,)) for ours, theirs in table.names.items()]
    for index in range(depth):
        here, there = f"blocks.{index}.", f"{table.blocks}.{index}."
        pairs += [(here + ours, tuple(there + name for name in theirs)) for ours, theirs in table.block.items()]
    names: dict[str, tuple[str, ...]] = {}
    for ours, theirs in pairs:
        # tokens are single tensors, everything else is a weight and a bias
        for kind in ("weight", "bias") if ours.endswith(".*") else ("",):
            names[ours.replace("*", kind)] = tuple(name.replace("*", kind) for name in theirs)
    return names


def scale_names(table: NameTable, *, depth: int) -> dict[str, str]:
    """Return our linear layers whose outputs a LayerScale of theirs multiplies -> their names of its factors."""
    return {
        f"blocks.{index}.{ours}": f"{table.blocks}.{index}.{theirs}"
        for index in range(depth)
        for ours, theirs in table.layer_scales.items()
    }


def part_names(found: Iterable[str], table: NameTable, *, depth: int) -> set[str]:
    """Return their names of the parts that not every encoder has, registers and LayerScale, if these have them."""
    scales = set(scale_names(table, depth=depth).values())
    # all of them or none: a file that lacks some is incomplete
    return {table.registers}.intersection(found) | (scales if scales.intersection(found) else set())


def depth_of(names: Iterable[str], table: NameTable) -> int:
    """Return the number of blocks among their names: one more than the highest index, or 0.

    Raises:
        ConfigError: The highest index is larger than the number of names.
    """
    names = list(names)
    # nine digits at most, so that a forged name cannot ask for a huge int
    pattern = re.compile(rf"{re.escape(table.blocks)}\.([0-9]{{1,9}})\.")
    depth = max((int(found[1]) + 1 for name in names if (found := pattern.match(name))), default=0)
    # callers list the names of every block, so a forged index must not decide how many blocks there are
    if depth > len(names):
        raise ConfigError(
            f"the weights name block {depth - 1} of {table.blocks} and hold {len(names)} tensors: blocks are missing"
        )
    return depth


def names_matching(names: Iterable[str], patterns: Iterable[str]) -> set[str]:
    """Return the names that match at least one of the fnmatch patterns."""
    patterns = tuple(patterns)
    return {name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)}


def without_wrappers(state_dict: Mapping[str, Value]) -> dict[str, Value]:
    """Return the same tensors without the parts of names that torch.compile, FSDP and activation checkpointing add.

    Raises:
        ConfigError: Two names mean the same tensor.
    """
    found: dict[str, Value] = {}
    for name, value in state_dict.items():
        _add_once(found, _WRAPPERS.sub("", name), value, name)
    return found


def encoder_prefixes(names: Iterable[str]) -> tuple[str, ...]:
    """Return the prefixes under which names hold an encoder, sorted; "" where its names carry no prefix.

    Wrappers such as DistributedDataParallel (`module.`), Lightning (`model.`) and classifiers (`backbone.`) add prefixes, and
    may add them repeatedly. The names have to be those of `without_wrappers`. Where a decoder belongs to the encoder, as in
    Hugging Face's ViTMAEForPreTraining and in ours, the prefix is the one that both share.
    """
    names = list(names)
    found = set()
    for match in filter(None, map(_PATCH_EMBED.fullmatch, names)):
        prefix = match["prefix"]
        encoder, decoder = _AUTOENCODERS.get(match["name"], ("", ""))
        # take off the encoder's own part only if a decoder shares the rest: otherwise it is a wrapper's name
        whole = prefix.removesuffix(encoder)
        if encoder and whole != prefix and any(name.startswith(whole + decoder) for name in names):
            prefix = whole
        found.add(prefix)
    return tuple(sorted(found))


def canonical_names(state_dict: Mapping[str, Value], layout: Layout) -> dict[str, Value]:
    """Return the same tensors under the names of the layout's tables.

    Prefixes of wrappers are removed and older spellings are replaced by the current one.

    Raises:
        ConfigError: Two names mean the same tensor.
    """
    found: dict[str, Value] = {}
    for name, value in _unwrapped(state_dict).items():
        current = name
        # in order and all of them: a name may need two, such as its block and its attention
        for pattern, new in layout.renames:
            current = re.sub(pattern, new, current)
        _add_once(found, current, value, name)
    return found


def detect_layout(names: Iterable[str]) -> LayoutName:
    """Return the layout that the tensor names of a file belong to.

    An official MAE file without its decoder has the names of `timm`.

    Raises:
        ConfigError: The names fit no layout; the message lists the known ones.
    """
    # names alone decide, so a file's header is enough and no tensor is read
    given = dict.fromkeys(names, None)
    for title, layout in LAYOUTS.items():
        found = canonical_names(given, layout)
        patch_embed = layout.encoder.names["patch_embed.*"].replace("*", "weight")
        if patch_embed in found and (not layout.recognised_by or names_matching(found, layout.recognised_by)):
            return title
    raise ConfigError(
        f"weights named {', '.join(sorted(given)[:4]) or '(none)'} ... are in no known layout. The known layouts are "
        f"official_mae (facebookresearch/mae), timm (VisionTransformer), hf_vit (transformers ViTModel), "
        f"hf_vitmae (transformers ViTMAEForPreTraining) and hf_dinov2 (transformers Dinov2Model)"
    )


def hf_file_names(state_dict: Mapping[str, Value]) -> dict[str, Value]:
    """Rename tensors from transformers 5's names in memory to those of its files, which transformers 4 reads too.

    Source: the files that save_pretrained of transformers 5.23 writes, and the released files.
    """
    found: dict[str, Value] = {}
    for name, value in state_dict.items():
        current = name
        for pattern, new in _HF_FILE_RENAMES:
            current = re.sub(pattern, new, current)
        found[current] = value
    return found


def _unwrapped(state_dict: Mapping[str, Value]) -> Mapping[str, Value]:
    """Return the same tensors without what wrappers added to every name."""
    found = without_wrappers(state_dict)
    prefixes = encoder_prefixes(found)
    # tensors outside the prefix would keep names that fit no table; the caller has to choose
    if len(prefixes) != 1 or not all(name.startswith(prefixes[0]) for name in found):
        return found
    return {name.removeprefix(prefixes[0]): value for name, value in found.items()}


def _add_once(found: dict[str, Value], name: str, value: Value, given: str) -> None:
    if name in found:
        raise ConfigError(f"the weights hold {name} twice, the second time as {given}: remove one of them")
    found[name] = value
