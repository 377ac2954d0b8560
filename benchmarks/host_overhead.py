"""What a training step costs besides the model: kernels that the engine adds, the loop's own time, and the feed's hold on Python.

    python -m benchmarks.host_overhead            # bf16 and fp32, ZeRO 1 and 3
    python -m benchmarks.host_overhead --quick    # fewer steps

These hold on a CPU and foretell a GPU, which idles while the host launches small kernels, works between two steps, or waits
for the interpreter.

Launches: operations in a step of the engine that are no views and no mere allocations, less those of a plain step (forward,
backward, fused AdamW) of the same model on the same batch. Counted by a TorchDispatchMode; a `_foreach` call counts once.
Loop: CPU time of the loop's thread per step, around a model that does nothing, with real batches of a real loader.
Feed: how much longer a loop in pure Python takes than its own CPU time while this process reads from a loader at full speed.
The difference is time in which it waits for the interpreter or for a core.
Copies: bytes of pictures written between decoding and the micro-batch, over the bytes of the pictures.

Units:  launches per step; milliseconds of CPU time; a slowdown of 0.03 is 3 % longer. Medians over steps or rounds.
Errors: SystemExit for a folder without usable JPEGs."""

import argparse
import json
import re
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import _data
from benchmarks import _timing as timing
from mae_core import SIZES, MAEConfig, ViTConfig
from mae_core.optimisation.parameter_groups import parameter_groups
from pipeline.cluster.device import local_gpu_count
from pipeline.cluster.resources import Resources
from pipeline.data.dataset.address import dataset_address
from pipeline.data.feed.loader import Batch
from pipeline.data.feed.order import OrderConfig
from pipeline.graph.receipts import claim
from pipeline.graph.step import Attempt
from pipeline.tracking import NullTracker
from pipeline.training.engine.deepspeed_engine import Engine
from pipeline.training.engine.micro_batches import split
from pipeline.training.engine.settings import EngineSettings
from pipeline.training.health.stop_reasons import StopReason
from pipeline.training.loop.loop import train
from pipeline.training.spec.recipe import Recipe
from pipeline.training.spec.tasks import Built, MAETask
from pipeline.training.spec.train_spec import TrainSpec
from pipeline.training.world import World, enter_world

LAUNCHES_PER_PARAMETER, LAUNCHES_BESIDES = 2, 60
"""Most launches that a step may add."""
_BATCH = 512
_CASES: tuple[tuple[Literal["bf16", "fp32"], Literal[1, 3]], ...] = (("bf16", 1), ("fp32", 1), ("bf16", 3), ("fp32", 3))
_VIEWS = frozenset(
    re.findall(
        r"\w+",
        """_reshape_alias _unsafe_view alias as_strided chunk detach expand lift_fresh narrow permute reshape select slice split
        split_with_sizes squeeze t transpose unbind unfold unsqueeze view""",
    )
)
_ALLOCATIONS = frozenset({"empty", "empty_like", "empty_strided", "new_empty"})


def is_launch(operation: Any) -> bool:
    """Return whether an operation, as a TorchDispatchMode gets it, is neither a view nor a mere allocation."""
    return operation._schema.name.partition("::")[2] not in _VIEWS | _ALLOCATIONS


class _Launches(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations that launch a kernel."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += is_launch(func)
        return func(*args, **(kwargs or {}))


class _Copies(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the bytes that this thread copies."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._schema.name in {"aten::copy_", "aten::clone", "aten::_to_copy"}:
            self.bytes += result.nbytes
        return result


class Launches(NamedTuple):
    """What a step adds, and to how many parameters."""

    added: int
    parameters: int

    @property
    def allowed(self) -> int:
        """Return the most that it may add."""
        return LAUNCHES_PER_PARAMETER * self.parameters + LAUNCHES_BESIDES


def launches(precision: Literal["bf16", "fp32"], zero_stage: Literal[1, 3]) -> Launches:
    """Count a step of the engine and a plain one. Runs in a process of its own: an engine changes its module for good."""
    model = MAEConfig(
        encoder=ViTConfig(image_size=(32, 32), patch_size=8, embed_dim=32, depth=6, num_heads=2),
        decoder_embed_dim=32,
        decoder_depth=2,
        decoder_num_heads=2,
    )
    task = MAETask(model=model, weight_decay=0.05, seed=0)
    images = torch.randint(0, 256, (4, *model.encoder.image_size, 3), dtype=torch.uint8)
    inputs = images, torch.rand(4, model.encoder.num_patches)

    module = task.build().module.to(torch.bfloat16 if precision == "bf16" else torch.float32)
    optimizer = timing.adamw(module.parameters())

    def plain() -> None:
        module(*inputs).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    settings = EngineSettings(
        precision=precision, zero_stage=zero_stage, micro_batch=4, accumulation=1, betas=(0.9, 0.95)
    )
    with closing(Engine(*task.build(), settings, enter_world(use_gpu=local_gpu_count() > 0))) as engine:

        def step() -> None:
            engine.train_step(split(inputs, settings, engine.world.device), global_batch=4, lr=0.0)

        counts = []
        for action in (step, plain):
            for _ in range(3):  # the first ones also create state, and ZeRO-3 records in which order it gathers
                action()
            with _Launches() as counted:
                action()
            counts.append(counted.count)
    return Launches(counts[0] - counts[1], sum(1 for _ in module.parameters()))


class _Nothing(nn.Module):
    """One weight, which is also the loss of every sample."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        return self.weight.float().expand(len(images))


@dataclass(frozen=True, kw_only=True)
class _NothingTask(MAETask):
    """The inputs of masked autoencoding, for a module that does nothing with them."""

    def build(self) -> Built:
        module = _Nothing()
        return Built(module, parameter_groups(module, weight_decay=0.0))


class _Clock:
    """Notes the CPU time of the loop's thread at every step, where the loop asks whether to stop."""

    def __init__(self, steps: int) -> None:
        self.steps, self.times = steps, list[float]()

    def stop_reason(self) -> StopReason:
        """Return "asked" after the last step."""
        self.times.append(time.thread_time())
        return "asked" if len(self.times) > self.steps else ""


def loop_milliseconds(spec: TrainSpec, attempt: Attempt, steps: int) -> float:
    """Return the CPU time that the loop's thread needs per step. Runs in a process of its own."""
    clock = _Clock(steps)
    train(spec, attempt, world=enter_world(use_gpu=local_gpu_count() > 0), tracker=NullTracker(), stop_signal=clock)
    passed = [after - before for before, after in zip(clock.times, clock.times[1:], strict=False)]
    return 1000 * median(passed[2:])  # the first steps also create state


def slowdown(spec: TrainSpec, rounds: int) -> float:
    """Return how much longer a loop in pure Python takes beside a loader at full speed. Runs in a process of its own."""
    alone = World(0, 1, torch.device("cpu"), None)
    loader = spec.loader(spec.dataset.open(), "train", alone)
    ended = threading.Event()
    with closing(loader.from_step(0, 10**6)) as batches:
        next(batches)
        consumer = threading.Thread(target=_drain, args=(batches, ended))
        consumer.start()
        ratios = [_count_up() for _ in range(rounds)]
        ended.set()
        consumer.join()
    return median(ratios)


def copies_per_picture(spec: TrainSpec) -> float:
    """Return how often a picture's bytes are written from its decoding in a worker to its micro-batch."""
    alone = World(0, 1, torch.device("cpu"), None)
    loader = spec.loader(spec.dataset.open(), "train", alone)
    settings = EngineSettings(
        precision="fp32", zero_stage=1, micro_batch=_BATCH // 4, accumulation=4, betas=(0.9, 0.95)
    )
    copied = _Copies()
    with closing(loader.from_step(0, 1)) as batches, copied:
        batch = next(batches)
        split(spec.task.inputs(batch), settings, alone.device)
    return 1 + copied.bytes / batch.images.nbytes  # 1: the worker's own write into the batch


def _drain(batches: Iterator[Batch], ended: threading.Event) -> None:
    while not ended.is_set():
        next(batches)


def _count_up() -> float:
    """Count for a fifth of a second; return how much longer that took than the CPU time of this thread."""
    began, cpu, count = time.perf_counter(), time.thread_time(), 0
    while count < 10_000_000:
        count += 1
    return (time.perf_counter() - began) / (time.thread_time() - cpu) - 1


def measure(options: argparse.Namespace) -> dict[str, object]:
    """Measure, print the table and return the JSON line."""
    counted = {f"{precision}, ZeRO-{stage}": _alone(launches, precision, stage) for precision, stage in _CASES}
    steps, rounds = (6, 9) if options.quick else (20, 31)
    found = _data.chosen_photos(options, count=64)
    with TemporaryDirectory(prefix="mae-benchmark-") as name:
        root = Path(name)
        source = _data.write_files(found.files, root / "images", copies=16)  # an epoch of two batches
        dataset = dataset_address(_data.dataset(source, root, shards=1))
        model = MAEConfig(encoder=SIZES["base"]())
        spec = TrainSpec(
            task=_NothingTask(model=model, weight_decay=0.0, seed=0),
            recipe=Recipe(global_batch=_BATCH, epochs=10_000, precision="fp32"),
            order=OrderConfig(seed=0),
            image_size=model.encoder.image_size,
            dataset=dataset,
            train_samples="all",
            evaluation_split="",
            resources=Resources(micro_batch=_BATCH, log_every_steps=10_000, checkpoint_every_steps=10_000),
        )
        attempt = _data.attempt(root / "pretrain")
        claim(attempt.root, continues="")
        loop_ms = _alone(loop_milliseconds, spec, attempt, steps)
        # one process, so that even two cores have one for each
        processes = spec.resources.model_copy(update={"decode_workers": 1})
        slower = _alone(slowdown, replace(spec, resources=processes), rounds)
        slower_by_threads = _alone(slowdown, spec, rounds)
        copies = _alone(copies_per_picture, replace(spec, resources=processes))
    rows = [
        (case, str(one.added), str(one.allowed), f"{one.added / one.parameters:.2f}") for case, one in counted.items()
    ]
    print(timing.table(("launches that a step adds", "", "allowed", "per parameter"), rows))
    print(f"the loop's thread: {loop_ms:.1f} ms of CPU time per step of {_BATCH} images")
    print(
        f"pure Python beside a decode worker: {100 * slower:+.0f} %, beside a decode thread: {100 * slower_by_threads:+.0f} %"
    )
    print(f"a picture's bytes are copied {copies:.2f} times from its decoding to its micro-batch")
    return {
        "benchmark": "host_overhead",
        "launches": {case: one.added for case, one in counted.items()},
        "launches_allowed": {case: one.allowed for case, one in counted.items()},
        "loop_ms": round(loop_ms, 2),
        "feed_slowdown": round(slower, 3),
        "feed_slowdown_by_threads": round(slower_by_threads, 3),
        "copies_per_picture": round(copies, 3),
    }


def _alone(function: Any, *arguments: Any) -> Any:
    """Call a function in a new process."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for."""
    parser = _data.parser("host_overhead", "What a training step costs besides the model.")
    print(json.dumps(measure(parser.parse_args(arguments))))


if __name__ == "__main__":
    main()
