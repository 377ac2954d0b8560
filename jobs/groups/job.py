"""`mae job submit`, `status`, `logs`, `stop`, `list`: runs on a Ray cluster, through Ray's job API.

The token comes from the environment: RAY_AUTH_MODE=token with RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH."""

import json
from typing import Annotated

import typer

from jobs.commands import kubernetes as pods
from jobs.options import ConfigPath, Overrides

app = typer.Typer(no_args_is_help=True, help="Submit, follow and stop runs on a Ray cluster.")


def _with_scheme(address: str) -> str:
    """Return an address as Ray's client needs it: it takes `host:8265` for a cluster of another kind and waits for it."""
    return address if "://" in address or not address else f"http://{address}"


Address = Annotated[
    str,
    typer.Option(
        callback=_with_scheme,
        envvar="RAY_API_SERVER_ADDRESS",
        help="The cluster's dashboard, such as http://head:8265.",
        metavar="URL",
    ),
]
JobId = Annotated[str, typer.Argument(help="The job's id, as `mae job submit` printed it.", metavar="JOB")]


@app.command()
def submit(
    config: ConfigPath,
    address: Address = "",
    overrides: Overrides = [],  # noqa: B006 - typer copies it
    kubernetes: pods.OnKubernetes = False,
    dry_run: pods.DryRun = False,
    image: pods.Image = "",
    workers_per_pod: pods.WorkersPerPod = 1,
    memory_gib: pods.Memory = None,
    queue: pods.Queue = None,
    priority: pods.Priority = None,
) -> None:
    """Check the configuration here, start the run on the cluster and print the job's id.

    A run that is already running is not started twice. With --kubernetes --dry-run, print a RayJob instead.
    """
    from pipeline.config import load_config
    from pipeline.errors import ConfigError
    from pipeline.runs import submission

    checked = load_config(config, overrides)
    if kubernetes:
        text = pods.pod_manifest(
            checked,
            dry_run=dry_run,
            image=image,
            workers_per_pod=workers_per_pod,
            memory_gib=memory_gib,
            queue=queue,
            priority=priority,
        )
        typer.echo(text, nl=False)
        return
    if dry_run:
        raise ConfigError("--dry-run prints a RayJob: add --kubernetes. `mae plan` shows what a run would do")
    if not address:
        raise ConfigError("--address is missing: the cluster's dashboard, such as http://head:8265")
    for warning in submission.warnings(checked):
        typer.echo(f"WARNING {warning}", err=True)
    job = submission.submit(checked, address=address)
    typer.echo(job)
    typer.echo(f"mae job logs {job} --address {address} --follow", err=True)


@app.command()
def status(job: JobId, address: Address) -> None:
    """Print one JSON line: job, status, message."""
    from pipeline.cluster.jobs import job_status

    typer.echo(json.dumps(job_status(job, address=address)))


@app.command()
def logs(
    job: JobId,
    address: Address,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Keep printing until the job ends.")] = False,
) -> None:
    """Print the run's output."""
    from pipeline.cluster.jobs import job_logs

    for text in job_logs(job, address=address, until="end" if follow else "now"):
        # the log's text has its own line ends
        typer.echo(text, nl=False)


@app.command()
def stop(job: JobId, address: Address) -> None:
    """Ask the run to save and stop. Submitted again, it goes on from there."""
    from pipeline.cluster.jobs import stop_job

    typer.echo(json.dumps(stop_job(job, address=address)))


@app.command("list")
def list_jobs(address: Address) -> None:
    """Print one JSON line per job."""
    from pipeline.cluster.jobs import list_runs

    for row in list_runs(address=address):
        typer.echo(json.dumps(row))
