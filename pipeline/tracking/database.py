"""MLflow's SQLite file: its address, and its creation, which happens once however many processes begin at the same time.

MLflow creates its tables in dozens of steps in the file itself. Two processes that do so at once break each other, and one that
is killed leaves a file that no later process can open. Here MLflow fills a database in memory instead; it is copied to a
temporary file, and a hard link or rename gives it its name. Readers see a whole database or none.

    mlflow.db                     appears whole
    .tmp-mlflow.db.lock           held while it is created or replaced; empty, and never listed as an object of the store
    .tmp-mlflow.db.<hex>          the copy under way; the next creation deletes what a killed one left

The link fails if the name exists, so a file system without locks costs time but no data. A file that an earlier version left
half made is replaced, but only under the lock, and only while it holds no run, experiment or model. Units: seconds.
Errors: WrongTrackingAddress for a path that cannot hold a database; TrackingError for one that is damaged or stays busy."""

import contextlib
import fcntl
import logging
import os
import sqlite3
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote

from pipeline.errors import TrackingError, WrongTrackingAddress
from pipeline.storage.store import TEMPORARY

log = logging.getLogger(__name__)

_WAIT_S = 120.0
_SAY_AFTER_S = 10.0
_QUIET_S = 5.0
"""A half-made file that nobody has changed for this long is abandoned: MLflow creates its dozens of tables within seconds."""
_PAUSE_S = 0.1
_BUSY_S = 2.0
_QUOTED = {"%": "%25", "?": "%3F", "#": "%23"}
_CONTENT = (
    "SELECT 1 FROM runs",
    "SELECT 1 FROM experiments WHERE experiment_id != 0",
    "SELECT 1 FROM registered_models",
)

State = Literal["missing", "whole", "half made", "busy"]


def sqlite_address(database: Path) -> str:
    """Return the address under which MLflow opens this file.

    SQLAlchemy decodes `%XX` in the path and cuts it at `?`, so these are quoted. MLflow itself does not decode: for an address
    that begins with `sqlite:///` it creates the folder of the quoted name as well. It leaves `sqlite+pysqlite:///` alone, which
    SQLAlchemy takes for the same."""
    path = str(database)
    quoted = "".join(_QUOTED.get(character, character) for character in path)
    return f"sqlite:///{path}" if quoted == path else f"sqlite+pysqlite:///{quoted}"


def sqlite_file(uri: str) -> Path | None:
    """Return the file behind a SQLite address, or None for any other address."""
    prefix, found, path = uri.partition(":///")
    return Path(unquote(path.partition("?")[0])) if found and prefix.partition("+")[0] == "sqlite" else None


def create_database(database: Path, *, artifacts: str) -> None:
    """Create the file if it is missing, and again if it was left half made; `artifacts` is where experiments keep files.

    Processes that call this at once wait for the first one, at most two minutes."""
    # without the lock first: nearly always the file is there
    if _state(database) == "whole":
        return
    with _locked(database) as holds_lock:
        deadline = time.monotonic() + _WAIT_S
        # asked again in every round: another process may have made it meanwhile
        while (state := _state(database)) != "whole":
            if state == "missing":
                with _whole_copy(database, artifacts) as copy:
                    _name_once(copy, database, holds_lock=holds_lock)
            elif state == "half made" and _abandoned(database):
                if not holds_lock:
                    raise TrackingError(
                        f"tracking database {database} was left half made and holds no runs. Its file system has no locks, "
                        "so it is not replaced here: delete it, and run the same command again"
                    )
                _replace(database, artifacts)
            elif time.monotonic() > deadline:
                raise TrackingError(
                    f"tracking database {database}: another process has kept it busy for {_WAIT_S:g} s. End that process, "
                    "and run the same command again"
                )
            else:
                time.sleep(_PAUSE_S)


def _state(database: Path) -> State:
    """Return what is there. MLflow adds the experiment `Default` after the last migration, so it marks a whole database.

    A database with content is never called half made, whatever else it lacks: MLflow says what is wrong with it."""
    if not database.exists():
        return "missing"
    try:
        with contextlib.closing(
            # rw: the default, rwc, would create the file that is only looked for
            sqlite3.connect(f"{database.as_uri()}?mode=rw", uri=True, timeout=_BUSY_S)
        ) as connection:
            found = any(_has_row(connection, query) for query in ("SELECT 1 FROM experiments", *_CONTENT))
    except sqlite3.OperationalError as cause:
        # deleted since the look above, which is no fault of the file
        if not database.exists():
            return "missing"
        if "locked" in str(cause) or "busy" in str(cause):
            return "busy"
        raise WrongTrackingAddress(
            f"tracking database {database} cannot be opened ({cause}). Choose another path, or give this user access"
        ) from cause
    # after its subclass OperationalError, which can also mean that the file is busy
    except sqlite3.DatabaseError as cause:
        raise WrongTrackingAddress(
            f"tracking database {database} is not a readable SQLite file ({cause}). Choose another path, or move it away: "
            "curves are sent again from the store"
        ) from cause
    return "whole" if found else "half made"


def _has_row(connection: sqlite3.Connection, query: str) -> bool:
    try:
        return connection.execute(f"{query} LIMIT 1").fetchone() is not None
    except sqlite3.OperationalError as error:
        if "no such table" in str(error) or "no such column" in str(error):
            return False
        raise


def _abandoned(database: Path) -> bool:
    """Return whether nobody is at work on a half-made file: an earlier version or `mlflow server` creates it in place, unlocked."""
    before = _last_change(database)
    time.sleep(_QUIET_S)
    return _last_change(database) == before


def _last_change(database: Path) -> list[tuple[int, int]]:
    found = []
    for path in (database, *_companions(database)):
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            found.append((status.st_mtime_ns, status.st_size))
    return found


def _companions(database: Path) -> list[Path]:
    return [database.with_name(database.name + suffix) for suffix in ("-journal", "-wal", "-shm")]


def _name_once(copy: Path, database: Path, *, holds_lock: bool) -> None:
    """Give the copy its name, unless another process was first."""
    try:
        database.hardlink_to(copy)  # unlike a rename, it fails if the name exists
    except FileExistsError:
        return
    except OSError as cause:  # a file system without hard links
        # a plain rename replaces what is there, so only whoever holds the lock may
        if not holds_lock:
            raise WrongTrackingAddress(
                f"tracking database {database}: its file system has neither locks nor hard links ({cause}). Choose another path"
            ) from cause
        copy.replace(database)


def _replace(database: Path, artifacts: str) -> None:
    log.warning("tracking database %s was left half made and holds no runs: creating it again", database)
    with _whole_copy(database, artifacts) as copy:
        for path in _companions(database):  # SQLite would apply a journal of the old file to the new one
            path.unlink(missing_ok=True)
        copy.replace(database)


@contextlib.contextmanager
def _whole_copy(database: Path, artifacts: str) -> Iterator[Path]:
    """Yield a new, complete database in a temporary file of the same folder."""
    copy = database.with_name(f"{TEMPORARY}{database.name}.{uuid.uuid4().hex}")
    try:
        with contextlib.closing(sqlite3.connect(copy)) as target:
            _fill(target, artifacts)
        yield copy
    finally:
        for path in (copy, *_companions(copy)):
            path.unlink(missing_ok=True)


def _fill(target: sqlite3.Connection, artifacts: str) -> None:
    """Write an empty MLflow database. In memory MLflow's migrations take a second; on a disk, each step waits for it."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    store: Any = SqlAlchemyStore("sqlite:///:memory:", artifacts)
    try:
        source = store.engine.raw_connection()
        try:
            # SQLite's own connection, below SQLAlchemy's wrapper: only that one has `backup`
            source.driver_connection.backup(target)
        finally:
            source.close()
    finally:
        store.engine.dispose()


@contextlib.contextmanager
def _locked(database: Path) -> Iterator[bool]:
    """Hold the database's lock file, and yield True; yield False on a file system without locks.

    The kernel releases the lock of a killed process. Polling, because a signal would not end a blocking flock in this thread
    without raising, and because NFS may hold one for ever."""
    try:
        # 0o666: other users of the folder must lock this file too; the umask has the last word
        descriptor = os.open(database.with_name(f"{TEMPORARY}{database.name}.lock"), os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as cause:
        raise WrongTrackingAddress(
            f"tracking database {database}: its folder is not writable ({cause}). Choose another path, or give this user access"
        ) from cause
    try:
        holds_lock = _acquire(descriptor, database)
        if holds_lock:
            _delete_leftovers(database)
        yield holds_lock
    finally:
        # only closed, never deleted: the next process would lock another file of the same name
        os.close(descriptor)


def _delete_leftovers(database: Path) -> None:
    """Delete what killed creations left. Only under the lock: no other creation is under way."""
    for path in database.parent.iterdir():
        if path.name.startswith(f"{TEMPORARY}{database.name}.") and path.suffix != ".lock":
            path.unlink(missing_ok=True)


def _acquire(descriptor: int, database: Path) -> bool:
    began, said = time.monotonic(), False
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waited = time.monotonic() - began
            if waited > _WAIT_S:
                raise TrackingError(
                    f"tracking database {database}: another process has been creating it for {_WAIT_S:g} s. End that process, "
                    "and run the same command again"
                ) from None
            if waited > _SAY_AFTER_S and not said:
                said = True
                log.warning("waiting for another process that is creating %s", database)
            time.sleep(_PAUSE_S)
        except OSError:  # a mount without locks, such as some NFS and Lustre
            return False
        else:
            return True
