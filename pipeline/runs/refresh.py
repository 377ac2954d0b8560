"""`--refresh`: which snapshots a run reads when its source may hold more than is pinned.

A listing is pinned by its name, so a refresh is another name: the parts that the store knows after the configured ones, and
one more if the source holds a file that none of them lists. Nothing is written here.
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
    """What a refresh came to."""

    config: RunConfig
    said: str
    """In words, for the person at the terminal."""


def refresh(config: RunConfig, store: Store) -> Refreshed:
    """The configuration with the parts to read."""
    configured = snapshot_names(config)
    if not _receipts(config, configured, store):
        return Refreshed(
            config, f"refresh: {config.data.source} is not listed yet; this run lists it for the first time"
        )
    pinned = known_parts(configured, lambda names: bool(_receipts(config, names, store)))
    parts = [receipt.as_input(uri) for uri, receipt in _receipts(config, pinned, store)]
    names = (*pinned, next_name(pinned)) if has_new_files(config.data.source, config.data.labels, parts) else pinned
    what = "a new part" if names != pinned else "nothing is new"
    chosen = names if len(names) > 1 else names[0]
    written = f'"{chosen}"' if isinstance(chosen, str) else "[" + ", ".join(f'"{name}"' for name in chosen) + "]"
    return Refreshed(
        config.model_copy(update={"data": config.data.model_copy(update={"snapshot": chosen})}),
        f"refresh: {what} in {config.data.source}; to keep to it write data.snapshot: {written}",
    )


def known_parts(names: tuple[str, ...], is_pinned: Callable[[tuple[str, ...]], bool]) -> tuple[str, ...]:
    """The names, continued by the numbers after them as far as these are pinned."""
    while is_pinned(following := (*names, next_name(names))):
        names = following
    return names


def next_name(names: Sequence[str]) -> str:
    """The number after the highest; after names that are no numbers, that of the part."""
    numbers = [int(name) for name in names if name.isdecimal()]
    return str(max(numbers) + 1 if numbers else len(names) + 1)


def _receipts(config: RunConfig, names: tuple[str, ...], store: Store) -> list[tuple[str, Receipt]]:
    """Address and receipt of the snapshots of these parts; empty when one is missing."""
    data = config.data.model_copy(update={"snapshot": names})
    roots = [store.at(step.directory) for step in listings(config.model_copy(update={"data": data}))]
    found = [(root.uri, receipt) for root in roots if (receipt := read_receipt(root))]
    return found if len(found) == len(roots) else []
