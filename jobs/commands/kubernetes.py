"""`mae job submit --kubernetes --dry-run`: the options for pods, and the YAML that they give."""

import os
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pipeline.config import RunConfig

_PANEL = "Kubernetes"
OnKubernetes = Annotated[
    bool, typer.Option("--kubernetes", help="Make a RayJob for KubeRay. Needs --dry-run.", rich_help_panel=_PANEL)
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the RayJob's YAML, for kubectl apply -f -.", rich_help_panel=_PANEL)
]
Image = Annotated[str, typer.Option(help="The pods' image. Needed.", metavar="NAME:TAG", rich_help_panel=_PANEL)]
WorkersPerPod = Annotated[
    int, typer.Option(min=1, help="GPUs of a node, for one pod per node.", rich_help_panel=_PANEL)
]
Memory = Annotated[
    int | None,
    typer.Option(
        "--memory-gib", min=1, help="GiB for each worker. Default: 96 beside a GPU, 8 without.", rich_help_panel=_PANEL
    ),
]
Queue = Annotated[str | None, typer.Option(help="Kueue's LocalQueue. Default: not queued.", rich_help_panel=_PANEL)]
Priority = Annotated[str | None, typer.Option(help="Kueue's WorkloadPriorityClass.", rich_help_panel=_PANEL)]


def pod_manifest(
    config: "RunConfig",
    *,
    dry_run: bool,
    image: str,
    workers_per_pod: int,
    memory_gib: int | None,
    queue: str | None,
    priority: str | None,
) -> str:
    """Return the YAML of the run, after checking the options."""
    from pipeline.cluster.kubernetes import Pods
    from pipeline.errors import ConfigError
    from pipeline.runs.kubernetes import manifest

    if not dry_run:
        raise ConfigError(
            "--kubernetes prints a RayJob and leaves the rest to kubectl: add --dry-run, and | kubectl apply -f -"
        )
    if not image:
        raise ConfigError(
            "--kubernetes needs --image NAME:TAG, the image of infra/docker/Dockerfile as your nodes pull it"
        )
    if priority and not queue:
        raise ConfigError(f"--priority {priority} is Kueue's and needs --queue NAME")
    pods = Pods(image=image, workers_per_pod=workers_per_pod, memory_gib=memory_gib, queue=queue, priority=priority)
    return manifest(config, pods=pods, environment=os.environ)
