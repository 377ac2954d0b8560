"""What state of the data a run reads, settled from the store before its steps are built, and one line for all that is not obvious.

In this order: data that moved keep their recorded address (`moved`), the newest snapshots are taken or `--refresh` looks for more
(`refresh`), and the source is compared with them (`source_changes`). Writes nothing but the record of a move.
Errors: those of the store and, with `refresh`, of the source."""

from collections.abc import Callable

from pipeline.config import RunConfig
from pipeline.runs.sources.changes import source_changes
from pipeline.runs.sources.moved import recorded_addresses
from pipeline.runs.sources.refresh import as_yaml, newest, refresh
from pipeline.runs.workflow import snapshot_names
from pipeline.storage import open_store


def settled(config: RunConfig) -> RunConfig:
    """Return the configuration under which a run finds its finished steps: recorded addresses, newest snapshots."""
    store = open_store(config.store)
    return newest(recorded_addresses(config, store, say=lambda _: None, record=False), store)


def settled_for_run(
    config: RunConfig, *, say: Callable[[str], None], look_for_new: bool = False, record: bool = False
) -> RunConfig:
    """Settle the configuration of a run or plan, and say what is newer, moved or out of date. `record`: remember a move."""
    store = open_store(config.store)
    config = recorded_addresses(config, store, say=say, record=record)
    if look_for_new:
        refreshed = refresh(config, store)
        say(refreshed.message)
        return refreshed.config
    latest = newest(config, store)
    if latest != config:
        names = as_yaml(snapshot_names(latest))
        say(f"data.snapshot is not written, so this run reads the newest state of {config.data.source}: {names}")
    for line in source_changes(latest, store):
        say(line)
    return latest
