"""Where and how a run works: workers, devices, micro-batches, checkpoints, time limits.

One type from the YAML file to the worker. Nothing in it changes a result beyond rounding, so it is never part of a fingerprint.
Units are in the field names. Errors: ValueError, which `pipeline.config.reading` turns into one line per field."""

import logging
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

Offload = Literal["none", "optimizer"]
"""What lives on the CPU beside a GPU: nothing, or AdamW's state and its update."""
ZeroStage = Literal[1, 2, 3]
Compile = Literal["auto", "on", "off"]
CheckpointCopy = Literal["memory", "disk"]
KeepBestBy = Literal["loss", "held_out_loss", "knn", "ridge", "probe", "rankme"]
ProfileSteps = tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1, le=20)]]
MOST_DECODE_WORKERS = 32
"""What `auto` stops at: twice what an H200 needs for ViT-L, so more would only take memory."""
_FEW_CORES = 2
WORKERS_HINT = "write a number from 1, or [min, max]"

log = logging.getLogger(__name__)


class Resources(BaseModel):
    """Where and how a run works. Changing a field never makes a finished step run again."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    workers: int | tuple[int, int] = 1
    """Training workers, or [min, max] for an elastic range."""
    evaluation_workers: int | tuple[int, int] | None = None
    """The same for each evaluation step that trains. If left out: `workers` on GPUs, 1 on CPUs. A single worker starts within
    seconds, and as many such steps as fit run side by side (`parallel_steps`)."""
    cpus_per_worker: float = Field(1.0, gt=0)
    """CPUs that Ray reserves for each worker."""
    use_gpu: Literal["auto"] | bool = "auto"
    """Whether each worker trains on a GPU of its own. `auto`: if this machine or the cluster has enough of them, or its autoscaler
    adds them within `node_wait_s`; else on the CPU. `true` waits for them too, but never trains on the CPU."""
    zero_stage: ZeroStage = 1
    """What DeepSpeed spreads over the workers: optimiser state (1), also gradients (2), also weights (3)."""
    micro_batch: int = Field(64, ge=1)
    """Maximum number of samples in one forward pass of a worker. The number of accumulated passes follows from global_batch."""
    overlap_comm: bool = False
    """Reduce gradients over the workers while the backward pass goes on. Of use with several GPUs; takes a second buffer for them,
    and more work on the host."""
    offload: Offload = "none"
    """`optimizer` keeps AdamW's state on the CPU and updates it there, which frees 12 bytes per weight, spread over the GPUs. No
    effect on CPU workers."""
    activation_checkpointing: bool = False
    """Keep only each block's input and recompute the rest in the backward pass: a third more work, far less memory."""
    compile: Compile = "auto"
    """Whether torch.compile fuses the operations of each Transformer block in training. `auto`: on GPUs, if the node has Triton
    and a C compiler. `on` compiles on a CPU too, and fails where that is impossible."""
    checkpoint_every_steps: int = Field(500, ge=1)
    """Updates of the weights between checkpoints."""
    keep_checkpoints: int = Field(2, ge=1)
    """How many of the newest checkpoints to keep. Those named by a receipt, a later generation or a fork are kept as well."""
    keep_every_steps: int | None = Field(None, ge=1)
    """Also keep each checkpoint whose step is a multiple of this. If left out: none."""
    keep_best: int = Field(1, ge=0)
    """Also keep this many of the best checkpoints, by keep_best_by."""
    keep_best_by: KeepBestBy = "loss"
    """What makes a checkpoint one of the best: the lowest training `loss`, or a score of evaluation.milestone_images: the lowest
    `held_out_loss`, or the highest `knn`, `ridge`, `probe` or `rankme`. A checkpoint that was not scored is not among them."""
    checkpoint_copy: CheckpointCopy = "memory"
    """Where a worker's state is copied to before it is written; training waits for the copy. `memory` takes 12 bytes per weight,
    spread over the workers. `disk`, a file in cache_directory, takes no memory but is as slow as the disk."""
    log_every_steps: int = Field(20, ge=1)
    """Updates of the weights between two points of the curves."""
    profile_steps: ProfileSteps | None = None
    """[first, count] of the training steps, counted from 1, that torch's profiler records on rank 0, at most 20. A trace and a
    table are written to `profile/`, in the store and in MLflow."""
    decode_workers: int | Literal["auto"] = "auto"
    """Processes per worker that decode images; Ray reserves a CPU for each. 0: a thread of the worker decodes. auto: on GPU nodes
    the cores left over for each worker, up to 32; elsewhere 0, and so with --in-process, where a debugger gets in."""
    cache_directory: str = "~/.cache/mae-pipeline/shards"
    """Node-local cache for the shards of a remote store."""
    cache_max_bytes: int = Field(50 * 2**30, ge=2**20)
    """Size of that cache above which the shards used longest ago are deleted."""
    parallel_steps: int | Literal["auto"] = "auto"
    """How many steps of the graph may run at the same time. auto: as many evaluation steps as the cluster has CPUs, GPUs and memory
    for, 16 at most, and in a sweep as many pretrainings; every other step alone."""
    max_failures: int = Field(3, ge=0)
    """Consecutive worker failures, without a new checkpoint in between, from which training recovers by itself."""
    max_preemptions: int = Field(100, ge=0)
    """The same for workers whose nodes were taken away."""
    node_wait_s: float = Field(1800.0, ge=0)
    """How long training waits, after nodes were taken away, until the minimum number of workers fits again, and for GPU nodes that
    an autoscaler starts. Then the run stops with exit code 3."""
    wall_clock_s: float | None = Field(None, gt=0)
    """Time limit of the run. It is asked to stop `grace_s` before that. If left out: no limit."""
    grace_s: float = Field(120.0, ge=0)
    """Time for the last checkpoint before wall_clock_s."""
    collective_timeout_s: int = Field(1800, ge=10)
    """How long workers wait for one another before the operation fails: longer than the slowest takes to fetch a checkpoint or to
    compile. A worker that dies is noticed at once, and one that hangs in a step by `watchdog_s`."""
    watchdog_s: float = Field(300, gt=0)
    """If a phase of a training step takes longer, every worker writes its stacks to the store. After twice that time, workers that
    Ray Train can restart end themselves."""

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and "decode_threads" in given:
            rest = {name: value for name, value in given.items() if name != "decode_threads"}
            log.warning(
                "resources.decode_threads is now decode_workers, which counts processes; write auto, 0 or a number"
            )
            # A single thread, the default, was seldom somebody's choice.
            return ({} if given["decode_threads"] == 1 else {"decode_workers": given["decode_threads"]}) | rest
        return given

    @field_validator("decode_workers", mode="before")
    @classmethod
    def _decode_workers(cls, value: Any) -> Any:
        if value != "auto" and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            raise ValueError(f"decode_workers={value!r}: write auto, or a number from 0")
        return value

    @field_validator("use_gpu", mode="before")
    @classmethod
    def _use_gpu(cls, value: Any) -> Any:
        if value is None:  # how `auto` was written before it had a name
            return "auto"
        if value != "auto" and not isinstance(value, bool):
            raise ValueError(f"use_gpu={value!r}: write auto, true or false")
        return value

    @field_validator("parallel_steps", mode="before")
    @classmethod
    def _parallel_steps(cls, value: Any) -> Any:
        if value != "auto" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"parallel_steps={value!r}: write auto, or a number from 1")
        return value

    @field_validator("workers", "evaluation_workers")
    @classmethod
    def _workers(cls, value: int | tuple[int, int] | None, info: ValidationInfo) -> int | tuple[int, int] | None:
        low, high = (value, value) if isinstance(value, int) else value or (1, 1)
        if not 1 <= low <= high:
            raise ValueError(f"{info.field_name}={value}: {WORKERS_HINT}")
        return value

    @field_validator("compile", mode="before")
    @classmethod
    def _compile(cls, value: object) -> object:
        # YAML reads a bare `on` or `off` as a boolean.
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _time_to_save(self) -> "Resources":
        if self.wall_clock_s is not None and self.wall_clock_s <= self.grace_s:
            raise ValueError(
                f"wall_clock_s={self.wall_clock_s:g} leaves no time to train: write more than grace_s={self.grace_s:g}"
            )
        return self

    @property
    def worker_range(self) -> tuple[int, int]:
        """(minimum, maximum) number of training workers. Plans count with the minimum, at which each worker holds the most."""
        return (self.workers, self.workers) if isinstance(self.workers, int) else self.workers

    @property
    def one_worker(self) -> bool:
        """Whether training needs no worker group: one worker, which may run in any process. [1, 1] is a group of one."""
        return self.workers == 1

    def for_evaluation(self, *, on_gpus: bool) -> "Resources":
        """Return the resources of an evaluation step, with its own number of workers."""
        return self.model_copy(update={"workers": self.evaluation_workers or (self.workers if on_gpus else 1)})

    @property
    def decode_processes(self) -> int:
        """Decode processes of a worker; none while `auto` is not decided."""
        return self.decode_workers if isinstance(self.decode_workers, int) else 0

    def decided_for(self, cpus_per_gpu: float) -> "Resources":
        """Return the resources with `auto` decode workers decided, for a node with this many CPUs for each training worker.

        A worker with two cores or fewer decodes in a thread. `cpus_per_gpu`: 0 for training without GPUs.
        """
        if self.decode_workers != "auto":
            return self
        left = int(cpus_per_gpu - self.cpus_per_worker) if cpus_per_gpu > _FEW_CORES else 0
        return self.model_copy(update={"decode_workers": max(0, min(left, MOST_DECODE_WORKERS))})

    @property
    def per_worker(self) -> dict[str, float]:
        """What one worker reserves on its node, in Ray's terms. While `auto` is not decided: no GPU, no decode workers."""
        return {"CPU": self.cpus_per_worker + self.decode_processes, **({"GPU": 1.0} if self.use_gpu is True else {})}
