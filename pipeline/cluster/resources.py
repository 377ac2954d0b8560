"""Where and how a run works: workers, devices, batches per pass, checkpoints, time limits.

One type from the YAML file to the worker. Nothing in it decides a result beyond rounding, so it is never part of a fingerprint.
Units are in the field names. Errors: ValueError, which `pipeline.config.reading` turns into one line per field."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Offload = Literal["none", "optimizer"]
"""What is kept and computed on the CPU next to a GPU."""
ZeroStage = Literal[1, 2, 3]
CheckpointCopy = Literal["memory", "disk"]
ProfileSteps = tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1, le=20)]]
WORKERS_HINT = "write a number from 1, or [min, max]"


class Resources(BaseModel):
    """Where and how a run works. Changing any of this never makes a finished step run again."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    workers: int | tuple[int, int] = 1
    """Training workers, or [min, max] for an elastic range."""
    cpus_per_worker: float = Field(1.0, gt=0)
    use_gpu: bool | None = None
    """One GPU a worker; left out: when the cluster has as many."""
    zero_stage: ZeroStage = 1
    micro_batch: int = Field(64, ge=1)
    """Most samples in one forward pass of a worker; accumulation is derived."""
    offload: Offload = "none"
    """`optimizer`: its state and its step are the CPU's, 12 bytes a weight less on the GPUs together; on CPU workers no change."""
    activation_checkpointing: bool = False
    """Blocks keep their input alone and are computed again in the backward pass: a third more work, far less memory."""
    checkpoint_every_steps: int = Field(500, ge=1)
    keep_checkpoints: int = Field(2, ge=1)
    """The newest; what a receipt, a later generation or a fork names is kept beside them."""
    keep_every_steps: int | None = Field(None, ge=1)
    """Keeps those of every so many steps, too; left out: none."""
    keep_best: int = Field(1, ge=0)
    """Keeps so many of the lowest loss, too."""
    checkpoint_copy: CheckpointCopy = "memory"
    """Where a worker's state, 12 bytes a weight over all workers, is copied to before it is written: training waits for the copy.
    `disk`, a file in cache_directory, takes no memory and the disk's time."""
    log_every_steps: int = Field(20, ge=1)
    profile_steps: ProfileSteps | None = None
    """[first, count] of the steps, counted from 1, that torch's profiler watches on rank 0: `profile/` in the step's generation
    and in MLflow holds a trace and a table. At most 20."""
    decode_threads: int = Field(1, ge=1)
    cache_directory: str = "~/.cache/mae-pipeline/shards"
    """Node-local cache for shards of a remote store."""
    cache_max_bytes: int = Field(50 * 2**30, ge=2**20)
    parallel_steps: int = Field(1, ge=1)
    """Steps of the graph at work at once."""
    max_failures: int = Field(3, ge=0)
    """Worker failures in a row, without a new checkpoint in between, that a training step survives by itself."""
    max_preemptions: int = Field(100, ge=0)
    """The same for workers whose nodes were taken away."""
    node_wait_s: float = Field(1800.0, ge=0)
    """After nodes were taken away, how long a training step waits until its fewest workers fit; then it stops, exit code 3."""
    wall_clock_s: float | None = Field(None, gt=0)
    """The run is asked to stop `grace_s` before it has taken so long; left out: it may take for ever."""
    grace_s: float = Field(120.0, ge=0)
    """Time for the last checkpoint, under wall_clock_s."""
    collective_timeout_s: int = Field(600, ge=10)
    watchdog_s: float = Field(300, gt=0)
    """When a phase of a training step lasts longer, every worker writes its stacks to the store; after twice that, workers that Ray
    Train restarts end themselves."""

    @field_validator("workers")
    @classmethod
    def _workers(cls, value: int | tuple[int, int]) -> int | tuple[int, int]:
        low, high = (value, value) if isinstance(value, int) else value
        if not 1 <= low <= high:
            raise ValueError(f"workers={value}: {WORKERS_HINT}")
        return value

    @model_validator(mode="after")
    def _time_to_save(self) -> "Resources":
        if self.wall_clock_s is not None and self.wall_clock_s <= self.grace_s:
            raise ValueError(
                f"wall_clock_s={self.wall_clock_s:g} leaves nothing to train in: write more than grace_s={self.grace_s:g}"
            )
        return self

    @property
    def worker_range(self) -> tuple[int, int]:
        """The fewest and the most training workers. A run starts with the fewest, when each of them holds the most."""
        return (self.workers, self.workers) if isinstance(self.workers, int) else self.workers

    @property
    def per_worker(self) -> dict[str, float]:
        """What one worker reserves on its node, in Ray's terms. `use_gpu` must have been decided."""
        return {"CPU": self.cpus_per_worker, **({"GPU": 1.0} if self.use_gpu else {})}
