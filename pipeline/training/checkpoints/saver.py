"""Save checkpoints while training goes on: the loop waits for a copy of the state, and a thread writes, hashes and commits it.

All workers call `save`, `advance` (at every step boundary) and `finish` at the same points. Each worker has one thread, which
writes its part. Whether all parts are written, or one failed, is agreed at a later boundary without anyone waiting. Then
rank 0's thread writes the history and, last, the manifest. If a worker dies in between, no manifest is written and that
checkpoint does not exist. The next save waits for the previous one; `finish` waits for the commit.
Memory: one copy of the rank's float32 state, wherever `allocate` puts it.
Errors: what went wrong in a thread is raised on all workers at the next boundary. The storage layer has retried by then."""

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
from pipeline.training.checkpoints.format import (
    CheckpointFile,
    CheckpointManifest,
    checkpoint_folder,
    commit,
    write_history,
)
from pipeline.training.checkpoints.host_copy import Allocator, HostCopy, in_memory
from pipeline.training.checkpoints.retention import Pruner, Retention
from pipeline.training.engine.deepspeed_engine import Fragment
from pipeline.training.world import ELSEWHERE, Unanswered, World

LOSS_ROWS = 10
"""Logged rows whose mean loss ranks a checkpoint: a single batch is too noisy."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _PendingSave:
    """A save that is not committed yet."""

    folder: str
    manifest: CheckpointManifest
    history: Sequence[Mapping[str, float]]
    future: "Future[CheckpointFile | None]"
    """What this worker's thread does for it now: writing its part, then, on rank 0, committing."""
    committing: bool = False


class Saver:
    """Saves what `fragments` returns, in the attempt's generation."""

    def __init__(
        self,
        fragments: Callable[[], Iterable[Fragment]],
        world: World,
        attempt: Attempt,
        retention: Retention,
        allocate: Allocator = in_memory,
        on_commit: Callable[[str], None] = lambda key: None,
    ) -> None:
        self.fragments, self.world, self.generation = fragments, world, attempt.generation
        self.store, self.on_commit = attempt.store, on_commit
        self._pruner = Pruner(attempt.root, attempt.generation, retention)
        with world.fail_together():
            self._copy = HostCopy(fragments(), allocate)
        # One thread: the part must be written before the commit, and there is one copy to write from.
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: _PendingSave | None = None

    @property
    def busy(self) -> bool:
        """Whether a save is pending; the same on all workers, because they agree on it."""
        return self._pending is not None

    def save(self, manifest: CheckpointManifest, history: Sequence[Mapping[str, float]]) -> str:
        """Copy the state and start to write it; return the key that the checkpoint will have.

        The ids in `manifest` are this worker's part; they are summed over workers before the commit.
        """
        self.finish()  # there is one copy, and the previous save still reads from it
        self._copy.take(self.fragments())
        folder = checkpoint_folder(manifest.global_step)
        future: Future[CheckpointFile | None] = self._pool.submit(
            write_part, self.store, folder, self._copy, self.world
        )
        # The loop goes on appending rows while the thread runs: the tuple is the history as of now.
        self._pending = _PendingSave(folder, manifest, tuple(history), future)
        return f"{generation_key(self.generation)}/{folder}"

    def advance(self) -> None:
        """Take the pending save one stage further if all workers are ready for it. Collective, but waits for no thread."""
        if self._pending:
            self._agree(self._pending)

    def finish(self) -> None:
        """Wait until the pending save is committed. Collective."""
        while self._pending:
            wait([self._pending.future])
            self._agree(self._pending)

    def close(self) -> None:
        """Give up the threads without waiting: when a worker is lost, what they still do no longer matters."""
        self._pool.shutdown(wait=False)
        self._copy.close()

    def _agree(self, save: _PendingSave) -> None:
        """Start the next stage if every worker's thread is done; raise on all workers if one failed."""
        done = save.future.done()
        error = save.future.exception() if done else None
        ready, failed = self.world.total([done, error is not None])
        if failed:
            # Forgotten before raising: `saving` calls `finish` once more and must not wait for it again.
            self._pending = None
            raise error or PipelineError(ELSEWHERE)
        if ready == self.world.size:
            self._pending = None if save.committing else self._start_commit(save)

    def _start_commit(self, save: _PendingSave) -> _PendingSave:
        """Gather what the manifest needs once every part lies in the store; rank 0 commits. Collective."""
        # `result` does not wait: all ranks have agreed that their parts are written.
        own = (save.future.result(), save.manifest.ids_digest, save.manifest.ids_count)
        files, digests, counts = zip(*self.world.all_gather(own), strict=True)
        manifest = replace(save.manifest, files=files, ids_digest=sum(digests) % 2**64, ids_count=sum(counts))
        future: Future[CheckpointFile | None] = Future()
        if self.world.is_first:
            future = self._pool.submit(self._commit, save.folder, manifest, save.history)
        else:
            future.set_result(None)  # nothing to do here but agree when rank 0 has committed
        return replace(save, future=future, committing=True)

    def _commit(self, folder: str, manifest: CheckpointManifest, history: Sequence[Mapping[str, float]]) -> None:
        rows = write_history(self.store, folder, history)
        commit(self.store, folder, replace(manifest, files=(*manifest.files, rows), loss=mean_loss(history)))
        self.on_commit(f"{generation_key(self.generation)}/{folder}")
        self._pruner.prune()  # only now: the new checkpoint may replace an old one


@contextmanager
def saving(saver: Saver) -> Iterator[Saver]:
    """Use a saver while training goes on, and complete the pending save even if training ends in an error.

    That takes all workers, so it is done for the errors that all of them raise; after any other error the save is dropped.
    """
    try:
        yield saver
        saver.finish()
    except Unanswered:
        raise  # completing takes an agreement of all workers
    except (PipelineError, ConfigError):
        try:
            saver.finish()
        except PipelineError as error:
            log.warning("the last checkpoint was not completed: %s", error)
        raise
    finally:
        saver.close()


def write_part(store: Store, folder: str, copy: HostCopy, world: World) -> CheckpointFile:
    """Write one worker's file; return its name, size and hash for the manifest."""
    name = f"rank-{world.rank:04d}-of-{world.size:04d}.safetensors"
    store.write(f"{folder}/{name}", copy.file)
    # Hashed from memory, not read back: a file that was garbled on its way will not match.
    return CheckpointFile(name, copy.file.nbytes, hashlib.sha256(copy.file).hexdigest())


def mean_loss(history: Sequence[Mapping[str, float]]) -> float | None:
    """Return the mean loss of the last logged rows, or None if there are none or it is not finite."""
    losses = [row["loss"] for row in history[-LOSS_ROWS:]]
    mean = sum(losses) / len(losses) if losses else math.nan
    return mean if math.isfinite(mean) else None  # the manifest is JSON, which has no NaN
