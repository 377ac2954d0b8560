"""Where a file that a person names belongs: the step that wrote it or, for an image, the dataset that holds it.

Errors: DataError for a file that no finished step knows; StorageError."""

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.dataset.address import dataset_address, is_indexed, shard_address
from pipeline.data.dataset.schema import ShardRow
from pipeline.errors import DataError
from pipeline.graph.receipts import RECEIPT
from pipeline.runs.comparing.history import FinishedStep, History, is_
from pipeline.storage import Store, open_store


@dataclass(frozen=True, kw_only=True)
class Place:
    """A file, and the step that it belongs to."""

    step: FinishedStep
    history: History
    kind: str
    """`shard`, `image`, or `file`."""
    name: str
    uri: str = ""
    text: str = ""
    split: str = ""
    """Of a shard or an image; empty for what is read whole."""
    read: bool = True
    """Whether readers of the step read it: a quarantined image or a copy that is not served is not."""
    notes: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """What the lineage is of."""
        return f"what depends on {self.kind} {self.name}"


def place_of(target: str, store: Store) -> Place:
    """Return where a shard, a file of a step, or an image of a source belongs. `store`: where images are looked for."""
    if place := _in_step(target):
        return place
    history = History(store)
    datasets = [step for step in history if is_(step, "shard")]
    for dataset in datasets:
        if place := _indexed_tar(target, dataset, history) or _image(target, dataset, history):
            return place
    known = sorted({str(step.receipt.identity["config"]["source"]) for step in datasets})
    raise DataError(
        f"{target!r} is no file of a finished step, and no image of a dataset in {store.uri}"
        + (f" (sources: {', '.join(known)}). " if known else ", which has no dataset. ")
        + "Give the path or address of a shard or another file of a store, or an image as its source has it, with --store STORE"
    )


def _in_step(target: str) -> Place | None:
    """Return the step above a path or address, if there is one."""
    if "/" not in target and not Path(target).exists():
        return None
    address = open_store(target.rstrip("/")).uri
    parts = address.split("/")
    for depth in range(len(parts), 3, -1):
        root = open_store("/".join(parts[:depth]))
        if depth > 3 and _is_step(root):
            history = History(open_store("/".join(parts[: depth - 1])))
            step = history.step(parts[depth - 1].rpartition("-")[2])
            if step is None:
                raise DataError(f"{root.uri}: this step is not finished, so nothing was made from it")
            return _file("/".join(parts[depth:]), step, history)
    return None


def _is_step(root: Store) -> bool:
    try:
        return root.exists(RECEIPT) or next(iter(root.list("gen/")), None) is not None
    except DataError:
        return False


def _file(key: str, step: FinishedStep, history: History) -> Place:
    if not key:
        return Place(step=step, history=history, kind="step", name=step.receipt.step, uri=step.root.uri)
    if not step.root.exists(key):
        raise DataError(f"{step.root.uri}/{key} does not exist")
    uri = f"{step.root.uri}/{key}"
    if is_(step, "shard"):
        manifest = dataset_address(step.receipt.as_input(step.root.uri)).open()
        for shard in manifest.all_shards().to_pylist():
            if shard["key"] == key:
                return _shard(shard, uri, step, history)
        if key.startswith("shards/"):
            note = "no manifest names this shard, so no step reads it"
            return Place(step=step, history=history, kind="shard", name=key, uri=uri, read=False, notes=(note,))
    generation = key.partition("/")[0]
    if generation.startswith("g0") and generation != f"g{step.receipt.generation:04d}":
        note = (
            f"generation {generation} was superseded by g{step.receipt.generation:04d}, which readers of the step read"
        )
        return Place(step=step, history=history, kind="file", name=key, uri=uri, read=False, notes=(note,))
    return Place(step=step, history=history, kind="file", name=key, uri=uri)


def _shard(row: ShardRow, uri: str, step: FinishedStep, history: History) -> Place:
    text = f"{row['samples']} images, split {row['split']}"
    return Place(
        step=step,
        history=history,
        kind="shard",
        name=row["key"].rpartition("/")[2],
        uri=uri,
        text=text,
        split=row["split"],
    )


def _indexed_tar(target: str, dataset: FinishedStep, history: History) -> Place | None:
    """Return the place of a tar that was indexed where it lies."""
    manifest = dataset_address(dataset.receipt.as_input(dataset.root.uri)).open()
    for shard in manifest.all_shards().to_pylist():
        if is_indexed(shard["key"]) and shard["key"] in {target, open_store(target).uri}:
            return _shard(shard, shard["key"], dataset, history)
    return None


def _image(target: str, dataset: FinishedStep, history: History) -> Place | None:
    """Return the place of an image, given as its path, or its path below the source, or its key in the shard."""
    source = str(dataset.receipt.identity["config"]["source"]).rstrip("/")
    wanted = {target, target.removeprefix(f"{source}/"), str(Path(target).absolute()).removeprefix(f"{source}/")}
    manifest = dataset_address(dataset.receipt.as_input(dataset.root.uri)).open()
    names = pa.array(sorted(wanted))
    for shard in manifest.all_shards().to_pylist():
        # filtered as columns: rows as Python objects would take minutes for a million images
        table = manifest.stored_samples(shard["shard"])
        matches = pc.or_(*(pc.is_in(table.column(name), value_set=names) for name in ("source", "key")))
        for row in table.filter(matches).to_pylist():
            copy = "a copy, byte for byte, of another image of its split, which is served in its place"
            return Place(
                step=dataset,
                history=history,
                kind="image",
                name=row["source"],
                uri=shard_address(manifest.root, shard["key"]),
                text=f"sample {row['sample_id']}, split {row['split']}",
                split=row["split"],
                read=row["served"],
                notes=() if row["served"] else (copy,),
            )
    for row in manifest.quarantine().to_pylist():
        if row["source"] in wanted:
            note = (f"quarantined ({row['reason']}), so it is in no shard",)
            return Place(
                step=dataset,
                history=history,
                kind="image",
                name=row["source"],
                split=row["split"],
                read=False,
                notes=note,
            )
    return None
