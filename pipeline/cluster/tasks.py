"""The one importer of ray outside training/on_ray.py: connect, run plain functions as tasks, progress, jobs.

Coordinating code reserves 0 CPUs, so that two training workers fit on two cores. In executor `in_process` nothing of
Ray is imported.
Errors: PipelineError when a cluster cannot be reached; a task's own PipelineError comes out as itself."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from pipeline.cluster.connection import beside_us
from pipeline.errors import PipelineError

T = TypeVar("T")
R = TypeVar("R")
Executor = Literal["ray", "in_process"]
"""`ray`: stages, tasks and workers are Ray's. `in_process`: everything in this process, one worker, a debugger works."""
IN_FLIGHT = 64
"""Tasks handed to Ray at once."""


def own_error(error: BaseException) -> BaseException:
    """The error a task raised, without Ray's wrapping."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, BaseException) else error


def map_tasks(
    function: Callable[[T], R],
    items: Sequence[T],
    *,
    executor: Executor,
    on_done: Callable[[int, R], None] | None = None,
) -> list[R]:
    """Calls `function` on every item, as Ray tasks of one CPU or one after the other here; results in the order of the items.

    `on_done(index, result)` is called in the caller's process as each one ends. A function must bear being run twice: Ray runs
    it again when a node dies. The first error ends the call and is raised as the function raised it."""
    results: dict[int, R] = {}
    for index, result in _completed(function, items, executor):
        results[index] = result
        if on_done is not None:
            on_done(index, result)
    return [results[index] for index in range(len(items))]


def _completed(function: Callable[[T], R], items: Sequence[T], executor: Executor) -> Iterator[tuple[int, R]]:
    if executor == "in_process":
        for index, item in enumerate(items):
            yield index, function(item)
        return
    import ray

    def call(item: T) -> R:  # ray.remote takes functions only, not partials
        return function(item)

    task = ray.remote(num_cpus=1, max_retries=3)(call)
    waiting = iter(enumerate(items))
    running: dict[Any, int] = {}
    try:
        while True:
            while len(running) < IN_FLIGHT and (following := next(waiting, None)) is not None:
                running[task.remote(following[1])] = following[0]
            if not running:
                return
            done, _ = ray.wait(list(running), num_returns=1)
            for reference in done:
                try:
                    yield running[reference], ray.get(reference)
                except ray.exceptions.RayTaskError as error:
                    raise own_error(error) from None
                del running[reference]
    finally:
        for reference in running:
            ray.cancel(reference, force=False)


@dataclass
class Handle:
    """A function under way: ask `ready` now and then, take `result` once."""

    reference: Any

    def ready(self, *, timeout_s: float) -> bool:
        """Whether it has ended, waiting up to `timeout_s`."""
        import ray

        done, _ = ray.wait([self.reference], timeout=timeout_s)
        return bool(done)

    def result(self) -> Any:
        """What it returned; raises what it raised."""
        import ray

        try:
            return ray.get(self.reference)
        except ray.exceptions.RayTaskError as error:
            raise own_error(error) from None
        except ray.exceptions.RayError as error:  # killed, out of memory, its node lost: one line of what Ray says
            what = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise PipelineError(
                f"the process that coordinated the step died ({type(error).__name__}: {what}). Run the same command again"
            ) from None

    def cancel(self) -> None:
        """Cuts it off."""
        import ray

        ray.cancel(self.reference, force=True)


def submit(function: Callable[..., Any], *arguments: Any) -> Handle:
    """Starts a coordinating function on the driver's node, whose fate it shares; it reserves no CPU and is not run again by Ray."""
    import ray

    task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=beside_us())(function)
    return Handle(task.remote(*arguments))
