"""Plain functions as Ray tasks, or one after the other in this process.

`map_tasks` does the work, with one CPU per task unless told otherwise. `submit` starts what coordinates such work; it reserves no
CPU, so that two training workers still fit on two cores. `call_reserved` is one such piece of work, with the CPUs and GPUs that it
asks for.
Errors: a task's own error comes out as itself, without Ray's wrapping; PipelineError if a submitted function's process dies."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, TypeVar, cast

from pipeline.cluster.connection import on_this_node, worker_capacity
from pipeline.errors import PipelineError

T = TypeVar("T")
R = TypeVar("R")
Executor = Literal["ray", "in_process"]
"""`ray`: stages, tasks and workers run on Ray. `in_process`: everything in this process, one worker, so that a debugger works."""
ONE_CPU: Mapping[str, float] = MappingProxyType({"CPU": 1.0})
IN_FLIGHT = 64
"""Tasks handed to Ray at a time: enough to keep a cluster busy, few enough to be cancelled quickly after an error."""


def _remote(function: Callable[..., R], need: Mapping[str, float], *, retries: int, **options: Any) -> Any:
    """Return a plain function as a Ray task that reserves `need`, in Ray's terms (CPU, GPU)."""
    import ray

    return ray.remote(num_cpus=need.get("CPU", 0), num_gpus=need.get("GPU", 0), max_retries=retries, **options)(
        function
    )


def original_error(error: BaseException) -> BaseException:
    """Return the error that a task raised, without Ray's wrapping."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, BaseException) else error


def map_tasks(
    function: Callable[[T], R],
    items: Sequence[T],
    *,
    executor: Executor,
    need: Mapping[str, float] = ONE_CPU,
    on_done: Callable[[int, R], None] | None = None,
) -> list[R]:
    """Call `function` on every item and return the results in the order of the items.

    `on_done(index, result)` is called in the caller's process as each task ends. The function must be safe to run twice, because
    Ray repeats a task whose node dies. The first error cancels the rest and is raised as the function raised it. `need` is what a
    task reserves, in Ray's terms (CPU, GPU); a process with a GPU ends with its task."""
    results: dict[int, R] = {}
    for index, result in _completed(function, items, executor, need):
        results[index] = result
        if on_done is not None:
            on_done(index, result)
    return [results[index] for index in range(len(items))]


def _completed(
    function: Callable[[T], R], items: Sequence[T], executor: Executor, need: Mapping[str, float]
) -> Iterator[tuple[int, R]]:
    if executor == "in_process":
        for index, item in enumerate(items):
            yield index, function(item)
        return
    import ray

    def call(item: T) -> R:  # ray.remote takes functions only, not partials
        return function(item)

    task = _remote(call, need, retries=3)
    waiting = iter(enumerate(items))
    running: dict[Any, int] = {}
    try:
        while True:
            while len(running) < IN_FLIGHT and (following := next(waiting, None)) is not None:
                running[task.remote(following[1])] = following[0]
            if not running:
                return
            # one is enough to submit the next, so no CPU waits for the slowest of a group
            done, _ = ray.wait(list(running), num_returns=1)
            for reference in done:
                try:
                    yield running[reference], ray.get(reference)
                except ray.exceptions.RayTaskError as error:
                    # from None: Ray's own error would print the same traceback again
                    raise original_error(error) from None
                del running[reference]
    finally:
        for reference in running:
            # not by force: a task that is interrupted still deletes its scratch files
            ray.cancel(reference, force=False)


def call_reserved(
    function: Callable[..., R], *arguments: Any, need: Mapping[str, float], own_process: bool = False
) -> R:
    """Call a function in a process that reserves `need`, on any node with room, and return its result.

    `need` is in Ray's terms (CPU, GPU). Ray does not repeat the call. The process serves later tasks too, so that it imports torch
    once; one with a GPU, or with `own_process`, ends after the call. Raises one of Ray's errors if the process is lost."""
    import ray

    # with a GPU, once is Ray's own default: the memory would stay taken
    once = {"max_calls": 1} if own_process else {}
    task = _remote(function, need, retries=0, **once)
    try:
        return cast("R", ray.get(task.remote(*arguments)))
    except ray.exceptions.RayTaskError as error:
        raise original_error(error) from None


@dataclass
class Handle:
    """A submitted function: poll `ready`, then take `result` once."""

    reference: Any

    def ready(self, *, timeout_s: float) -> bool:
        """Return whether it has ended, waiting for up to `timeout_s`."""
        import ray

        done, _ = ray.wait([self.reference], timeout=timeout_s)
        return bool(done)

    def result(self) -> Any:
        """Return what the function returned, or raise what it raised."""
        import ray

        try:
            return ray.get(self.reference)
        except ray.exceptions.RayTaskError as error:
            raise original_error(error) from None
        except ray.exceptions.RayError as error:  # killed, out of memory or its node lost; Ray's texts have many lines
            what = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise PipelineError(
                f"the process that coordinated the step died ({type(error).__name__}: {what}). Run the same command again"
            ) from None

    def cancel(self) -> None:
        """Kill the process that runs it."""
        import ray

        ray.cancel(self.reference, force=True)


def start_if_free(function: Callable[..., Any], *arguments: Any, need: Mapping[str, float]) -> Handle | None:
    """Start a function on a node where what it needs (CPU, GPU) is free; return None if there is none. Ray does not repeat it."""
    if worker_capacity(need, of="free") < 1:
        return None

    def call(*given: Any) -> Any:  # ray.remote takes functions only
        return function(*given)

    return Handle(_remote(call, need, retries=0).remote(*arguments))


def wait_for_any(handles: Sequence[Handle], *, timeout_s: float) -> None:
    """Wait until one of the functions has ended, for up to `timeout_s`. Without any, return at once."""
    if handles:
        import ray

        ray.wait([handle.reference for handle in handles], timeout=timeout_s)


def submit(function: Callable[..., Any], *arguments: Any) -> Handle:
    """Start a coordinating function. It reserves no CPU and runs on the driver's node, so that it lives and dies with the driver.

    Ray does not repeat it: a second run must first claim a generation, which only the driver does."""
    task = _remote(function, {}, retries=0, scheduling_strategy=on_this_node())
    return Handle(task.remote(*arguments))
