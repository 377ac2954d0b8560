"""Whether training runs on GPUs or on the CPU: decided once, before workers start.

Everything else follows from it: what each worker reserves, its device, the backend of the process group, DeepSpeed's accelerator,
the profiler's activities. Nothing later asks which GPUs there are, because a worker on the CPU may well see some.
Errors: ConfigError if GPUs are asked for that are not there."""

from typing import NamedTuple

from pipeline.cluster.resources import Resources
from pipeline.errors import ConfigError

HERE = "this machine"


class DeviceChoice(NamedTuple):
    """What training runs on, and why."""

    use_gpu: bool
    text: str
    """To be shown before work starts: "training on 4 GPUs"."""
    problem: str = ""
    """Why that is impossible and what to do about it, or an empty string."""

    def or_refuse(self) -> "DeviceChoice":
        """Return the choice, or raise ConfigError if it is impossible."""
        if self.problem:
            raise ConfigError(self.problem)
        return self


def choose_device(resources: Resources, *, gpus: int, where: str = HERE, others: str = "") -> DeviceChoice:
    """Decide `resources.use_gpu`, given how many GPUs there are.

    `where` they are, and what is known of `others` ("and its autoscaler starts no more"), are for the texts.
    """
    least, most = resources.worker_range
    if resources.use_gpu is False:
        return DeviceChoice(use_gpu=False, text="training on the CPU: resources.use_gpu is false")
    if gpus >= least:
        return DeviceChoice(use_gpu=True, text=f"training on {_counted(min(gpus, most))}")
    found = f"{where} has {_counted(gpus)}{f', {others}' if others else ''}"
    if resources.use_gpu == "auto":
        too_few = f", fewer than resources.workers={least}" if gpus else ""
        return DeviceChoice(use_gpu=False, text=f"training on the CPU: {found}{too_few}")
    way_out = (
        f"Write resources.use_gpu: false to train on the CPU, {'write fewer workers, ' if gpus else ''}or add GPUs"
    )
    problem = f"resources.use_gpu=true needs {_counted(least)} for resources.workers={least}, but {found}. {way_out}"
    return DeviceChoice(use_gpu=True, text="", problem=problem)


def choose_device_here(resources: Resources) -> DeviceChoice:
    """Decide `resources.use_gpu` for training on this machine."""
    return choose_device(resources, gpus=local_gpu_count())


def local_gpu_count() -> int:
    """Return how many GPUs torch can use on this machine."""
    import torch  # takes seconds, for which a command that trains nothing must not wait

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _counted(gpus: int) -> str:
    return f"{gpus} GPU{'s' if gpus > 1 else ''}" if gpus else "no GPU"
