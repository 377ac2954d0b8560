"""What in a store nobody needs any more: what generations left that another one superseded, and checkpoints never committed.

Judged is only what lies in generations' folders (g0007/...) of steps; shards, receipts, claims and steps as a whole never are.
  a finished step     the generation of its receipt stays, and the checkpoints that receipt, pins and `made` name; of others nothing
  an unfinished step  its newest generation is a run's that may be at work; of others the newest two checkpoints on its line, and
                      what its claim and pins name
Nothing is judged that was superseded, or finished, less than the age bound ago: whoever wrote it may not have noticed yet.
Units: bytes, seconds since the epoch. Errors: StorageError, DataError."""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby, islice
from typing import NamedTuple

from pipeline.graph.receipts import CLAIMS, claims, read_claim, read_receipt
from pipeline.storage import ObjectInfo, Store
from pipeline.training.checkpoints.format import FOLDER, MANIFEST, committed
from pipeline.training.checkpoints.retention import referenced_checkpoints

FALLBACKS = 2
"""Checkpoints of an unfinished step that stay: the newest, and the one before should it be damaged."""


class Unneeded(NamedTuple):
    """An object that may go."""

    key: str
    bytes: int
    why: str


@dataclass(frozen=True, kw_only=True)
class StepState:
    """What is known of a step whose objects are judged."""

    claimed: Mapping[int, float]
    """When each generation was claimed."""
    used: int | None
    """The generation that the receipt names; None: not finished."""
    finished: float | None
    named: Collection[str]
    """Keys of checkpoints that stay."""

    @property
    def live(self) -> int:
        """The generation that readers look at."""
        return self.used if self.used is not None else max(self.claimed)

    def superseded(self, generation: int) -> float:
        """When it was clear that a generation other than the live one is for nothing."""
        later = [time for other, time in self.claimed.items() if other > generation]
        ends = [*later, *([self.finished] if self.finished is not None else [])]
        return max(self.claimed[generation], min(ends))


def unneeded_in_step(state: StepState, objects: Iterable[ObjectInfo], *, before: float) -> Iterator[Unneeded]:
    """Which objects of a step's directory may go; `before`: the age bound as a time."""
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
    """Of a whole store, by key. Lists it once."""
    for directory, infos in groupby(store.list(), key=lambda info: info.key.partition("/")[0]):
        objects = [ObjectInfo(info.key.removeprefix(f"{directory}/"), info.size) for info in infos]
        if any(info.key.startswith(CLAIMS) for info in objects):
            root = store.at(directory)
            for one in unneeded_in_step(read_state(root), objects, before=before):
                yield one._replace(key=f"{directory}/{one.key}")


def read_state(root: Store) -> StepState:
    """Of the step whose directory this is."""
    receipt = read_receipt(root)
    claimed = {generation: float(read_claim(root, generation)["time"]) for generation in claims(root)}
    highest = max(claimed, default=0)
    named = set(referenced_checkpoints(root, above=highest if receipt else highest - 1))
    if receipt is None:
        named |= set(islice(committed(root), FALLBACKS))
    return StepState(
        claimed=claimed,
        used=receipt.generation if receipt else None,
        finished=float(receipt.made["time"]) if receipt else None,
        named=named - {""},
    )


def delete(store: Store, items: Iterable[Unneeded]) -> None:
    """Removes them, manifests first: what is half removed does not exist."""
    for one in sorted(items, key=lambda one: (not one.key.endswith(f"/{MANIFEST}"), one.key)):
        store.delete(one.key)
