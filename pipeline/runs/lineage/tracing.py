"""`mae compare --lineage`: forward from a shard, an image or another file, or back from the scores of a run.

Errors: DataError for what is neither; TrackingError; StorageError."""

from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import DataError
from pipeline.reporting.comparison.lineage import Lineage
from pipeline.runs.comparing.finding import find
from pipeline.runs.comparing.history import History
from pipeline.runs.comparing.loading import load
from pipeline.runs.lineage.dependencies import dependents, lineage_of
from pipeline.runs.lineage.places import place_of
from pipeline.storage import open_store


def trace(target: str, *, tracking_uri: str, store: str) -> Iterator[Lineage]:
    """Yield the lineage of every run that the target names or, if it names none, what depends on the file that it is."""
    if _is_run(target):
        try:
            found = find([target], tracking_uri)
        except DataError as unknown:
            try:
                place = place_of(target, open_store(store))
            except DataError:
                # a word may be either; what is said of runs has the near names
                raise unknown from None
            yield dependents(place, place.history)
            return
        for one in found:
            run = load(one)
            if not run.steps:
                raise DataError(
                    f"{run.row.name}: none of its steps is finished, or its store cannot be read. {' '.join(run.notes)}"
                )
            yield lineage_of("  ".join(filter(None, (run.row.name, run.row.data, run.row.size))), run.steps)
    else:
        place = place_of(target, open_store(store))
        yield dependents(place, place.history)


def _is_run(target: str) -> bool:
    """Return whether a target can be a run: a name, an id, a store, or the directory of a report or pretraining."""
    if "/" not in target and not Path(target).exists():
        return True
    place = open_store(target.rstrip("/"))
    name = place.uri.rpartition("/")[2]
    return bool(History(place).directories) or name.startswith(("report-", "pretrain-"))
