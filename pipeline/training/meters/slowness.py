"""Why a training is slow: from measured shares of its time to one cause, and to the word of the configuration to change.

"Slow" is below half of what `mae plan` foresees at worst. The plan counts with a share of the device's peak; the loop compares
that share with what it reaches of the peak that it has measured itself. Shares are of the time since the last row, in [0, 1]."""

from collections.abc import Mapping
from typing import Literal, NamedTuple

from pipeline.cluster.resources import Resources

FORESEEN_MFU: Mapping[Literal["cuda", "cpu"], tuple[float, float]] = {"cuda": (0.3, 0.5), "cpu": (0.6, 0.75)}
"""(cautious, good) share of the peak that training reaches: an assumption on GPUs, measured on CPUs (docs/performance.md)."""
SLOW_SHARE = 0.5
SLOW_FOR_S = 120.0
"""How long rows must be slow without a break: a pause for a checkpoint or a cold cache is not the run's speed."""
_LEAST_SHARE = 0.15
"""What takes less of the time than this cannot make a run twice as slow."""

Cause = Literal["data", "host", "copies", "network", "recompilation", "checkpoints", "computation"]


class TimeShares(NamedTuple):
    """What training waits for, by cause. They need not add up to 1: the rest is computation."""

    data: float = 0.0
    host: float = 0.0
    copies: float = 0.0
    network: float = 0.0
    recompilation: float = 0.0
    checkpoints: float = 0.0


def shares_of(row: Mapping[str, float]) -> TimeShares:
    """Return the shares in a row. What a row does not hold is 0."""
    data, checkpoints, compiling = (row.get(name, 0.0) for name in ("data_wait", "checkpoint_wait", "compiling"))
    agreement = row.get("agree_wait", 0.0)
    # The GPU idles during these waits too; only what is left is the interpreter's doing.
    host = max(0.0, row.get("host_bound", 0.0) - data - checkpoints - compiling - agreement)
    network = agreement + row.get("exchange", 0.0)
    return TimeShares(data, host, row.get("copy_wait", 0.0), network, compiling, checkpoints)


def main_cause(shares: TimeShares) -> Cause:
    """Return the cause with the largest share, or `computation` if none is large enough to matter."""
    causes: tuple[Cause, ...] = ("data", "host", "copies", "network", "recompilation", "checkpoints")
    share, _, cause = max((share, -index, causes[index]) for index, share in enumerate(shares))
    return cause if share >= _LEAST_SHARE else "computation"


def advice(cause: Cause, resources: Resources) -> str:
    """Return what to change in the configuration, in a sentence."""
    if cause == "data":
        return f"It waits for data: raise resources.decode_workers (now {resources.decode_workers})"
    if cause == "host":
        return f"It waits for the interpreter: raise resources.micro_batch (now {resources.micro_batch})"
    if cause == "copies":
        return f"It waits for copies to the device: lower resources.decode_workers (now {resources.decode_workers})"
    if cause == "network":
        stage, workers = resources.zero_stage, resources.workers
        way_out = (
            f"lower resources.zero_stage (now {stage})" if stage > 1 else f"lower resources.workers (now {workers})"
        )
        return f"It waits for other workers and the network: {way_out}"
    if cause == "recompilation":
        return "It compiles the model again and again: resources.compile=off turns that off"
    if cause == "checkpoints":
        return (
            f"It waits for checkpoints: raise resources.checkpoint_every_steps (now {resources.checkpoint_every_steps})"
        )
    return "It waits for nothing else, so its kernels are slow: resources.profile_steps=[100, 3] shows which"


class SpeedWatch:
    """Says once why a run is slow, when it has been for a while."""

    def __init__(self, resources: Resources, device: Literal["cuda", "cpu"]) -> None:
        self.resources = resources
        # MFU counts no recomputation; the plan does, as one forward pass more.
        self.foreseen = FORESEEN_MFU[device][0] * (0.75 if resources.activation_checkpointing else 1.0)
        self._slow_s, self._told, self._last_time = 0.0, False, 0.0

    def remark(self, row: Mapping[str, float]) -> str:
        """Return a sentence about a row, or an empty string if there is nothing to say, or no more."""
        # The first row begins before there is anything to compare: it holds compilation and a cold cache.
        elapsed = row["time"] - self._last_time if self._last_time else 0.0
        self._last_time = row["time"]
        self._slow_s = self._slow_s + elapsed if row["mfu"] < SLOW_SHARE * self.foreseen else 0.0
        if self._told or self._slow_s < SLOW_FOR_S:
            return ""
        self._told = True
        speed, share = row["images_per_s"], row["mfu"] / self.foreseen
        return (
            f"{speed:.4g} images/s are {100 * share:.0f} % of what mae plan foresees at worst. "
            f"{advice(main_cause(shares_of(row)), self.resources)}"
        )
