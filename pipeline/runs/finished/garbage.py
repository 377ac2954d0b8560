"""Garbage in a store: output of superseded generations, and checkpoints that were never committed.

Only objects in the generations' directories (g0007/...) of steps and cached features can be garbage; shards, receipts, claims and
steps never are.
  finished step     keeps the generation of its receipt, and the checkpoints that receipt and pins name; the rest is garbage
  unfinished step   keeps its newest generation, whose run may be active, the two newest committed checkpoints, and those that its
                    claim and pins name; the rest is garbage
  cached features   go when the encoder or the dataset that they were computed from is gone
An object only counts once its generation has been superseded, or the step finished, for longer than the age limit: until then,
the process that wrote it may not have noticed.
Units: bytes; times in seconds since the epoch. Errors: StorageError, DataError."""

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby, islice
from typing import NamedTuple

from pipeline.evaluation.features import COMPUTED_FROM
from pipeline.evaluation.features import FOLDER as FEATURES
from pipeline.graph.receipts import CLAIMS, claims, read_claim, read_receipt
from pipeline.storage import ObjectInfo, Store
from pipeline.training.checkpoints.format import FOLDER, MANIFEST, committed
from pipeline.training.checkpoints.retention import referenced_checkpoints

FALLBACKS = 2
"""Checkpoints of an unfinished step to keep: the newest, and the one before it in case the newest is damaged."""


class Unneeded(NamedTuple):
    """An object that can be deleted."""

    key: str
    bytes: int
    why: str


@dataclass(frozen=True, kw_only=True)
class StepState:
    """What decides which objects of a step are garbage."""

    claimed: Mapping[int, float]
    """Time at which each generation was claimed."""
    used: int | None
    """The generation that the receipt names; None if the step is not finished."""
    finished: float | None
    """Time of the receipt; None if the step is not finished."""
    named: Collection[str]
    """Keys of checkpoints to keep."""

    @property
    def live(self) -> int:
        """The generation that counts: the receipt's, or else the newest."""
        return self.used if self.used is not None else max(self.claimed)

    def superseded(self, generation: int) -> float:
        """Return the time from which a generation other than the live one was of no use."""
        later = [time for other, time in self.claimed.items() if other > generation]
        ends = [*later, *([self.finished] if self.finished is not None else [])]
        return max(self.claimed[generation], min(ends))


def unneeded_in_step(state: StepState, objects: Iterable[ObjectInfo], *, before: float) -> Iterator[Unneeded]:
    """Yield those objects of a step's directory that were garbage at the time `before`."""
    # a list, because it is walked twice
    held = list(objects)
    whole = {info.key.removesuffix(f"/{MANIFEST}") for info in held if info.key.endswith(f"/{MANIFEST}")}
    for info in held:
        match = re.match(r"g(\d{4,})/", info.key)
        generation = int(match[1]) if match else 0
        if generation not in state.claimed or any(info.key.startswith(f"{key}/") for key in state.named):
            continue
        if generation != state.live:
            if state.superseded(generation) < before:
                yield Unneeded(info.key, info.size, f"superseded by g{state.live:04d}")
        elif state.finished is not None and state.finished < before:
            folder = info.key.rpartition("/")[0]
            if f"/{FOLDER}" in info.key and folder not in whole:
                yield Unneeded(info.key, info.size, "never committed")


def unneeded(store: Store, *, before: float) -> Iterator[Unneeded]:
    """Yield the objects of a whole store that were garbage at the time `before`, by key. Lists the store once."""
    for directory, infos in groupby(store.list(), key=lambda info: info.key.partition("/")[0]):
        objects = [ObjectInfo(info.key.removeprefix(f"{directory}/"), info.size) for info in infos]
        if f"{directory}/" == FEATURES:
            yield from _unneeded_features(store, objects, before=before)
        elif any(info.key.startswith(CLAIMS) for info in objects):
            root = store.at(directory)
            for one in unneeded_in_step(read_state(root), objects, before=before):
                yield one._replace(key=f"{directory}/{one.key}")


def _unneeded_features(store: Store, objects: Iterable[ObjectInfo], *, before: float) -> Iterator[Unneeded]:
    """Yield the objects of folders of features whose encoder or dataset is gone. Folders of older versions do not name them."""
    for folder, infos in groupby(objects, key=lambda info: info.key.partition("/")[0]):
        held = list(infos)
        if not any(info.key == f"{folder}/{COMPUTED_FROM}" for info in held):
            continue
        made = json.loads(store.read(f"{FEATURES}{folder}/{COMPUTED_FROM}"))
        if made["time"] < before and (gone := [key for key in made["files"] if not store.exists(key)]):
            why = f"computed from {gone[0]}, which is gone"
            yield from (Unneeded(f"{FEATURES}{info.key}", info.size, why) for info in held)


def read_state(root: Store) -> StepState:
    """Read the state of the step with this directory."""
    receipt = read_receipt(root)
    claimed = {generation: float(read_claim(root, generation)["time"]) for generation in claims(root)}
    highest = max(claimed, default=0)
    # - 1: of an unfinished step, what its newest claim continues from is still needed
    named = set(referenced_checkpoints(root, above=highest if receipt else highest - 1))
    if receipt is None:
        named |= set(islice(committed(root), FALLBACKS))
    return StepState(
        claimed=claimed,
        used=receipt.generation if receipt else None,
        finished=float(receipt.made["time"]) if receipt else None,
        named=named - {""},  # named by claims that start from nothing
    )


def delete(store: Store, items: Iterable[Unneeded]) -> None:
    """Delete the objects, manifests first: a checkpoint without its manifest does not exist, so none is ever half there."""
    ordered = sorted(items, key=lambda one: (not one.key.endswith(f"/{MANIFEST}"), one.key))
    for one in ordered:
        store.delete(one.key)
    for one in ordered:
        _remove_empty_folders(store, one.key)


def _remove_empty_folders(store: Store, key: str) -> None:
    """Remove the folders above a deleted file that are empty, up to the generation's or the features' own. Buckets have none."""
    path = store.local_path(key)
    for _ in range(key.count("/") - 1):
        path = path and path.parent
        try:
            if path:
                path.rmdir()
        except FileNotFoundError:  # removed for another file
            continue
        except OSError:  # not empty
            return
