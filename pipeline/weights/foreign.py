"""Read other people's weight files as plain tensors: those of torch.save and safetensors, Hugging Face and timm folders.

The content of a file decides how it is read (`file_kinds`), not whether it is called .pth, .pth.tar, .ckpt or .safetensors.

Pickles are treated as data, never run as programs: torch's weights-only reader builds tensors and plain containers, and of all
other classes only argparse.Namespace (official MAE checkpoints contain one) and paths, as PurePosixPath, which cannot touch a
file. NumPy's numbers, which many checkpoints hold as scores, are dropped unread. Any other name in a pickle is refused before it
is looked up. Tensors stay on disk until they are read (mmap), so the optimiser state in a checkpoint costs no memory.
Errors: DataError that names the file, the problem and the way out; ConfigError for a choice among models that has to be made."""

import argparse
import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pipeline.errors import DataError
from pipeline.weights.checkpoint import choose_weights
from pipeline.weights.file_kinds import file_kind

FOLDER_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Weight files of a Hugging Face or timm folder, in order of preference."""

_PART = re.compile(r"-([0-9]{5})-of-([0-9]{5})\.")
"""How Hugging Face names one of several files of a model."""
_DEEPSPEED_PART = re.compile(r"mp_rank_[0-9]+_model_states\.pt")


class _Dropped:
    """Takes the place of a value that is not wanted, and keeps nothing that is passed to it."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


_SAFE_CLASSES: tuple[Callable[..., Any] | tuple[Callable[..., Any], str], ...] = (
    argparse.Namespace,
    (PurePosixPath, "pathlib.PosixPath"),
    (PurePosixPath, "pathlib._local.PosixPath"),  # Python 3.13
    (PurePosixPath, "pathlib.PurePosixPath"),
    # NumPy 2 renamed core to _core; files of both are about.
    *((_Dropped, f"numpy.{module}.multiarray.scalar") for module in ("core", "_core")),
    *((_Dropped, f"numpy.{module}.multiarray._reconstruct") for module in ("core", "_core")),
    (_Dropped, "numpy.dtype"),
    (_Dropped, "numpy.ndarray"),
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
    """The checkpoint's other entries (optimizer, epoch, ...), and names outside the encoder or autoencoder."""
    notes: tuple[str, ...] = ()
    """What to know about the choice among several models in one file."""
    beside: Mapping[str, Tensor] = field(default_factory=dict)
    """Tensors beside the encoder, which may be a head's."""


def read_foreign_weights(path: Path, *, prefix: str | None = None) -> ForeignWeights:
    """Read a weight file, ignoring its neighbours, or a folder with its config.json and preprocessor_config.json.

    `prefix` chooses among several models in one file: the path of entries and of names that leads to it, joined by dots.
    """
    file = _weights_in(path) if path.is_dir() else path
    # A single file may lie among those of other models, so the config.json beside it is not trusted.
    folder = file.parent if path.is_dir() or _is_index(path) else None
    if not file.is_file():
        raise DataError(f"{path} does not exist: give a file of torch.save or safetensors, or a folder with one")
    content, arguments = _read_content(file)
    chosen = choose_weights(path, content, prefix=prefix)
    if not _is_index(file):  # its parts are checked as they are read
        _check_size(file, chosen.state_dict)
    return ForeignWeights(
        chosen.state_dict,
        arguments=arguments,
        config=_read_json(folder / "config.json") if folder else {},
        preprocessor=_read_json(folder / "preprocessor_config.json") if folder else {},
        left_out=chosen.left_out,
        notes=chosen.notes,
        beside=chosen.beside,
    )


def files_read(path: Path) -> list[Path]:
    """Return the files that `read_foreign_weights` reads for a file or folder."""
    file = _weights_in(path) if path.is_dir() else path
    if not file.is_file():
        raise DataError(f"{path} does not exist: give a file of torch.save or safetensors, or a folder with one")
    parts = [file.parent / name for name in _part_names(file)] if _is_index(file) else []
    described = path.is_dir() or _is_index(path)
    beside = [file.parent / name for name in ("config.json", "preprocessor_config.json")] if described else []
    return [file, *parts, *(one for one in beside if one.is_file())]


def _weights_in(folder: Path) -> Path:
    weights = next((folder / name for name in FOLDER_FILES if (folder / name).is_file()), None)
    if weights is not None:
        return weights
    names = sorted(entry.name for entry in folder.iterdir())
    if found := _deepspeed_weights(folder, names):
        return found
    if any(name.endswith(".distcp") for name in names):
        raise DataError(
            f"{folder} is a checkpoint of torch.distributed.checkpoint: convert it with `python -m "
            f"torch.distributed.checkpoint.format_utils dcp_to_torch {folder} weights.pth`, and give that file"
        )
    there = f"{', '.join(names[:6])}{', ...' * (len(names) > 6)}" or "nothing"
    raise DataError(f"{folder} holds none of {', '.join(FOLDER_FILES)}, but {there}: give the weight file itself")


def _deepspeed_weights(folder: Path, names: Sequence[str]) -> Path | None:
    """Return the file with the weights of a DeepSpeed checkpoint, which its folder or the one above it may be."""
    if "latest" in names:
        tag = (folder / "latest").read_text(errors="replace").strip()
        # a file from elsewhere: `../` in it must not lead out of the folder
        if PurePath(tag).name == tag and (folder / tag).is_dir():
            return _weights_in(folder / tag)
    if any(name.startswith("zero_pp_rank_") and name.endswith("_model_states.pt") for name in names):
        raise DataError(
            f"{folder} is a DeepSpeed checkpoint of ZeRO 3, whose weights are split over its files: gather them with "
            f"zero_to_fp32.py, beside the checkpoint, and give the result"
        )
    parts = [name for name in names if _DEEPSPEED_PART.fullmatch(name)]
    if len(parts) > 1:
        raise DataError(f"{folder} holds {len(parts)} tensor-parallel parts ({', '.join(parts[:3])}): merge them first")
    return folder / parts[0] if parts else None


def _read_content(path: Path) -> tuple[Mapping[Any, Any], Mapping[str, Any]]:
    """Return what a file holds, as mappings of tensors, and the arguments of the training that wrote it."""
    match file_kind(path):
        case "index":
            return _read_parts(path), {}
        case "safetensors":
            content: Any = _read_safetensors(path)
        case "zip" | "pickle":
            content = _read_pickle(path)
    if not isinstance(content, Mapping):
        raise DataError(f"{path} holds a {type(content).__name__}, not a dict of tensors: save a model's state_dict()")
    # Read alone, it would look like a model with layers missing.
    if (part := _PART.search(path.name)) and int(part[2]) > 1:
        raise DataError(
            f"{path} is part {int(part[1])} of {int(part[2])} of a model: give the folder, which must hold all parts and "
            f"their index"
        )
    if isinstance(parts := content.get("mp_world_size"), int) and parts > 1:
        raise DataError(
            f"{path} holds one of {parts} tensor-parallel parts (mp_world_size): merge them in the program that wrote it"
        )
    return content, _arguments(content)


def _arguments(content: Mapping[Any, Any]) -> dict[str, Any]:
    arguments = content.get("args")
    # The official code saves its parsed command line here.
    if isinstance(arguments, argparse.Namespace):
        arguments = vars(arguments)
    if not isinstance(arguments, Mapping):
        return {}
    return {
        key: value for key, value in arguments.items() if value is None or isinstance(value, (bool, int, float, str))
    }


def _check_size(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Refuse tensors that would take far more memory than their file: views that repeat the same few values."""
    needed, size = sum(value.numel() * value.element_size() for value in weights.values()), path.stat().st_size
    # Twice the size leaves room for tied weights, which share their bytes.
    if needed > 2 * size:
        raise DataError(
            f"{path} ({size} bytes) describes {needed} bytes of weights, by repeating values: save contiguous tensors"
        )


def _is_index(path: Path) -> bool:
    return path.name.endswith(".index.json")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError, ValueError) as cause:
        raise DataError(f"{path} is damaged or truncated ({cause}): download it again") from cause


def _weight_map(index: Path) -> dict[str, Any]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise DataError(f"{index} has no weight_map: download it again")
    return weight_map


def _part_names(index: Path) -> list[str]:
    names = sorted({str(name) for name in _weight_map(index).values()})
    # An index is input from elsewhere: `../` in it must not read other files.
    if outside := [name for name in names if PurePath(name).name != name]:
        raise DataError(f"{index} points outside its folder, to {outside[0]!r}: do not use these weights")
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise DataError(f"{index} names {missing[0]}, which is not in its folder: download it too")
    return names


def _read_parts(index: Path) -> dict[str, Tensor]:
    """Read the files beside an index that maps each tensor to its file."""
    weight_map = _weight_map(index)
    found: dict[str, Tensor] = {}
    for name in _part_names(index):
        part = index.parent / name
        content = _read_safetensors(part) if file_kind(part) == "safetensors" else _read_pickle(part)
        if not isinstance(content, Mapping):
            raise DataError(f"{part} holds a {type(content).__name__}, not a dict of tensors: download it again")
        tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
        _check_size(part, tensors)
        found |= tensors
    if missing := sorted(set(weight_map) - set(found)):
        raise DataError(
            f"{index} lists tensors that no file holds ({len(missing)}, such as {missing[0]!r}): download the files again"
        )
    return found


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text())
    except (ValueError, OSError, RecursionError) as cause:
        raise DataError(f"{path} is not readable JSON ({cause}): download it again") from cause
    if not isinstance(found, dict):
        raise DataError(f"{path} holds a {type(found).__name__}, not a mapping: download it again")
    return found


def _read_pickle(path: Path) -> Any:
    """Return what torch.save wrote, without running any of it."""
    try:
        with torch.serialization.safe_globals(list(_SAFE_CLASSES)), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols; whatever cannot be read is an error below
            if path.suffix == ".safetensors":  # torch goes by this name, and the content says otherwise
                with path.open("rb") as file:
                    return torch.load(file, map_location="cpu", weights_only=True)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as cause:
        # torch's own message recommends weights_only=False, which would run the file, so it is not repeated here
        # torch offers the refused name in its message only.
        if refused := re.search(r"GLOBAL (\S+)", str(cause)):
            raise DataError(
                f"{path} asks for {refused[1]}, which is not a tensor: reading it could run code, so it is refused. If you "
                f"trust the file, load it in the program that wrote it and save its model.state_dict() as .safetensors"
            ) from cause
        if "DTensor" in str(cause):
            raise DataError(
                f"{path} holds tensors that are split over workers (DTensor): save the full state dict in the program that "
                f"wrote it"
            ) from cause
        raise DataError(f"{path} is not a file of torch.save, or is damaged: download it again") from cause
    except Exception as cause:  # a damaged pickle can raise anything
        raise DataError(
            f"{path} ({path.stat().st_size} bytes) is damaged or truncated ({type(cause).__name__}): download it again"
        ) from cause
