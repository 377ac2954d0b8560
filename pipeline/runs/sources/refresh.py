"""Which snapshots a run reads: those that data.snapshot names, or else all in the store; `--refresh` looks for more.

A listing is pinned by its name, so a refresh means more names: the parts that earlier refreshes have added, and one more if the
source holds a file that none of them lists. Nothing is written here; the run itself lists the new part. Afterwards the plain
command reads the same state, unless `data.snapshot` is written.
Errors: those of the source and the store."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipeline.config import RunConfig
from pipeline.data.snapshots.parts import has_new_files
from pipeline.graph.receipts import Receipt, read_receipt
from pipeline.runs.workflow import parts_of_sources, snapshot_names
from pipeline.storage import Store


@dataclass(frozen=True)
class Refreshed:
    """Result of a refresh."""

    config: RunConfig
    message: str
    """What was found, for the user."""


def newest(config: RunConfig, store: Store) -> RunConfig:
    """Return the configuration with all parts that refreshes have added, if it leaves data.snapshot to us."""
    if "snapshot" in config.data.model_fields_set:
        return config
    return with_snapshots(config, known_parts(snapshot_names(config), lambda names: is_pinned(config, names, store)))


def with_snapshots(config: RunConfig, names: tuple[str, ...]) -> RunConfig:
    """Return the configuration with these names in `data.snapshot`."""
    if names == snapshot_names(config):
        return config
    return config.model_copy(update={"data": config.data.model_copy(update={"snapshot": names})})


def is_pinned(config: RunConfig, names: tuple[str, ...], store: Store) -> bool:
    """Return whether all these snapshots of data.source are finished."""
    return bool(_receipts(config, names, store))


def refresh(config: RunConfig, store: Store) -> Refreshed:
    """Return the configuration with all the parts to read in `data.snapshot`."""
    configured = snapshot_names(config)
    if not _receipts(config, configured, store):
        return Refreshed(
            config, f"refresh: {config.data.source} is not listed yet; this run lists it for the first time"
        )
    pinned = known_parts(configured, lambda names: is_pinned(config, names, store))
    parts = [receipt.as_input(uri) for uri, receipt in _receipts(config, pinned, store)]
    where = config.data.moved or config.data
    names = (*pinned, next_name(pinned)) if has_new_files(where.source, where.labels, parts) else pinned
    finding = "a new part" if names != pinned else "nothing is new"
    return Refreshed(
        with_snapshots(config, names),
        f"refresh: {finding} in {where.source}; to pin this state write data.snapshot: {as_yaml(names)}",
    )


def as_yaml(names: Sequence[str]) -> str:
    """Return the names as `data.snapshot` takes them."""
    quoted = ", ".join(f'"{name}"' for name in names)
    return quoted if len(names) == 1 else f"[{quoted}]"


def known_parts(names: tuple[str, ...], is_pinned: Callable[[tuple[str, ...]], bool]) -> tuple[str, ...]:
    """Return the names, followed by all later ones that earlier refreshes have pinned."""
    while is_pinned(following := (*names, next_name(names))):
        names = following
    return names


def next_name(names: Sequence[str]) -> str:
    """Return the number after the highest, or the part's position if no name is a number."""
    numbers = [int(name) for name in names if name.isdecimal()]
    return str(max(numbers) + 1 if numbers else len(names) + 1)


def _receipts(config: RunConfig, names: tuple[str, ...], store: Store) -> list[tuple[str, Receipt]]:
    """Address and receipt of each part's snapshot, or an empty list if one is missing."""
    steps = [step.inputs["snapshot"] for step in parts_of_sources(with_snapshots(config, names))["data"]]
    roots = [store.at(step.directory) for step in steps]
    found = [(root.uri, receipt) for root in roots if (receipt := read_receipt(root))]
    return found if len(found) == len(roots) else []
