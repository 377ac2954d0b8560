"""Which checkpoints of a generation are kept: the last n, every k steps, the best, and those that are referenced.

References come from the receipt, from claims of later generations (what each continues from), and from pins: `pins/*.json` in
the step's directory, written when another training needs a checkpoint (a fork). Units: steps are global batches consumed."""

import contextlib
import json
import logging
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pipeline.cluster.resources import KeepBestBy, Resources
from pipeline.errors import CheckpointError, PipelineError
from pipeline.graph.receipts import claims, read_claim, read_receipt
from pipeline.graph.step import generation_key
from pipeline.storage import Store
from pipeline.training.checkpoints.format import MANIFEST, committed_in, read_manifest, step_of

PINS = "pins/"
MILESTONES = "milestones/"
"""Scores of checkpoints, in the step's directory."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Retention:
    """What is kept besides referenced checkpoints."""

    last: int
    """Number of the newest ones to keep."""
    every_steps: int | None
    """Keep those whose step this divides; None for no such rule."""
    best: int
    """Number of the best to keep."""
    by: KeepBestBy = "loss"
    """What makes one of the best."""

    @classmethod
    def of(cls, resources: Resources) -> "Retention":
        """Return what `resources` asks to keep."""
        return cls(
            last=resources.keep_checkpoints,
            every_steps=resources.keep_every_steps,
            best=resources.keep_best,
            by=resources.keep_best_by,
        )


class StoredCheckpoint(NamedTuple):
    """What retention knows of a committed checkpoint."""

    key: str
    step: int
    loss: float
    """The lower, the better: a loss, or the negative of a score. NaN if it is not known; then it is never among the best."""


def keys_to_keep(stored: Sequence[StoredCheckpoint], retention: Retention, *, referenced: Collection[str]) -> set[str]:
    """Return the keys of the checkpoints to keep."""
    newest = sorted(stored, key=lambda one: one.step, reverse=True)[: retention.last]
    known = [one for one in stored if math.isfinite(one.loss)]
    best = sorted(known, key=lambda one: (one.loss, -one.step))[: retention.best]  # of equal losses the newer one
    regular = [one for one in stored if retention.every_steps and one.step % retention.every_steps == 0]
    return {one.key for one in (*newest, *best, *regular)} | {one.key for one in stored if one.key in referenced}


def referenced_checkpoints(root: Store, *, above: int = 0) -> Iterator[str]:
    """Yield the keys that are referenced in a step's directory: by its receipt, by claims of generations above `above`, by pins."""
    receipt = read_receipt(root)
    if receipt:
        yield str(receipt.made.get("notes", {}).get("checkpoint", ""))
    for generation in claims(root):
        if generation > above:
            yield str(read_claim(root, generation)["continues"])
    for info in root.list(PINS):
        yield str(json.loads(root.read(info.key))["checkpoint"])


class Pruner:
    """Removes the checkpoints of one generation that need not be kept; what cannot be removed is tried again at the next save."""

    def __init__(self, root: Store, generation: int, retention: Retention) -> None:
        self.root, self.generation, self.retention = root, generation, retention
        self._losses: dict[str, float] = {}  # each manifest is read only once

    def prune(self) -> None:
        """Remove what need not be kept; a failure is only a warning, because an old checkpoint too many does no harm."""
        try:
            stored = [StoredCheckpoint(key, step_of(key), self._loss(key)) for key in self._keys()]
            # Asked at every save: another training may fork, and so pin, a checkpoint at any time.
            referenced = set(referenced_checkpoints(self.root, above=self.generation))
            keep = keys_to_keep(stored, self.retention, referenced=referenced)
            for one in stored:
                if one.key not in keep:
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
            by = self.retention.by
            loss = _loss_of(self.root, key) if by == "loss" else _milestone_loss(self.root, key, by)
            if by != "loss" and math.isnan(loss):
                return loss  # its score may still come
            self._losses[key] = loss
        return self._losses[key]


def _loss_of(root: Store, key: str) -> float:
    try:
        loss = read_manifest(root, key).loss
    except CheckpointError:  # a damaged checkpoint is no use as the best one
        return math.nan
    return math.nan if loss is None else loss


def _milestone_loss(root: Store, key: str, by: KeepBestBy) -> float:
    """Return a score of a checkpoint as something to be low; NaN if there is none."""
    path = f"{MILESTONES}step-{step_of(key):08d}.json"
    if not root.exists(path):
        return math.nan
    score = float(json.loads(root.read(path))["scores"].get(by, math.nan))
    return score if by == "held_out_loss" else -score


def remove(root: Store, key: str) -> None:
    """Remove a checkpoint, its manifest first: a checkpoint that is half removed then does not exist."""
    root.delete(f"{key}/{MANIFEST}")
    # Listed to the end before the first deletion, which could shift a listing that comes in pages.
    for info in list(root.list(f"{key}/")):
        root.delete(info.key)
    if folder := root.local_path(key):
        with contextlib.suppress(OSError):  # a file that is not listed keeps it
            folder.rmdir()
