"""Read other people's weight files as plain tensors: .pth, .pt and .bin, .safetensors, Hugging Face and timm folders.

Pickles are treated as data, never run as programs: torch's weights-only reader builds tensors and plain containers, and of all
other classes only argparse.Namespace (official MAE checkpoints contain one) and paths, as PurePosixPath, which cannot touch a
file. Any other name in a pickle is refused before it is looked up. Tensors stay on disk until they are read (mmap), so the
optimiser state in a checkpoint costs no memory. Errors: DataError that names the file, the problem and the way out."""

import argparse
import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pipeline.errors import DataError

CHECKPOINT_ENTRIES = ("model", "state_dict", "model_state_dict")
"""Entries under which training checkpoints keep their weights: the first one present is read, the rest reported as left out."""
PICKLE_SUFFIXES = (".pth", ".pt", ".bin")
FOLDER_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
"""Weight files of a Hugging Face or timm folder, in order of preference."""

_SAFE_CLASSES = (
    argparse.Namespace,
    (PurePosixPath, "pathlib.PosixPath"),
    (PurePosixPath, "pathlib._local.PosixPath"),  # Python 3.13
    (PurePosixPath, "pathlib.PurePosixPath"),
)


@dataclass(frozen=True)
class ForeignWeights:
    """Tensors under the file's names, with what the file says about their model."""

    state_dict: Mapping[str, Tensor]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Training arguments of a checkpoint (`args`), restricted to numbers, strings and None."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The folder's config.json."""
    preprocessor: Mapping[str, Any] = field(default_factory=dict)
    """The folder's preprocessor_config.json."""
    left_out: tuple[str, ...] = ()
    """The checkpoint's other entries: optimizer, epoch, ..."""


def read_foreign_weights(path: Path) -> ForeignWeights:
    """Read a weight file, ignoring its neighbours, or a folder with its config.json and preprocessor_config.json."""
    if path.is_dir():
        weights = next((path / name for name in FOLDER_FILES if (path / name).is_file()), None)
        if weights is None:
            raise DataError(f"{path} holds none of {', '.join(FOLDER_FILES)}: give the weight file itself")
        found = _read_shards(weights) if weights.suffix == ".json" else _read_file(weights)
        return ForeignWeights(
            found.state_dict,
            arguments=found.arguments,
            config=_read_json(path / "config.json"),
            preprocessor=_read_json(path / "preprocessor_config.json"),
            left_out=found.left_out,
        )
    if not path.is_file():
        raise DataError(f"{path} does not exist: give a .pth, .pt, .bin or .safetensors file, or a folder with one")
    return _read_file(path)


def _read_file(path: Path) -> ForeignWeights:
    if path.suffix == ".safetensors":
        return ForeignWeights(_read_safetensors(path))
    if path.suffix in PICKLE_SUFFIXES:
        return _checkpoint_weights(path, _read_pickle(path))
    raise DataError(
        f"{path} does not have the suffix of a weight file: expected {', '.join(PICKLE_SUFFIXES)} or .safetensors"
    )


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError, ValueError) as cause:
        raise DataError(f"{path} is damaged or truncated ({cause}): download it again") from cause


def _read_shards(index: Path) -> ForeignWeights:
    """Read a folder whose index maps each tensor to a file."""
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise DataError(f"{index} has no weight_map: download it again")
    names = sorted({str(name) for name in weight_map.values()})
    if outside := [name for name in names if PurePath(name).name != name]:
        raise DataError(f"{index} points outside its folder, to {outside[0]!r}: do not use these weights")
    found: dict[str, Tensor] = {}
    for name in names:
        if not (index.parent / name).is_file():
            raise DataError(f"{index} names {name}, which is not in its folder: download it too")
        found |= _read_safetensors(index.parent / name)
    if missing := sorted(set(weight_map) - set(found)):
        raise DataError(
            f"{index} lists tensors that no file holds ({len(missing)}, such as {missing[0]!r}): download the files again"
        )
    return ForeignWeights(found)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text())
    except (ValueError, OSError) as cause:
        raise DataError(f"{path} is not readable JSON ({cause}): download it again") from cause
    if not isinstance(found, dict):
        raise DataError(f"{path} holds a {type(found).__name__}, not a mapping: download it again")
    return found


def _read_pickle(path: Path) -> Any:
    """Return what torch.save wrote, without running any of it."""
    try:
        with torch.serialization.safe_globals(list(_SAFE_CLASSES)), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols; whatever cannot be read is an error below
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as cause:
        # torch's own message recommends weights_only=False, which would run the file, so it is not repeated here
        if refused := re.search(r"GLOBAL (\S+)", str(cause)):
            raise DataError(
                f"{path} asks for {refused[1]}, which is not a tensor: reading it could run code, so it is refused. If you "
                f"trust the file, load it in the program that wrote it and save its model.state_dict() as .safetensors"
            ) from cause
        raise DataError(f"{path} is not a file of torch.save, or is damaged: download it again") from cause
    except Exception as cause:  # a damaged pickle can raise anything
        if isinstance(cause, RuntimeError) and "TorchScript" in str(cause):
            raise DataError(
                f"{path} is a TorchScript program, not weights: save its state_dict() as .safetensors"
            ) from cause
        raise DataError(
            f"{path} ({path.stat().st_size} bytes) is damaged or truncated ({type(cause).__name__}): download it again"
        ) from cause


def _checkpoint_weights(path: Path, content: Any) -> ForeignWeights:
    """Return the tensors of a checkpoint: those under one of CHECKPOINT_ENTRIES, or the file's top level."""
    if not isinstance(content, Mapping):
        raise DataError(f"{path} holds a {type(content).__name__}, not a dict of tensors: save a model's state_dict()")
    entry = next((name for name in CHECKPOINT_ENTRIES if isinstance(content.get(name), Mapping)), None)
    weights = content if entry is None else content[entry]
    if others := [name for name, value in weights.items() if not (isinstance(name, str) and isinstance(value, Tensor))]:
        location = f"{path}, {entry!r}" if entry else str(path)
        raise DataError(
            f"{location} is not a dict of tensors: {others[0]!r} has type {type(weights[others[0]]).__name__}. "
            f"Expected tensors by name, at the top level or under one of {', '.join(CHECKPOINT_ENTRIES)}"
        )
    if not weights:
        raise DataError(f"{path} holds no tensors: save a model's state_dict()")
    arguments = content.get("args") if entry else None
    all_arguments = vars(arguments) if isinstance(arguments, argparse.Namespace) else {}
    return ForeignWeights(
        dict(weights),
        arguments={
            key: value
            for key, value in all_arguments.items()
            if value is None or isinstance(value, (bool, int, float, str))
        },
        left_out=tuple(sorted(str(name) for name in content if name != entry)) if entry else (),
    )
