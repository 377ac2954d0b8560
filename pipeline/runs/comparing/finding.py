"""From what a person types to runs: a name, an id of MLflow or its beginning, a store, the directory of a step, or a search.

Errors: DataError for a run that is unknown or ambiguous, with the names that come near; TrackingError; StorageError."""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import tracking
from pipeline.errors import DataError
from pipeline.reporting.comparison.values import RunRow
from pipeline.runs.comparing.tracked import tracked_row
from pipeline.storage import Store, open_store
from pipeline.tracking import TrackedRun, names
from pipeline.tracking.database import sqlite_file

if TYPE_CHECKING:
    from pipeline.runs.comparing.history import FinishedStep

ID_DIGITS = 6
"""Digits of an MLflow id that are enough, if only one run begins with them."""
_SHOWN = 8


@dataclass(frozen=True)
class Found:
    """A run, and where more is known of it."""

    row: RunRow
    tracked: TrackedRun | None = None
    """None for a run that was found by its receipts alone."""
    tracking_uri: str = ""
    steps: "Mapping[str, FinishedStep] | None" = None
    """By name; None where MLflow has to be asked for them."""


def find_all(tracking_uri: str, *, query: str = "") -> list[Found]:
    """Return every run of an MLflow, or those that its search finds, newest first. Raises DataError if there is none."""
    found = _all(tracking_uri, query)
    if not found:
        what = f"a run that matches {query!r}" if query else "a run of mae"
        raise DataError(f"MLflow at {tracking.redact_text(tracking_uri)} has not {what}")
    return found


def find(targets: Sequence[str], tracking_uri: str) -> list[Found]:
    """Return the runs that are named, in that order, each once. An empty address stands for no MLflow."""
    found: dict[tuple[str, str, str], Found] = {}
    known: list[Found] | None = None
    for target in targets:
        if _is_address(target):
            runs = _in_store(target, tracking_uri)
        else:
            known = _all(tracking_uri) if known is None and tracking_uri else known or []
            runs = [_named(target, known, tracking_uri)]
        for run in runs:
            found.setdefault((run.row.run_id, run.row.store, run.row.name), run)
    return list(found.values())


def _all(tracking_uri: str, query: str = "") -> list[Found]:
    return [Found(tracked_row(run), run, tracking_uri) for run in tracking.parents_in(tracking_uri, query=query)]


def _is_address(target: str) -> bool:
    return "/" in target or Path(target).is_dir()


def _named(target: str, known: Sequence[Found], tracking_uri: str) -> Found:
    """Return the one run with this name or id."""
    matches = [one for one in known if target in _names_of(one)]
    if not matches and re.fullmatch(rf"[0-9a-f]{{{ID_DIGITS},32}}", target):
        matches = [one for one in known if one.row.run_id.startswith(target)]
    if len(matches) == 1:
        return matches[0]
    where = f"MLflow at {tracking.redact_text(tracking_uri)}" if tracking_uri else "no MLflow, since tracking is none"
    if matches:
        listed = "\n".join(f"  {_line(one.row)}" for one in matches[:_SHOWN])
        more = f"\n  and {len(matches) - _SHOWN} more" if len(matches) > _SHOWN else ""
        raise DataError(
            f"{target!r} is the name of {len(matches)} runs. Write {ID_DIGITS} digits or more of an id instead:\n{listed}{more}"
        )
    every = list(dict.fromkeys(name for one in known for name in _names_of(one)))
    near = difflib.get_close_matches(target, every, n=5, cutoff=0.4) or every[:5]
    hint = f"Near it: {', '.join(near)}" if near else "It has none of mae's runs"
    raise DataError(
        f"no run is named {target!r}, and no id begins with it ({where}). {hint}. --tracking names another MLflow; the folder or "
        "bucket of a store stands for its runs"
    )


def _names_of(one: Found) -> set[str]:
    return {one.row.run_id, one.row.name, *([one.tracked.name] if one.tracked else [])} - {""}


def _line(row: RunRow) -> str:
    when = datetime.fromtimestamp(row.started or 0, tz=UTC).strftime("%Y-%m-%d %H:%M")
    return f"{row.run_id[:12]}  {when}  {row.data}  {row.size}  {row.differs}".rstrip()


def _in_store(address: str, tracking_uri: str) -> list[Found]:
    """Return the runs of a store, as MLflow knows them or, where it knows none, as receipts do; or the run of one step."""
    # torch comes with these
    from pipeline.graph.receipts import claims
    from pipeline.runs.comparing.history import History
    from pipeline.runs.comparing.rows import finished_row

    store = open_store(address.rstrip("/"))
    if claims(store):
        parent, _, directory = store.uri.rpartition("/")
        steps = History(open_store(parent)).run_of(directory)
        return [Found(finished_row(directory, steps), steps=steps)]
    if tracked := _tracked_in(store, tracking_uri):
        return tracked
    runs = History(store).runs()
    if not runs:
        raise DataError(
            f"{store.uri} holds no finished pretraining or report: give a run's store, or the directory of a step"
        )
    return [Found(finished_row(name, steps), steps=steps) for name, steps in runs.items()]


def _tracked_in(store: Store, tracking_uri: str) -> list[Found]:
    own = store.local_path("mlflow.db")
    candidates = [f"sqlite:///{own}" if own and own.exists() else "", tracking_uri]
    for uri in dict.fromkeys(candidates):
        file = sqlite_file(uri)
        if uri and (file is None or file.exists()):
            wanted = tracking.redact_text(store.uri).rstrip("/")
            here = [
                one
                for one in _all(uri)
                if one.tracked and one.tracked.tags.get(names.STORE_TAG, "").rstrip("/") == wanted
            ]
            if here:
                return here
    return []
