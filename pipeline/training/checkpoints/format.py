"""Checkpoints that any world size and ZeRO stage can read: fragments beside a manifest that is written last.

    g0007/checkpoints/step-00000100/rank-0000-of-0002.safetensors   tensors "kind|parameter|start", float32 [count]
                                    history.jsonl                    logged rows from the first step to this one
                                    manifest.json                    present = committed; names files, sizes, SHA-256
There is no `latest` file: the newest valid manifest of the own generation wins, else the one that the generation was claimed
to continue from, else older ones along the recorded parents. A file whose size or hash is wrong is refused, loudly, and the
checkpoint before it is used; when all are damaged nothing is restarted in silence: CheckpointError.
Units: bytes; steps are global batches consumed."""

import hashlib
import json
import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from safetensors import safe_open
from torch import Tensor, nn

from pipeline.data.feed.substitution import Substitution
from pipeline.errors import CheckpointError
from pipeline.graph.receipts import claims, read_claim
from pipeline.graph.step import Attempt, generation_key
from pipeline.storage import MissingObject, Store
from pipeline.training.engine.deepspeed_engine import Kind
from pipeline.training.guard import FRESH, GuardState, Range

FOLDER = "checkpoints/"
MANIFEST = "manifest.json"
HISTORY = "history.jsonl"
SCHEMA = 1

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckpointFile:
    """One file of a checkpoint."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class CheckpointManifest:
    """What a committed checkpoint is."""

    global_step: int
    """Global batches consumed."""
    optimizer_steps: int
    """Steps that the optimiser applied: Adam's bias correction counts these."""
    cursor: Mapping[str, Any]
    """What the position is bound to: dataset digest, order parameters, global batch, seed."""
    ids_digest: int
    """Sum modulo 2**64 of a hash of every (epoch, sample) that reached a device up to here."""
    ids_count: int | None = None
    """How many these were; None in checkpoints from before they were counted."""
    substitutions: tuple[Substitution, ...] = ()
    """Every sample up to here that another stood in for."""
    guard: GuardState = FRESH
    """Steps skipped and stepped over, and what the next one is compared with."""
    parameters: Mapping[str, Sequence[int]]
    """Shape of every trained parameter."""
    world_size: int
    zero_stage: int
    files: tuple[CheckpointFile, ...] = ()
    loss: float | None = None
    """Mean of the last logged losses; None: not known."""
    schema: int = SCHEMA


class _Piece(NamedTuple):
    """A run of one flattened parameter in one file."""

    start: int
    length: int
    file: Any
    tensor_key: str


class Checkpoint:
    """A committed checkpoint whose files have been verified and lie on this machine's disk; close it after reading."""

    def __init__(
        self, root: Store, key: str, manifest: CheckpointManifest, paths: Mapping[str, Path], held: ExitStack
    ) -> None:
        self.root, self.key, self.manifest = root, key, manifest
        self._paths, self._held = paths, held
        self._pieces: dict[tuple[str, str], list[_Piece]] = {}
        for path in (path for name, path in paths.items() if name.endswith(".safetensors")):
            file = held.enter_context(safe_open(path, framework="pt"))  # mapped: nothing is read before it is asked for
            for tensor_key in file.keys():  # noqa: SIM118 - not a mapping
                kind, parameter, start = tensor_key.split("|")
                piece = _Piece(int(start), file.get_slice(tensor_key).get_shape()[0], file, tensor_key)
                self._pieces.setdefault((parameter, kind), []).append(piece)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pieces.clear()
        self._held.close()

    def read(self, parameter: str, kind: Kind, start: int, count: int) -> Tensor:
        """Values [start, start + count) of a flattened parameter, float32."""
        values = torch.empty(count, dtype=torch.float32)
        missing = count
        for piece in self._pieces.get((parameter, kind), ()):
            low, high = max(start, piece.start), min(start + count, piece.start + piece.length)
            if low < high:
                held = piece.file.get_slice(piece.tensor_key)
                values[low - start : high - start] = held[low - piece.start : high - piece.start]
                missing -= high - low
        if missing:
            raise CheckpointError(
                f"{self.key}: {missing} of {count} values of {kind} of {parameter} are missing; the checkpoint was made by "
                f"another model than the one that reads it"
            )
        return values

    def weights(self) -> dict[str, Tensor]:
        """Every trained parameter in its shape, float32."""
        weights = {}
        for name, shape in self.manifest.parameters.items():
            count = int(torch.Size(shape).numel())
            weights[name] = self.read(name, "weight", 0, count).reshape(tuple(shape))
        return weights

    def load_into(self, module: nn.Module) -> None:
        """Gives a module its weights, one parameter at a time: no second copy of the model is made."""
        held = {name: list(shape) for name, shape in self.manifest.parameters.items()}
        asked = {name: list(p.shape) for name, p in module.named_parameters() if p.requires_grad}
        for name in sorted({*held, *asked}):
            if held.get(name) != asked.get(name):
                raise CheckpointError(
                    f"{self.key}: made by another model: {name} is {held.get(name, 'absent')} there, "
                    f"{asked.get(name, 'absent')} here. Restore the model's configuration, or train anew"
                )
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(self.read(name, "weight", 0, parameter.numel()).reshape(parameter.shape))

    def history(self) -> list[dict[str, float]]:
        """The logged rows up to this step."""
        return [json.loads(line) for line in self._paths[HISTORY].read_text().splitlines()]


def folder_of(global_step: int) -> str:
    """Key of a step's checkpoint inside its generation."""
    return f"{FOLDER}step-{global_step:08d}"


def step_of(key: str) -> int:
    """The step of a checkpoint with this key."""
    return int(key.rpartition("-")[2])


def write_history(store: Store, folder: str, rows: Sequence[Mapping[str, float]]) -> CheckpointFile:
    """The rows logged so far, so that a resumed run's curve has no gap."""
    data = "".join(json.dumps(dict(row)) + "\n" for row in rows).encode()
    store.write(f"{folder}/{HISTORY}", data)
    return CheckpointFile(HISTORY, len(data), hashlib.sha256(data).hexdigest())


def commit(store: Store, folder: str, manifest: CheckpointManifest) -> None:
    """Makes the checkpoint exist."""
    store.write(f"{folder}/{MANIFEST}", json.dumps(asdict(manifest), sort_keys=True).encode())


def resume_point(root: Store) -> str:
    """What a new generation of a training step continues from: the newest committed checkpoint (by its key), or nothing."""
    generation = max(claims(root), default=0)
    if not generation:
        return ""
    return next(_candidates(root, generation, ""), str(read_claim(root, generation)["continues"]))


def committed(root: Store) -> Iterator[str]:
    """Keys of the checkpoints on the committed line of a training step, newest first."""
    return _candidates(root, max(claims(root), default=0), "")


def newest(attempt: Attempt) -> Checkpoint | None:
    """The newest valid checkpoint that this generation may start from; None: there is none, start from the first step."""
    root = attempt.root
    checkpoint = _first_valid(root, _candidates(root, attempt.generation, attempt.continues))
    if checkpoint is None and attempt.continues:
        raise CheckpointError(
            f"{root.uri}/{attempt.continues} is gone, and there is none before it. Restore it, or delete the folder to train anew"
        )
    return checkpoint


def before(attempt: Attempt, undo: Range, stepped_over: Sequence[Range]) -> Checkpoint | None:
    """What a roll-back goes back to: the newest valid checkpoint up to where `undo` begins; where none is kept from so long ago,
    the oldest one that is, up to its end. Never one inside a range that was stepped over: that line was given up.
    None: the beginning, where `undo` begins there or nothing has been saved yet."""
    root = attempt.root
    held = {step_of(key): key for key in reversed(list(_candidates(root, attempt.generation, attempt.continues)))}
    usable = sorted(step for step in held if not any(low < step < high for low, high in stepped_over))
    early = [step for step in reversed(usable) if step <= undo[0]]
    late = [step for step in usable if undo[0] < step < undo[1]] if undo[0] else []
    checkpoint = _first_valid(root, (held[step] for step in (*early, *late)))
    if checkpoint is None and undo[0] and held:
        raise CheckpointError(
            f"{root.uri}: no checkpoint from before step {undo[1]} is left to roll back to. Raise resources.keep_checkpoints"
        )
    return checkpoint


def _first_valid(root: Store, keys: Iterable[str]) -> Checkpoint | None:
    """The first that is not damaged; None: there are none. CheckpointError when all are."""
    refused: list[str] = []
    for key in keys:
        try:
            return open_checkpoint(root, key)
        except CheckpointError as cause:
            log.warning("refused: %s. The checkpoint before it is used", cause)
            refused.append(str(cause))
    if refused:
        raise CheckpointError(
            f"{root.uri}: every checkpoint is damaged ({'; '.join(refused)}). Restore the files, or delete the folder to train anew"
        )
    return None


def open_checkpoint(root: Store, key: str) -> Checkpoint:
    """Fetches and verifies the files of one checkpoint; CheckpointError names what is wrong with which file."""
    manifest = read_manifest(root, key)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mae-checkpoint-")))
        paths = {file.name: _verified(root, key, file, scratch) for file in manifest.files}
        return Checkpoint(root, key, manifest, paths, stack.pop_all())


def read_manifest(root: Store, key: str) -> CheckpointManifest:
    """A checkpoint's manifest alone."""
    try:
        body = json.loads(root.read(f"{key}/{MANIFEST}"))
        body["files"] = tuple(CheckpointFile(**file) for file in body["files"])
        body["substitutions"] = tuple(Substitution(*row) for row in body.get("substitutions", ()))
        body["guard"] = GuardState.from_json(body["guard"]) if "guard" in body else FRESH
        manifest = CheckpointManifest(**body)
    except MissingObject as cause:
        raise CheckpointError(f"{root.uri}/{key}/{MANIFEST} is missing: this checkpoint was never committed") from cause
    except (ValueError, TypeError, KeyError) as cause:
        raise CheckpointError(f"{root.uri}/{key}/{MANIFEST} is damaged ({cause})") from cause
    if manifest.schema != SCHEMA:
        raise CheckpointError(f"{root.uri}/{key}: schema {manifest.schema}, this version reads {SCHEMA}")
    return manifest


def check_cursor(checkpoint: Checkpoint, expected: Mapping[str, Any]) -> None:
    """A position means nothing in another order: refuse, naming the field."""
    for field in sorted({*expected, *checkpoint.manifest.cursor}):
        was, is_now = checkpoint.manifest.cursor.get(field), expected.get(field)
        if was != is_now:
            raise CheckpointError(
                f"{checkpoint.key}: its position counts in another order: {field} was {was}, is now {is_now}. "
                f"Train anew under another config, or restore that field"
            )


def _verified(root: Store, key: str, file: CheckpointFile, scratch: Path) -> Path:
    """Where the file lies on this machine, its size and hash being the manifest's."""
    address = f"{root.uri}/{key}/{file.name}"
    path = root.local_path(f"{key}/{file.name}")
    try:
        if path is None:
            path = scratch / file.name
            root.download(f"{key}/{file.name}", path)
        size, sha256 = _measure(path)
    except (MissingObject, FileNotFoundError) as cause:
        raise CheckpointError(f"{address} is missing") from cause
    if (size, sha256) != (file.bytes, file.sha256):
        raise CheckpointError(
            f"{address} is damaged: {size} bytes with SHA-256 {sha256[:12]}, "
            f"the manifest says {file.bytes} with {file.sha256[:12]}"
        )
    return path


def _candidates(root: Store, generation: int, continues: str) -> Iterator[str]:
    """Keys of committed checkpoints, newest first, along the recorded parents."""
    limit = ""
    while generation > 0:
        for folder in committed_in(root.at(generation_key(generation))):
            key = f"{generation_key(generation)}/{folder}"
            if not limit or key <= limit:
                yield key
        continues = continues or str(read_claim(root, generation)["continues"])
        if not continues:
            return
        generation, limit, continues = int(continues.partition("/")[0][1:]), continues, ""


def committed_in(store: Store) -> Iterator[str]:
    """Keys of the committed checkpoints in a generation's directory, newest first."""
    committed = [info.key for info in store.list(FOLDER) if info.key.endswith(f"/{MANIFEST}")]
    for key in sorted(committed, reverse=True):
        yield key.removesuffix(f"/{MANIFEST}")


def _measure(path: Path) -> tuple[int, str]:
    with path.open("rb") as file:
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()
