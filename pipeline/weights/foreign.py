"""Other people's weight files as plain tensors: .pth and .pt, .safetensors, folders of Hugging Face and of timm.

A pickle is data here, never a program: torch's weights-only reader builds tensors and plain containers, and of all other
classes only argparse.Namespace (official MAE checkpoints carry one) and paths, as PurePosixPath, which can touch no file. Any
other name in a pickle is refused before it is looked up. Tensors stay on disk until they are read (mmap), so that a
checkpoint's optimiser costs no memory. Errors: DataError naming the file, what is wrong, and the way out."""

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

ENTRIES = ("model", "state_dict", "model_state_dict")
"""Under which a training checkpoint keeps its weights; the first that is there is taken, all else is reported as left out."""
PICKLES = (".pth", ".pt", ".bin")
IN_A_FOLDER = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
"""The weights of a Hugging Face or timm folder, in this order."""

_HARMLESS = (
    argparse.Namespace,
    (PurePosixPath, "pathlib.PosixPath"),
    (PurePosixPath, "pathlib._local.PosixPath"),  # Python 3.13
    (PurePosixPath, "pathlib.PurePosixPath"),
)


@dataclass(frozen=True)
class ForeignWeights:
    """Tensors by the names of the file, and what else it says about them."""

    state_dict: Mapping[str, Tensor]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Training arguments of a checkpoint (`args`): numbers, text and None alone."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """config.json of a folder."""
    preprocessor: Mapping[str, Any] = field(default_factory=dict)
    """preprocessor_config.json of a folder."""
    left_out: tuple[str, ...] = ()
    """Other entries of a checkpoint: optimizer, epoch, ..."""


def read_foreign_weights(path: Path) -> ForeignWeights:
    """Reads a file (alone, whatever lies beside it) or a folder (config.json and preprocessor_config.json too)."""
    if path.is_dir():
        weights = next((path / name for name in IN_A_FOLDER if (path / name).is_file()), None)
        if weights is None:
            raise DataError(f"{path} holds none of {', '.join(IN_A_FOLDER)}: give the weight file itself")
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
    if path.suffix in PICKLES:
        return _opened(path, _read_pickle(path))
    raise DataError(f"{path} is no weight file by its name: expected {', '.join(PICKLES)} or .safetensors")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError, ValueError) as cause:
        raise DataError(f"{path} is damaged or cut off ({cause}): fetch it again") from cause


def _read_shards(index: Path) -> ForeignWeights:
    """A folder whose index says which file holds which tensor."""
    places = _read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise DataError(f"{index} has no weight_map: fetch it again")
    names = sorted({str(name) for name in places.values()})
    if strange := [name for name in names if PurePath(name).name != name]:
        raise DataError(f"{index} leads out of its folder, to {strange[0]!r}: do not use these weights")
    found: dict[str, Tensor] = {}
    for name in names:
        if not (index.parent / name).is_file():
            raise DataError(f"{index} names {name}, which is not beside it: fetch it too")
        found |= _read_safetensors(index.parent / name)
    if missing := sorted(set(places) - set(found)):
        raise DataError(
            f"{index} promises {missing[0]} and {len(missing) - 1} more, which no file holds: fetch them again"
        )
    return ForeignWeights(found)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text())
    except (ValueError, OSError) as cause:
        raise DataError(f"{path} is no readable JSON ({cause}): fetch it again") from cause
    if not isinstance(found, dict):
        raise DataError(f"{path} holds a {type(found).__name__}, not a mapping: fetch it again")
    return found


def _read_pickle(path: Path) -> Any:
    """What torch.save wrote, without running any of it."""
    try:
        with torch.serialization.safe_globals(list(_HARMLESS)), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols; what cannot be read is an error below
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as cause:
        # torch's own text recommends weights_only=False, which would run the file: it is not repeated here
        if refused := re.search(r"GLOBAL (\S+)", str(cause)):
            raise DataError(
                f"{path} asks for {refused[1]}, which is no tensor: reading it could run code, so it is refused. Where you "
                f"trust the file, load it in the program that wrote it and save its model.state_dict() as .safetensors"
            ) from cause
        raise DataError(f"{path} is no checkpoint of torch.save, or a damaged one: fetch it again") from cause
    except Exception as cause:  # a damaged pickle can raise anything
        if isinstance(cause, RuntimeError) and "TorchScript" in str(cause):
            raise DataError(
                f"{path} is a TorchScript program, not weights: save its state_dict() as .safetensors"
            ) from cause
        raise DataError(
            f"{path} ({path.stat().st_size} bytes) is damaged or cut off ({type(cause).__name__}): fetch it again"
        ) from cause


def _opened(path: Path, content: Any) -> ForeignWeights:
    """The tensors of a checkpoint: under one of ENTRIES, or the file itself."""
    if not isinstance(content, Mapping):
        raise DataError(f"{path} holds a {type(content).__name__}, not a dict of tensors: save a model's state_dict()")
    entry = next((name for name in ENTRIES if isinstance(content.get(name), Mapping)), None)
    weights = content if entry is None else content[entry]
    if strange := [
        name for name, value in weights.items() if not (isinstance(name, str) and isinstance(value, Tensor))
    ]:
        what = f"{path}, {entry!r}" if entry else str(path)
        raise DataError(
            f"{what} is no dict of tensors: {strange[0]!r} is a {type(weights[strange[0]]).__name__}. Expected tensors by name, "
            f"alone or under one of {', '.join(ENTRIES)}"
        )
    if not weights:
        raise DataError(f"{path} holds no tensor: save a model's state_dict()")
    arguments = content.get("args") if entry else None
    plain = vars(arguments) if isinstance(arguments, argparse.Namespace) else {}
    return ForeignWeights(
        dict(weights),
        arguments={
            key: value for key, value in plain.items() if value is None or isinstance(value, (bool, int, float, str))
        },
        left_out=tuple(sorted(str(name) for name in content if name != entry)) if entry else (),
    )
