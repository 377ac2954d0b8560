"""Finished steps of a store, found by fingerprint, and the runs that they make up.

    <store>/history/<name>/<fingerprint[:12]>.json -> <store>/<name>-<fingerprint[:12]>/receipt.json

No listing of the whole store is needed, which may hold millions of objects. A run is what one report was made from, or a
pretraining that no report has seen yet, with its evaluations.
Errors: DataError for a damaged receipt; StorageError."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from pipeline.errors import DataError
from pipeline.graph.plan import HISTORY
from pipeline.graph.receipts import Receipt, read_receipt
from pipeline.storage import Store

_SCORE_STEP = re.compile(r"(?P<protocol>[a-z_]+(?:-[\d.]+)?)-(?P<dataset>.+)-(?P<encoder>[a-z]+)-s(?P<seed>\d+)")


@dataclass(frozen=True)
class FinishedStep:
    """A finished step and its directory."""

    root: Store
    receipt: Receipt

    @property
    def files(self) -> Store:
        """Where the files of the generation that counts are."""
        return self.receipt.as_input(self.root.uri).store

    @property
    def inputs(self) -> Mapping[str, str]:
        """Name of each input -> its fingerprint."""
        return dict(self.receipt.identity.get("inputs", {}))


class History:
    """The finished steps of one store. Receipts are read when they are asked for, each once."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._read: dict[str, FinishedStep | None] = {}

    @cached_property
    def directories(self) -> Mapping[str, str]:
        """First twelve digits of the fingerprint -> directory of every step that was ever finished."""
        found = {}
        for info in self.store.list(HISTORY):
            name, _, file = info.key.removeprefix(HISTORY).rpartition("/")
            found[file.removesuffix(".json")] = f"{name}-{file.removesuffix('.json')}"
        return found

    def step(self, fingerprint: str) -> FinishedStep | None:
        """Return the finished step with this fingerprint, or None if there is none or it was deleted."""
        short = fingerprint[:12]
        if short not in self._read:
            directory = self.directories.get(short)
            receipt = read_receipt(self.store.at(directory)) if directory else None
            self._read[short] = FinishedStep(self.store.at(directory), receipt) if directory and receipt else None
        return self._read[short]

    def __iter__(self) -> Iterator[FinishedStep]:
        """Yield every finished step."""
        return (step for short in self.directories if (step := self.step(short)))

    def with_inputs(self, step: FinishedStep) -> dict[str, FinishedStep]:
        """Return a step and all that it was made from, by name, inputs before their readers."""
        found: dict[str, FinishedStep] = {}
        for fingerprint in step.inputs.values():
            if source := self.step(fingerprint):
                found |= self.with_inputs(source)
        return found | {step.receipt.step: step}

    def runs(self) -> dict[str, dict[str, FinishedStep]]:
        """Return the runs of the store: directory of the report, or of the pretraining -> steps by name."""
        steps = sorted(self, key=made_at, reverse=True)
        found = {step.root.uri.rpartition("/")[2]: self.with_inputs(step) for step in steps if is_(step, "report")}
        reported = {one.receipt.fingerprint for run in found.values() for one in run.values()}
        for step in steps:
            if is_(step, "pretrain") and step.receipt.fingerprint not in reported:
                found[step.root.uri.rpartition("/")[2]] = self.with_evaluations(step)
        return found

    def with_evaluations(self, pretrained: FinishedStep) -> dict[str, FinishedStep]:
        """Return a pretraining with its evaluations, and all that they were made from."""
        fingerprint = pretrained.receipt.fingerprint
        readers = [step for step in self if is_(step, "evaluate") and fingerprint in step.inputs.values()]
        evaluated = {name: one for reader in readers for name, one in self.with_inputs(reader).items()}
        return self.with_inputs(pretrained) | evaluated

    def run_of(self, directory: str) -> dict[str, FinishedStep]:
        """Return what belongs to the step in a directory: all that it was made from and, for a pretraining, its evaluations."""
        step = self.step(directory.rpartition("-")[2])
        if step is None:
            raise DataError(
                f"{self.store.uri}/{directory}: this step is not finished, so nothing is known of its result"
            )
        return self.with_evaluations(step) if is_(step, "pretrain") else self.with_inputs(step)


def is_(step: FinishedStep, kind: str) -> bool:
    """Return whether a step is of a kind."""
    return step.receipt.kind == kind


def made_at(step: FinishedStep) -> float:
    """Return when a step was finished, in seconds since 1970."""
    return float(step.receipt.made.get("time", 0))


@dataclass(frozen=True)
class ScoreStep:
    """An evaluation step, by what its name says."""

    score: str
    """`<protocol>/<dataset>/<encoder>`."""
    seed: int
    step: FinishedStep

    @property
    def column(self) -> str:
        """`<protocol>/<dataset>`."""
        return self.score.rpartition("/")[0]


def score_steps(steps: Mapping[str, FinishedStep]) -> list[ScoreStep]:
    """Return the evaluations of a run, by score and seed."""
    found = []
    for name, step in steps.items():
        if is_(step, "evaluate") and (match := _SCORE_STEP.fullmatch(name)):
            score = f"{match['protocol']}/{match['dataset']}/{match['encoder']}"
            found.append(ScoreStep(score, int(match["seed"]), step))
    return sorted(found, key=lambda one: (one.score, one.seed))
