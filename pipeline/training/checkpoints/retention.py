"""Which checkpoints of a generation are kept: the last n, every k steps, those of the lowest loss, and what anybody names.

Named are the checkpoint that a receipt stands on, what another generation was claimed to continue from, and pins (`pins/*.json` in
the step's directory, written by who needs a checkpoint from elsewhere: a fork). Units: steps are global batches consumed."""

import json
import logging
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pipeline.cluster.resources import Resources
from pipeline.errors import CheckpointError, PipelineError
from pipeline.graph.receipts import claims, read_claim, read_receipt
from pipeline.graph.step import generation_key
from pipeline.storage import Store
from pipeline.training.checkpoints.format import MANIFEST, committed_in, read_manifest, step_of

PINS = "pins/"

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Retention:
    """What is kept beside what is named."""

    last: int
    """The newest n."""
    every_steps: int | None
    """Those whose step this divides; None: none for that."""
    best: int
    """The n of the lowest loss."""

    @classmethod
    def of(cls, resources: Resources) -> "Retention":
        """Return what `resources` asks to keep."""
        return cls(last=resources.keep_checkpoints, every_steps=resources.keep_every_steps, best=resources.keep_best)


class StoredCheckpoint(NamedTuple):
    """A committed checkpoint, as retention sees it."""

    key: str
    step: int
    loss: float
    """NaN: not known, never among the best."""


def kept(held: Sequence[StoredCheckpoint], retention: Retention, *, named: Collection[str]) -> set[str]:
    """Keys of those to keep."""
    newest = sorted(held, key=lambda one: one.step, reverse=True)[: retention.last]
    known = [one for one in held if math.isfinite(one.loss)]
    best = sorted(known, key=lambda one: (one.loss, -one.step))[: retention.best]
    regular = [one for one in held if retention.every_steps and one.step % retention.every_steps == 0]
    return {one.key for one in (*newest, *best, *regular)} | {one.key for one in held if one.key in named}


def named_checkpoints(root: Store, *, above: int = 0) -> Iterator[str]:
    """Keys, in a step's directory, that its receipt, claims of generations above a number, or pins name."""
    receipt = read_receipt(root)
    if receipt:
        yield str(receipt.made.get("notes", {}).get("checkpoint", ""))
    for generation in claims(root):
        if generation > above:
            yield str(read_claim(root, generation)["continues"])
    for info in root.list(PINS):
        yield str(json.loads(root.read(info.key))["checkpoint"])


class Pruner:
    """Removes what need not be kept of one generation. What cannot be removed now is tried again after the next checkpoint."""

    def __init__(self, root: Store, generation: int, retention: Retention) -> None:
        self.root, self.generation, self.retention = root, generation, retention
        self._losses: dict[str, float] = {}  # a manifest is read once

    def prune(self) -> None:
        """Each one's manifest goes first: what is half removed does not exist."""
        try:
            held = [StoredCheckpoint(key, step_of(key), self._loss(key)) for key in self._keys()]
            stay = kept(held, self.retention, named=set(named_checkpoints(self.root, above=self.generation)))
            for one in held:
                if one.key not in stay:
                    remove(self.root, one.key)
        except PipelineError as error:
            log.warning("old checkpoints stay for now: %s", error)

    def _keys(self) -> Iterator[str]:
        base = generation_key(self.generation)
        return (f"{base}/{folder}" for folder in committed_in(self.root.at(base)))

    def _loss(self, key: str) -> float:
        if not self.retention.best:
            return math.nan
        if key not in self._losses:
            self._losses[key] = _loss_of(self.root, key)
        return self._losses[key]


def _loss_of(root: Store, key: str) -> float:
    try:
        loss = read_manifest(root, key).loss
    except CheckpointError:  # a damaged one is of no use as the best
        return math.nan
    return math.nan if loss is None else loss


def remove(root: Store, key: str) -> None:
    """Removes a checkpoint."""
    root.delete(f"{key}/{MANIFEST}")
    for info in list(root.list(f"{key}/")):
        root.delete(info.key)
