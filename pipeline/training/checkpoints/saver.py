"""Saves beside training: at a save step the loop waits for a memory copy; writing, hashing and committing happen meanwhile.

All workers call `save`, `advance` (at every step boundary) and `finish` at the same points. A worker's one thread writes its
part; that it has, or failed, is agreed at a later boundary without anybody waiting, and then the first worker's thread writes
the history and, last, the manifest. A worker that died in between leaves no manifest: that checkpoint does not exist.
The next save waits for the one before; `finish` waits for the commit. It holds one copy of the rank's float32 state, in `room`.
Errors: what went wrong in a thread is raised at the next boundary, on all workers; the storage layer has tried again by then."""

import hashlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace

from pipeline.errors import ConfigError, PipelineError
from pipeline.graph.step import Attempt, generation_key
from pipeline.storage import Store
from pipeline.training.checkpoints.format import CheckpointFile, CheckpointManifest, commit, folder_of, write_history
from pipeline.training.checkpoints.host_copy import HostCopy, Room, in_memory
from pipeline.training.checkpoints.retention import Pruner, Retention
from pipeline.training.engine.deepspeed_engine import Fragment
from pipeline.training.world import ELSEWHERE, World

LOSS_ROWS = 10
"""Logged rows whose mean loss a checkpoint is compared by: one batch alone is noise."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _PendingSave:
    """A save that is not committed yet; `work`: what this worker's thread does for it."""

    folder: str
    manifest: CheckpointManifest
    history: Sequence[Mapping[str, float]]
    work: "Future[CheckpointFile | None]"
    committing: bool = False


class Saver:
    """Saves what `fragments` gives, in the generation that is at work."""

    def __init__(
        self,
        fragments: Callable[[], Iterable[Fragment]],
        world: World,
        attempt: Attempt,
        retention: Retention,
        room: Room = in_memory,
    ) -> None:
        self.fragments, self.world, self.generation = fragments, world, attempt.generation
        self.store = attempt.store
        self._pruner = Pruner(attempt.root, attempt.generation, retention)
        with world.together():
            self._copy = HostCopy(fragments(), room)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._under_way: _PendingSave | None = None

    @property
    def busy(self) -> bool:
        """Whether a save is under way, as all workers know it."""
        return self._under_way is not None

    def save(self, manifest: CheckpointManifest, history: Sequence[Mapping[str, float]]) -> str:
        """Copies the state and begins to write it; returns the key that it will have. In `manifest`, ids are this worker's part."""
        self.finish()
        self._copy.take(self.fragments())
        folder = folder_of(manifest.global_step)
        work: Future[CheckpointFile | None] = self._pool.submit(write_part, self.store, folder, self._copy, self.world)
        self._under_way = _PendingSave(folder, manifest, tuple(history), work)
        return f"{generation_key(self.generation)}/{folder}"

    def advance(self) -> None:
        """Takes the save under way further, if all workers are so far; waits for nothing."""
        if self._under_way:
            self._agree(self._under_way)

    def finish(self) -> None:
        """Waits until the save under way is committed."""
        while self._under_way:
            wait([self._under_way.work])
            self._agree(self._under_way)

    def close(self) -> None:
        """Gives the threads up."""
        self._pool.shutdown(wait=False)
        self._copy.close()

    def _agree(self, save: _PendingSave) -> None:
        """What all threads are done with is taken further; what one failed at is raised on all."""
        done = save.work.done()
        error = save.work.exception() if done else None
        ready, failed = self.world.total([done, error is not None])
        if failed:
            self._under_way = None
            raise error or PipelineError(ELSEWHERE)
        if ready == self.world.size:
            self._under_way = None if save.committing else self._gathered(save)

    def _gathered(self, save: _PendingSave) -> _PendingSave:
        """Every part lies in the store: the first worker commits."""
        mine = (save.work.result(), save.manifest.ids_digest, save.manifest.ids_count)
        files, digests, counts = zip(*self.world.all_of(mine), strict=True)
        manifest = replace(save.manifest, files=files, ids_digest=sum(digests) % 2**64, ids_count=sum(counts))
        work: Future[CheckpointFile | None] = Future()
        if self.world.is_first:
            work = self._pool.submit(self._commit, save.folder, manifest, save.history)
        else:
            work.set_result(None)
        return replace(save, work=work, committing=True)

    def _commit(self, folder: str, manifest: CheckpointManifest, history: Sequence[Mapping[str, float]]) -> None:
        rows = write_history(self.store, folder, history)
        commit(self.store, folder, replace(manifest, files=(*manifest.files, rows), loss=mean_loss(history)))
        self._pruner.prune()


@contextmanager
def saving(saver: Saver) -> Iterator[Saver]:
    """While training goes on. When it ends in an error that all workers raise, what was being saved is still committed."""
    try:
        yield saver
        saver.finish()
    except (PipelineError, ConfigError):
        try:
            saver.finish()
        except PipelineError as error:
            log.warning("the last checkpoint was not completed: %s", error)
        raise
    finally:
        saver.close()


def write_part(store: Store, folder: str, copy: HostCopy, world: World) -> CheckpointFile:
    """One worker's file; its name, size and hash for the manifest."""
    name = f"rank-{world.rank:04d}-of-{world.size:04d}.safetensors"
    store.write(f"{folder}/{name}", copy.file)
    return CheckpointFile(name, copy.file.nbytes, hashlib.sha256(copy.file).hexdigest())


def mean_loss(history: Sequence[Mapping[str, float]]) -> float | None:
    """Of the last logged rows; None: there are none yet."""
    losses = [row["loss"] for row in history[-LOSS_ROWS:]]
    mean = sum(losses) / len(losses) if losses else math.nan
    return mean if math.isfinite(mean) else None
