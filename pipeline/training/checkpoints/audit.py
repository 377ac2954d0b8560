"""Audit a training step: do the ids recorded in its newest committed checkpoint agree with the arithmetic of the order?

Reads manifests and receipts but no weights, and may run while the step is training.
Errors: CheckpointError without a committed checkpoint; DataError if the dataset cannot be found or is a different one."""

from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.data.dataset.address import DatasetAddress, dataset_address
from pipeline.data.dataset.facts import DatasetFacts
from pipeline.data.feed.expected_ids import (
    Ids,
    all_ids,
    describe_difference,
    epochs_of,
    expected_ids,
    named,
    not_of_this_order,
)
from pipeline.data.feed.order import ORDER_VERSION, OrderConfig, SampleOrder
from pipeline.data.feed.selection import Part, Selection, select
from pipeline.errors import CheckpointError, DataError
from pipeline.graph.receipts import finished_steps, read_receipt
from pipeline.storage import Store, open_store
from pipeline.training.checkpoints.format import FOLDER, MANIFEST, CheckpointManifest, committed, read_manifest
from pipeline.training.facts import TrainingFacts
from pipeline.training.guard import Range


@dataclass(frozen=True, kw_only=True)
class AuditResult:
    """What the newest checkpoint of a step records, and whether it is right."""

    step_uri: str
    checkpoint: str
    """Its key in the step's directory."""
    global_step: int
    epochs: float
    expected: Ids
    recorded_count: int | None
    """None if the checkpoint was written before ids were counted."""
    recorded_digest: int
    substitutions: int
    """Recorded substitutions, which the audit allows for."""
    skipped_steps: int
    """Steps whose samples reached the devices but moved no weight."""
    stepped_over: tuple[Range, ...]
    """Skipped ranges, whose samples never reached a device: known gaps that the guard made."""
    problems: tuple[str, ...]

    @property
    def agrees(self) -> bool:
        """Whether every sample reached a device as often as it should, apart from recorded substitutions and gaps."""
        return not self.problems

    @property
    def line(self) -> str:
        """Return the result as one line."""
        seen = f"{self.step_uri}: {self.expected.count} ids in {self.global_step} steps ({self.epochs:.2f} epochs)"
        excused = f", {self.substitutions} recorded substitutions among them" if self.substitutions else ""
        if self.skipped_steps:
            excused += f", the gradients of {self.skipped_steps} steps dropped by the guard"
        if self.stepped_over:
            gaps = ", ".join(f"{first} to {last - 1}" for first, last in self.stepped_over)
            excused += f", known gaps where it rolled back: steps {gaps}"
        if self.agrees:
            return f"{seen}, each once an epoch{excused}"
        return f"{seen}{excused}: FAILED. {'; '.join(self.problems)}"


def audit(root: Store, *, dataset: DatasetAddress | None = None) -> AuditResult:
    """Audit the training step whose directory this is; its dataset is looked for in the same store unless it is given."""
    keys = list(committed(root))
    if not keys:
        raise CheckpointError(f"{root.uri}: no committed checkpoint, so there is nothing to audit yet")
    newest = read_manifest(root, keys[0])
    line = _ExpectedLine(newest, dataset or find_dataset(_above(root), str(newest.cursor["dataset"])))
    problems = list(line.problems(newest))
    receipt = read_receipt(root)
    if receipt and (digest := TrainingFacts.read(receipt.facts).ids_digest) != str(newest.ids_digest):
        problems.append(f"the receipt says digest {digest}, {keys[0]} says {newest.ids_digest}")
    if line.excess(newest).digest:
        # Older checkpoints narrow down when it went wrong; they are read only if the newest one disagrees.
        agreeing = (m for m in (read_manifest(root, key) for key in keys[1:]) if not line.excess(m).digest)
        problems.insert(0, line.difference(next(agreeing, None), newest))
    return AuditResult(
        step_uri=root.uri,
        checkpoint=keys[0],
        global_step=newest.global_step,
        epochs=newest.global_step * line.global_batch / line.order.samples_per_epoch,
        expected=line.expected(newest),
        recorded_count=newest.ids_count,
        recorded_digest=newest.ids_digest,
        substitutions=len(newest.substitutions),
        skipped_steps=len(newest.guard.skipped),
        stepped_over=newest.guard.stepped_over,
        problems=tuple(problems),
    )


def training_steps(store: Store) -> list[str]:
    """Return the directories in a run's store that hold committed checkpoints. Lists the whole store."""
    parts = (info.key.split("/") for info in store.list())
    # step / generation / checkpoints / step-XXXXXXXX / manifest.json
    return sorted({key[0] for key in parts if len(key) == 5 and key[2] == FOLDER.rstrip("/") and key[4] == MANIFEST})


def find_dataset(store: Store, digest: str) -> DatasetAddress:
    """Find the finished step in a run's store that made the dataset with this digest."""
    for directory, receipt in finished_steps(store):
        if receipt.kind in {"shard", "join"} and DatasetFacts.read(receipt.facts).digest == digest:
            return dataset_address(receipt.as_input(store.at(directory).uri))
    raise DataError(
        f"{store.uri}: no finished shard or join step made the dataset {digest[:12]} that was trained on. Give the directory "
        "of the step that did with --dataset"
    )


def dataset_at(root: Store) -> DatasetAddress:
    """Return the dataset of the finished shard or join step whose directory this is."""
    receipt = read_receipt(root)
    if receipt is None:
        raise DataError(
            f"{root.uri} has no receipt, so it is not the directory of a finished shard or join step. Give such a directory"
        )
    return dataset_address(receipt.as_input(root.uri))


class _ExpectedLine:
    """Computes the ids that a step's checkpoints should have seen, from the cursor of the newest one."""

    def __init__(self, manifest: CheckpointManifest, dataset: DatasetAddress) -> None:
        cursor = manifest.cursor
        if cursor["version"] != ORDER_VERSION:
            raise DataError(
                f"the checkpoint's order has version {cursor['version']}, this program computes version {ORDER_VERSION}. "
                "Audit it with the release that trained it"
            )
        opened = dataset.open()
        if opened.digest != cursor["dataset"]:
            raise DataError(
                f"{dataset.root_uri} holds the dataset {opened.digest[:12]}, but {str(cursor['dataset'])[:12]} was trained on. "
                "Give the directory of the step that made that one with --dataset"
            )
        seed, self.global_batch = int(cursor["seed"]), int(cursor["global_batch"])
        part: Part = "kept" if cursor.get("holds_out") else "whole"
        self.selection: Selection = select(opened, "train", cursor["train_samples"], seed=seed, part=part)
        config = OrderConfig(seed=seed, lanes=cursor["lanes"], window_shards=cursor["window_shards"])
        self.order = SampleOrder(self.selection.counts, config)
        self.substitutions = manifest.substitutions  # the newest manifest also lists all earlier ones
        self._expected: dict[int, Ids] = {}

    def expected(self, manifest: CheckpointManifest) -> Ids:
        """Return the ids that must have reached devices up to a checkpoint."""
        step = manifest.global_step
        if step not in self._expected:
            self._expected[step] = self._between(0, step)
        ids = self._expected[step]
        for first, last in manifest.guard.stepped_over:
            # Cut at the checkpoint's step: after a rollback a skipped range may still lie ahead of it.
            ids = ids.minus(self._between(min(first, step), min(last, step)))
        return ids

    def _between(self, start: int, stop: int) -> Ids:
        return expected_ids(
            self.selection,
            self.order,
            global_batch=self.global_batch,
            start=start,
            stop=stop,
            substitutions=self.substitutions,
        )

    def excess(self, manifest: CheckpointManifest) -> Ids:
        """Return what was recorded minus what was expected."""
        expected = self.expected(manifest)
        # Checkpoints from before ids were counted are compared by digest only.
        count = expected.count if manifest.ids_count is None else manifest.ids_count
        return Ids(count, manifest.ids_digest).minus(expected)

    def difference(self, agreeing: CheckpointManifest | None, manifest: CheckpointManifest) -> str:
        """Describe what went wrong between the newest checkpoint that agrees (None for the start) and one that does not."""
        start = agreeing.global_step if agreeing else 0
        epochs = epochs_of(
            start, manifest.global_step, global_batch=self.global_batch, samples=self.order.samples_per_epoch
        )
        words = describe_difference(
            self.excess(manifest), all_ids(self.selection), epochs, counted=manifest.ids_count is not None
        )
        return f"between steps {start} and {manifest.global_step} the devices saw other ids than the order asks for: {words}"

    def problems(self, manifest: CheckpointManifest) -> Iterator[str]:
        """Yield what is wrong apart from the digest."""
        excess = self.excess(manifest)
        if excess.count and not excess.digest:
            yield f"{manifest.ids_count} ids were counted, {self.expected(manifest).count} are expected"
        wrong = not_of_this_order(
            self.selection, self.order, global_batch=self.global_batch, substitutions=self.substitutions
        )
        if wrong:
            yield f"{len(wrong)} recorded substitutions do not belong to this order: {named(wrong)}"


def _above(root: Store) -> Store:
    """Return the run's store that a step's directory lies in."""
    return open_store(root.uri.rpartition("/")[0])
