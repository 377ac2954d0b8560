"""Which of a checkpoint's tensors are the weights.

A checkpoint is mappings within mappings: `model`, `state_dict`, DeepSpeed's `module`, an average such as `model_ema`, a teacher
beside its student. In them, wrappers add prefixes to names: `module.`, `model.`, `backbone.`. Neither list can be complete, so
both are read as one path, and an encoder is found by its patch embedding, wherever it lies:

    {"state_dict": {"model.backbone.patch_embed.proj.weight": ...}}     lies at state_dict.model.backbone

One encoder is taken; of several, the one that is no moving average, if exactly one is not. Otherwise the caller has to choose.
Errors: DataError for a file without weights; ConfigError for a choice that is missing or fits nothing."""

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from mae_core.interop import encoder_prefixes, without_wrappers
from pipeline.errors import ConfigError, DataError

CHECKPOINT_ENTRIES = ("model", "state_dict", "model_state_dict", "module")
"""Where the weights of an unknown model are looked for, so that the refusal can name its tensors: the first one present."""

_MOST_LEVELS = 3
_OTHER_STATE = re.compile(r"optim|sched|scaler|callbacks|loops|hyper_param", re.IGNORECASE)
"""Entries that hold tensors under the model's names, such as moments, without being weights."""
_AVERAGE = re.compile(r"(?:^|[._])(?:ema|swa|avg|averaged?|shadow)(?:[._]|$)", re.IGNORECASE)


class Chosen(NamedTuple):
    """The weights of a checkpoint, and what lies beside them."""

    state_dict: dict[str, Tensor]
    """Tensors under the names that remain after the path to the encoder."""
    left_out: tuple[str, ...]
    """The other entries and names of the file."""
    notes: tuple[str, ...] = ()
    """What to know about the choice, one line each."""
    beside: Mapping[str, Tensor] = MappingProxyType({})
    """Tensors beside the encoder in its mapping, which may be a head's, by their whole names."""


class _Found(NamedTuple):
    """An encoder in a checkpoint."""

    entries: tuple[str, ...]
    """Keys that lead to the mapping with its tensors."""
    prefix: str
    """What precedes its names there, such as `module.`; empty if nothing does."""

    @property
    def path(self) -> str:
        return ".".join((*self.entries, self.prefix.removesuffix("."))).strip(".")


def choose_weights(path: Path, content: Mapping[Any, Any], *, prefix: str | None) -> Chosen:
    """Return the weights in what a file holds: those at `prefix`, or those of its only encoder."""
    try:
        found = _encoders(content)
    except ConfigError as cause:
        raise ConfigError(f"{path}: {cause}") from cause
    if not found:
        if prefix is not None:
            raise ConfigError(
                f"{path}: prefix={prefix!r} fits nothing, because no encoder is found in the file: leave it out"
            )
        return _unrecognised(path, content)
    taken = _choose(path, found, prefix)
    weights, left_out, beside = _split(path, content, taken)
    others = [_quoted(other.path) for other in found if other != taken]
    note = f"taken: {_quoted(taken.path)}; also in the file: {', '.join(others)} (choose with prefix=...)"
    return Chosen(weights, left_out, (note,) if others else (), beside)


def _encoders(content: Mapping[Any, Any]) -> list[_Found]:
    """Return every encoder in a checkpoint, down to a few levels, sorted by its path."""
    found: list[_Found] = []
    prefixes: dict[int, tuple[str, ...]] = {}
    waiting: list[tuple[tuple[str, ...], Mapping[Any, Any]]] = [((), content)]
    for entries, mapping in waiting:  # grows while it is walked
        if id(mapping) not in prefixes:  # a forged pickle may hold itself many times: each mapping is searched once
            prefixes[id(mapping)] = encoder_prefixes(without_wrappers(_tensors(mapping)))
            if len(entries) < _MOST_LEVELS:
                waiting += [
                    ((*entries, name), value)
                    for name, value in mapping.items()
                    if isinstance(name, str) and isinstance(value, Mapping) and not _OTHER_STATE.search(name)
                ]
        found += [_Found(entries, prefix) for prefix in prefixes[id(mapping)]]
    return sorted(found)


def _tensors(mapping: Mapping[Any, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in mapping.items() if isinstance(name, str) and isinstance(value, Tensor)}


def _choose(path: Path, found: list[_Found], prefix: str | None) -> _Found:
    asked = found
    if prefix is not None:
        wanted = prefix.strip(".")
        # An exact path wins over those that merely begin with it.
        asked = [one for one in found if one.path == wanted] or [
            one for one in found if f"{one.path}.".startswith(f"{wanted}.")
        ]
    if len(asked) > 1:
        # Averages are written beside the model that they follow; to get one, the caller has to name it.
        asked = [one for one in asked if not _AVERAGE.search(one.path)] or asked
    if len(asked) == 1:
        return asked[0]
    paths = [one.path for one in asked or found]
    fits_none = "" if asked else f", and prefix={prefix!r} leads to none"
    raise ConfigError(
        f"{path} holds {len(paths)} encoder{'s' * (len(paths) > 1)}, at {', '.join(map(_quoted, paths))}{fits_none}: choose "
        f"one, for example with prefix={paths[-1]!r}"
    )


def _quoted(at: str) -> str:
    return repr(at) if at else "the top level ('')"


def _split(
    path: Path, content: Mapping[Any, Any], taken: _Found
) -> tuple[dict[str, Tensor], tuple[str, ...], dict[str, Tensor]]:
    """Return the tensors of an encoder, the names of everything else on the way to it, and the tensors beside it."""
    left_out: list[str] = []
    mapping = content
    for level, entry in enumerate(taken.entries):
        left_out += [".".join((*taken.entries[:level], str(name))) for name in mapping if name != entry]
        mapping = mapping[entry]
    tensors = _tensors(mapping)
    left_out += [str(name) for name in mapping if name not in tensors]
    named = without_wrappers(tensors)
    beside = {name: value for name, value in named.items() if not name.startswith(taken.prefix)}
    left_out += beside
    weights = {name.removeprefix(taken.prefix): value for name, value in named.items() if name.startswith(taken.prefix)}
    _check_tensors(path, weights)
    return weights, tuple(sorted(left_out)), beside


def _check_tensors(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Refuse tensors whose values are not in the file, or not all of them."""
    for name, value in weights.items():
        if type(value) not in (Tensor, Parameter) or value.layout is not torch.strided:
            raise DataError(
                f"{path}: {name} is a {type(value).__name__} of layout {value.layout}, not a plain tensor: save the full "
                f"state dict in the program that wrote the file"
            )
    empty = [name for name, value in weights.items() if not value.numel() or value.is_meta]
    # a head for no classes is empty too, and harmless
    if 2 * len(empty) > len(weights) or any(value.is_meta for value in weights.values()):
        raise DataError(
            f"{path} holds no values for {len(empty)} of {len(weights)} tensors ({empty[0]}): ZeRO-3 and FSDP keep them in other "
            f"files. Gather them first (DeepSpeed: zero_to_fp32.py, beside the checkpoint) and give the result"
        )


def _unrecognised(path: Path, content: Mapping[Any, Any]) -> Chosen:
    """Return the tensors of a file in which no encoder is recognised, so that an error can list their names."""
    entry = next((name for name in CHECKPOINT_ENTRIES if isinstance(content.get(name), Mapping)), None)
    weights = content if entry is None else content[entry]
    if others := [name for name, value in weights.items() if not (isinstance(name, str) and isinstance(value, Tensor))]:
        location = f"{path}, {entry!r}" if entry else str(path)
        raise DataError(
            f"{location} is not a dict of tensors: {others[0]!r} has type {type(weights[others[0]]).__name__}. "
            f"No patch embedding of a ViT is in it. Expected tensors by name, at the top level or under one of "
            f"{', '.join(CHECKPOINT_ENTRIES)}"
        )
    if not weights:
        raise DataError(f"{path} holds no tensors: save a model's state_dict()")
    return Chosen(dict(weights), tuple(sorted(str(name) for name in content if name != entry)) if entry else ())
