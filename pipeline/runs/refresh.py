"""`--refresh`: which snapshots a run reads if its source may have grown since the last one.

A listing is pinned by its name, so a refresh means more names: the parts that earlier refreshes have added, and one more if the
source holds a file that none of them lists. Nothing is written here; the run itself lists the new part.
Errors: those of the source and the store."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipeline.config import RunConfig
from pipeline.graph.receipts import Receipt, read_receipt
from pipeline.runs.workflow import listings, snapshot_names
from pipeline.stages.snapshot import has_new_files
from pipeline.storage import Store


@dataclass(frozen=True)
class Refreshed:
    """Result of a refresh."""

    config: RunConfig
    message: str
    """What was found, for the user."""


def refresh(config: RunConfig, store: Store) -> Refreshed:
    """Return the configuration with all the parts to read in `data.snapshot`."""
    configured = snapshot_names(config)
    if not _receipts(config, configured, store):
        return Refreshed(
            config, f"refresh: {config.data.source} is not listed yet; this run lists it for the first time"
        )
    pinned = known_parts(configured, lambda names: bool(_receipts(config, names, store)))
    parts = [receipt.as_input(uri) for uri, receipt in _receipts(config, pinned, store)]
    names = (*pinned, next_name(pinned)) if has_new_files(config.data.source, config.data.labels, parts) else pinned
    finding = "a new part" if names != pinned else "nothing is new"
    chosen = names if len(names) > 1 else names[0]
    as_yaml = f'"{chosen}"' if isinstance(chosen, str) else "[" + ", ".join(f'"{name}"' for name in chosen) + "]"
    return Refreshed(
        config.model_copy(update={"data": config.data.model_copy(update={"snapshot": chosen})}),
        f"refresh: {finding} in {config.data.source}; to pin this state write data.snapshot: {as_yaml}",
    )


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
    data = config.data.model_copy(update={"snapshot": names})
    roots = [store.at(step.directory) for step in listings(config.model_copy(update={"data": data}))]
    found = [(root.uri, receipt) for root in roots if (receipt := read_receipt(root))]
    return found if len(found) == len(roots) else []
