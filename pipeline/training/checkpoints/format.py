"""Checkpoints that any world size and ZeRO stage can read: fragments of the state, and a manifest that is written last.

    g0007/checkpoints/step-00000100/rank-0000-of-0002.safetensors   tensors "kind|parameter|start", float32 [count]
                                    history.jsonl                   logged rows from the first step to this one
                                    manifest.json                   present = committed; names files, sizes, SHA-256

There is no `latest` file. The newest valid manifest of a generation's own checkpoints wins, else the one that the generation
was claimed to continue from, else older ones along the recorded parents. A file whose size or hash is wrong is refused with a
warning, and the checkpoint before it is used. If all are damaged, training does not silently restart from nothing.
Units: bytes; steps are global batches consumed. Errors: CheckpointError names the file and what is wrong with it."""

import hashlib
import json
import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
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
    """The manifest of a committed checkpoint. Its field names are the keys of manifest.json."""

    global_step: int
    """Global batches consumed."""
    optimizer_steps: int
    """Steps that the optimiser applied, which Adam's bias correction counts."""
    cursor: Mapping[str, Any]
    """What the position is bound to: dataset digest, order parameters, global batch, seed."""
    ids_digest: int
    """Sum modulo 2**64 of a hash of every (epoch, sample) that reached a device up to here."""
    ids_count: int | None = None
    """How many there were; None in checkpoints written before they were counted."""
    substitutions: tuple[Substitution, ...] = ()
    """Every sample up to here that was replaced by another."""
    guard: GuardState = FRESH
    """Skipped steps and ranges, and what the next step is compared with."""
    parameters: Mapping[str, Sequence[int]]
    """Shape of every trained parameter."""
    world_size: int
    zero_stage: int
    files: tuple[CheckpointFile, ...] = ()
    loss: float | None = None
    """Mean of the last logged losses; None if it is not known."""
    schema: int = SCHEMA


class _Piece(NamedTuple):
    """A contiguous range of one flattened parameter in one file."""

    start: int
    length: int
    file: Any
    tensor_key: str


class Checkpoint:
    """A committed checkpoint whose files are verified and lie on this machine's disk. A context manager: close it after use."""

    def __init__(
        self, root: Store, key: str, manifest: CheckpointManifest, paths: Mapping[str, Path], stack: ExitStack
    ) -> None:
        self.root, self.key, self.manifest, self.paths = root, key, manifest, paths
        self._stack = stack
        # Opened now, as the tensors' files are: their names may go before this checkpoint is closed.
        self._history = stack.enter_context(paths[HISTORY].open())
        self._pieces: dict[tuple[str, str], list[_Piece]] = {}
        for path in (path for name, path in paths.items() if name.endswith(".safetensors")):
            file = stack.enter_context(
                safe_open(path, framework="pt")
            )  # memory-mapped: nothing is read before it is used
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
        self._stack.close()

    def read(self, parameter: str, kind: Kind, start: int, count: int) -> Tensor:
        """Return values [start, start + count) of a flattened parameter, float32 [count].

        Pieces are whatever runs the saving ranks held, so any rank of any layout puts its own range together from them.
        """
        # Pieces never overlap (each value had one owner when it was saved), so counting what is missing is enough.
        values = torch.empty(count, dtype=torch.float32)
        missing = count
        for piece in self._pieces.get((parameter, kind), ()):
            low, high = max(start, piece.start), min(start + count, piece.start + piece.length)
            if low < high:
                tensor = piece.file.get_slice(piece.tensor_key)  # reads only the bytes that are indexed next
                values[low - start : high - start] = tensor[low - piece.start : high - piece.start]
                missing -= high - low
        if missing:
            raise CheckpointError(
                f"{self.key}: {missing} of {count} values of {kind} of {parameter} are missing: this model is not "
                f"the one that the checkpoint was made from. Restore the model's configuration"
            )
        return values

    def weights(self, kind: Kind = "weight") -> dict[str, Tensor]:
        """Return every trained parameter, or its average, in its shape, float32."""
        weights = {}
        for name, shape in self.manifest.parameters.items():
            count = int(torch.Size(shape).numel())
            weights[name] = self.read(name, kind, 0, count).reshape(tuple(shape))
        return weights

    def load_into(self, module: nn.Module) -> None:
        """Load the weights into a module, one parameter at a time, so that no second copy of the model is made.

        Errors: CheckpointError names the first parameter whose shape differs.
        """
        saved = {name: list(shape) for name, shape in self.manifest.parameters.items()}
        wanted = {name: list(p.shape) for name, p in module.named_parameters() if p.requires_grad}
        for name in sorted({*saved, *wanted}):
            if saved.get(name) != wanted.get(name):
                raise CheckpointError(
                    f"{self.key} was made from another model: {name} is {saved.get(name, 'absent')} there, "
                    f"{wanted.get(name, 'absent')} here. Restore the model's configuration, or train from the start"
                )
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(self.read(name, "weight", 0, parameter.numel()).reshape(parameter.shape))

    def history(self) -> list[dict[str, float]]:
        """Return the logged rows up to this step."""
        self._history.seek(0)
        return [json.loads(line) for line in self._history]


def checkpoint_folder(global_step: int) -> str:
    """Return the key of a step's checkpoint inside its generation."""
    return f"{FOLDER}step-{global_step:08d}"  # padded, so that keys sort by step


def step_of(key: str) -> int:
    """Return the step of the checkpoint with this key."""
    return int(key.rpartition("-")[2])


def write_history(store: Store, folder: str, rows: Sequence[Mapping[str, float]]) -> CheckpointFile:
    """Write the rows logged so far, so that a resumed run's curve has no gap."""
    data = "".join(json.dumps(dict(row)) + "\n" for row in rows).encode()
    store.write(f"{folder}/{HISTORY}", data)
    return CheckpointFile(HISTORY, len(data), hashlib.sha256(data).hexdigest())


def commit(store: Store, folder: str, manifest: CheckpointManifest) -> None:
    """Write the manifest, which makes the checkpoint exist; all its files must lie in the store by now."""
    store.write(f"{folder}/{MANIFEST}", json.dumps(asdict(manifest), sort_keys=True).encode())


def resume_point(root: Store) -> str:
    """Return what a new generation of a training step continues from: the newest committed checkpoint's key, or nothing."""
    generation = max(claims(root), default=0)
    if not generation:
        return ""
    return next(_candidates(root, generation, ""), str(read_claim(root, generation)["continues"]))


def committed(root: Store) -> Iterator[str]:
    """Yield the keys of a training step's committed checkpoints, newest first, without those of superseded lines."""
    return _candidates(root, max(claims(root), default=0), "")


def newest_checkpoint(attempt: Attempt) -> Checkpoint | None:
    """Open the newest valid checkpoint that this generation may start from; None if there is none and training begins."""
    root = attempt.root
    checkpoint = _first_valid(root, _candidates(root, attempt.generation, attempt.continues))
    if checkpoint is None and attempt.continues:
        raise CheckpointError(
            f"{root.uri}/{attempt.continues} is gone, and there is none before it. Restore it, or delete the folder to train "
            "from the start"
        )
    return checkpoint


def rollback_checkpoint(attempt: Attempt, undone: Range, skipped_ranges: Sequence[Range]) -> Checkpoint | None:
    """Open the checkpoint that a rollback loads: the newest valid one up to the start of `undone`.

    If none is kept from that long ago, it is the oldest one before the end of `undone`. It is never one inside a skipped
    range: that line was given up. None means the initial weights: `undone` starts at step 0, or nothing has been saved yet.
    """
    root = attempt.root
    # From old to new: where two lines saved the same step, the newer line's checkpoint replaces the older.
    key_by_step = {
        step_of(key): key for key in reversed(list(_candidates(root, attempt.generation, attempt.continues)))
    }
    # Strictly inside: one at `low` holds the state before the range, one at `high` that after it.
    usable = sorted(step for step in key_by_step if not any(low < step < high for low, high in skipped_ranges))
    early = [step for step in reversed(usable) if step <= undone[0]]
    # From step 0 on the initial weights serve, and they are better than a checkpoint from among the bad steps.
    late = [step for step in usable if undone[0] < step < undone[1]] if undone[0] else []
    checkpoint = _first_valid(root, (key_by_step[step] for step in (*early, *late)))
    if checkpoint is None and undone[0] and key_by_step:
        raise CheckpointError(
            f"{root.uri}: no checkpoint from before step {undone[1]} is left to roll back to. Raise resources.keep_checkpoints"
        )
    return checkpoint


def _first_valid(root: Store, keys: Iterable[str]) -> Checkpoint | None:
    """Open the first checkpoint that is not damaged; None if there are no keys, CheckpointError if all are damaged."""
    refused: list[str] = []
    for key in keys:
        try:
            return open_checkpoint(root, key)
        except CheckpointError as cause:
            log.warning("refused: %s. The checkpoint before it is used", cause)
            refused.append(str(cause))
    if refused:
        raise CheckpointError(
            f"{root.uri}: every checkpoint is damaged ({'; '.join(refused)}). Restore the files, or delete the folder to train "
            "from the start"
        )
    return None


def open_checkpoint(root: Store, key: str, *, verified: Mapping[str, Path] = MappingProxyType({})) -> Checkpoint:
    """Fetch and verify the files of one checkpoint. Remote files go to a scratch folder that is removed on closing.

    `verified`: where another process of this node has fetched and verified them. A file that is not there is fetched.
    """
    manifest = read_manifest(root, key)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mae-checkpoint-")))
        shared = {file.name: verified[file.name] for file in manifest.files if _lies_at(verified.get(file.name), file)}
        paths = {file.name: shared.get(file.name) or _verified(root, key, file, scratch) for file in manifest.files}
        # From here on the scratch folder lives as long as the checkpoint; an error before this removes it.
        return Checkpoint(root, key, manifest, paths, stack.pop_all())


def read_manifest(root: Store, key: str) -> CheckpointManifest:
    """Read only the manifest of a checkpoint; manifests of older versions lack some of its keys."""
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
    """Refuse a checkpoint whose position counts in another order, in which it means nothing; the error names the field."""
    for field in sorted({*expected, *checkpoint.manifest.cursor}):
        was, is_now = checkpoint.manifest.cursor.get(field), expected.get(field)
        if was != is_now:
            raise CheckpointError(
                f"{checkpoint.key} counts its position in another order of samples: {field} was {was}, is now {is_now}. "
                f"Restore that field, or train from the start under another config"
            )


def _lies_at(path: Path | None, file: CheckpointFile) -> bool:
    """Whether the file is there. Names of scratch folders are random, so that of another machine is on none but that."""
    return path is not None and path.is_file() and path.stat().st_size == file.bytes


def _verified(root: Store, key: str, file: CheckpointFile, scratch: Path) -> Path:
    """Return the file's path on this machine once its size and hash match the manifest's."""
    address = f"{root.uri}/{key}/{file.name}"
    path = root.local_path(f"{key}/{file.name}")  # a local store's file is used where it lies
    try:
        if path is None:
            path = scratch / file.name
            root.download(f"{key}/{file.name}", path)
        size, sha256 = _size_and_hash(path)
    except (MissingObject, FileNotFoundError) as cause:
        raise CheckpointError(f"{address} is missing") from cause
    if (size, sha256) != (file.bytes, file.sha256):
        raise CheckpointError(
            f"{address} is damaged: {size} bytes with SHA-256 {sha256[:12]}, "
            f"the manifest says {file.bytes} with {file.sha256[:12]}"
        )
    return path


def _candidates(root: Store, generation: int, continues: str) -> Iterator[str]:
    """Yield the keys of committed checkpoints, newest first, along the recorded parents.

    Of a parent's checkpoints only those up to the one recorded in the claim count: a superseded driver may have written later
    ones. Keys of one generation sort by step, so a comparison of strings is enough.
    """
    limit = ""
    while generation > 0:
        for folder in committed_in(root.at(generation_key(generation))):
            key = f"{generation_key(generation)}/{folder}"
            if not limit or key <= limit:
                yield key
        continues = continues or str(read_claim(root, generation)["continues"])
        if not continues:
            return
        # The claim names one checkpoint of the parent: go on there, from that one down.
        generation, limit, continues = int(continues.partition("/")[0][1:]), continues, ""


def committed_in(store: Store) -> Iterator[str]:
    """Yield the keys of the committed checkpoints in a generation's directory, newest first."""
    # By manifest: files without one belong to a save that is under way or was lost.
    committed = [info.key for info in store.list(FOLDER) if info.key.endswith(f"/{MANIFEST}")]
    for key in sorted(committed, reverse=True):
        yield key.removesuffix(f"/{MANIFEST}")


def _size_and_hash(path: Path) -> tuple[int, str]:
    with path.open("rb") as file:
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()
