"""The record of a step that the guard objected to: a line in the log, a bundle to replay it from, and the error if it gave up.

    g0007/bundles/step-00000123/rank-0000.json   verdict, reason, loss, gradient norm, learning rate, what was skipped before, the
                                                 training's specification (rank 0 only); written last
                                rank-0000.npz    for each of this rank's samples: id, epoch, loss, and the module's inputs other
                                                 than the image (mask noise)

Images are left out because they follow from ids and epochs. Losses are computed again, with the weights that the step met.
Errors: PipelineError if the guard gave up; it names step, loss, learning rate and the way out."""

import io
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.data.feed.loader import Batch
from pipeline.errors import DataError, PipelineError, StorageError
from pipeline.graph.step import Attempt
from pipeline.storage import Store
from pipeline.training.engine.micro_batches import split
from pipeline.training.guard import GuardState, Judgement
from pipeline.training.spec.engines import AnyEngine
from pipeline.training.spec.spec_json import as_json
from pipeline.training.spec.train_spec import TrainSpec
from pipeline.training.world import World

FOLDER = "bundles/"
MOST = 20
"""Bundles that one process writes at most: the first ones hold the cause, and each costs a forward pass."""

log = logging.getLogger(__name__)

Inputs = Mapping[tuple[int, int], tuple[npt.NDArray[Any], ...]]
"""The module's inputs for each (epoch, sample), without the image."""


class Incidents:
    """Records the incidents that one process meets."""

    def __init__(self, spec: TrainSpec, attempt: Attempt, world: World) -> None:
        self.spec, self.attempt, self.world, self.written = spec, attempt, world, 0

    def record(self, engine: AnyEngine, batch: Batch, judgement: Judgement, lr: float) -> None:
        """Log the incident and write its bundle; raise PipelineError if the guard gave up.

        Collective: every rank calls it, before the weights move again.
        """
        stats, verdict = judgement.stats, judgement.verdict
        if self.world.is_first:
            log.warning(
                "%s: step %d, learning rate %.3g: %s: %s",
                self.attempt.step_name,
                stats.step,
                lr,
                verdict,
                judgement.reason,
            )
        if verdict != "go" and self.written < MOST:
            self.written += 1
            self._write(engine, batch, judgement, lr)
        if verdict == "give_up":
            command = f"mae replay {self.attempt.store.uri}/{bundle_folder(stats.step)}"
            raise PipelineError(
                f"the loss is {stats.loss:.6g} and the gradient norm {stats.grad_norm:.6g} at step {stats.step} (learning rate "
                f"{lr:.3g}): {judgement.reason}. `{command}` shows the samples; if all of them are bad, lower base_lr, "
                f"lengthen warmup_epochs, or train in fp32. The last checkpoint is untouched"
            )

    def _write(self, engine: AnyEngine, batch: Batch, judgement: Judgement, lr: float) -> None:
        stats, rank = judgement.stats, self.world.rank
        inputs = self.spec.task.inputs(batch)
        # Collective at ZeRO-3, so every rank comes here, also one whose samples are all fine.
        losses = engine.losses(split(inputs, engine.settings, self.world.device)).numpy()
        arrays = {"sample_ids": batch.sample_ids.numpy(), "epochs": batch.epochs.numpy(), "losses": losses}
        arrays |= {f"input_{number}": tensor.numpy() for number, tensor in enumerate(inputs[1:], 1)}
        note: dict[str, Any] = {
            "step": stats.step,
            "verdict": judgement.verdict,
            "reason": judgement.reason,
            "loss": repr(stats.loss),  # as text: NaN is not valid JSON
            "grad_norm": repr(stats.grad_norm),
            "lr": lr,
            "not_finite": batch.sample_ids[~np.isfinite(losses)].tolist(),
            "substitutions": batch.substitutions,
            "rank": rank,
            "world_size": self.world.size,
            "skipped": judgement.state_before.skipped,
            "stepped_over": judgement.state_before.stepped_over,
        }
        if self.world.is_first:
            note["specification"] = as_json(self.spec)
        packed = io.BytesIO()
        np.savez_compressed(packed, **arrays)  # type: ignore[arg-type]  # its stub takes one name for a flag
        key = f"{bundle_folder(stats.step)}/rank-{rank:04d}"
        try:
            self.attempt.store.write(f"{key}.npz", packed.getvalue())
            self.attempt.store.write(f"{key}.json", json.dumps(note, default=asdict).encode())
        except StorageError as error:  # a bundle is only a record: training goes on, or ends for its own reason
            log.warning("the bundle of step %d cannot be written: %s", stats.step, error)


def bundle_folder(step: int) -> str:
    """Return the key of a step's bundle in its generation."""
    return f"{FOLDER}step-{step:08d}"


class Bundle(NamedTuple):
    """What all ranks recorded about one step."""

    uri: str
    root_uri: str
    """The training step's directory."""
    note: Mapping[str, Any]
    """The JSON of rank 0."""
    losses: Mapping[tuple[int, int], float]
    """Loss of each (epoch, sample)."""
    inputs: Inputs

    @property
    def step(self) -> int:
        """Return the number of the global batch."""
        return int(self.note["step"])

    @property
    def finite(self) -> bool:
        """Whether loss and gradient norm were finite."""
        return math.isfinite(float(self.note["loss"])) and math.isfinite(float(self.note["grad_norm"]))

    @property
    def state_before(self) -> GuardState:
        """Return which steps had been skipped by then, and which ranges."""
        return GuardState(
            skipped=tuple(self.note["skipped"]), stepped_over=tuple((a, b) for a, b in self.note["stepped_over"])
        )


def read_bundle(store: Store) -> Bundle:
    """Read the bundle in this folder. Errors: DataError if a rank's part is missing or the folder holds no bundle."""
    names = {info.key for info in store.list()}
    try:
        note = json.loads(store.read("rank-0000.json"))
        missing = [name for rank in range(note["world_size"]) if (name := f"rank-{rank:04d}.json") not in names]
        if missing:
            raise DataError(
                f"{store.uri}: {missing[0]} is missing: that worker could not write its part. Take another bundle"
            )
        losses: dict[tuple[int, int], float] = {}
        inputs: dict[tuple[int, int], tuple[npt.NDArray[Any], ...]] = {}
        for rank in range(note["world_size"]):
            # np.load refuses pickled objects by default, so a bundle cannot run code.
            with np.load(io.BytesIO(store.read(f"rank-{rank:04d}.npz"))) as arrays:
                pairs = list(zip(arrays["epochs"].tolist(), arrays["sample_ids"].tolist(), strict=True))
                # In order of name, which is that of number for fewer than ten inputs.
                given = [arrays[name] for name in sorted(arrays.files) if name.startswith("input_")]
                losses |= dict(zip(pairs, arrays["losses"].tolist(), strict=True))
                inputs |= {pair: tuple(array[index] for array in given) for index, pair in enumerate(pairs)}
    except (StorageError, ValueError, KeyError) as cause:
        raise DataError(
            f"{store.uri} is no bundle of a bad step ({cause}). Give a folder bundles/step-XXXXXXXX"
        ) from cause
    return Bundle(store.uri, store.uri.rpartition(f"/{FOLDER}")[0].rpartition("/")[0], note, losses, inputs)
