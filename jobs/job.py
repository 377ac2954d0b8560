"""mae job submit | status | logs | stop | list: the same run on a Ray cluster, through the Ray Jobs SDK.

The token comes from the environment (RAY_AUTH_MODE=token with RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH)."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pipeline.config import RunConfig

app = typer.Typer(no_args_is_help=True, help="Runs on a Ray cluster.")

Address = Annotated[
    str,
    typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="Of the cluster's dashboard: http://head:8265", metavar="URL"),
]
JobId = Annotated[str, typer.Argument(help="As `mae job submit` printed it.", metavar="JOB")]


@app.command()
def submit(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml")],
    address: Address,
    overrides: Annotated[list[str], typer.Option("--set", metavar="FIELD=VALUE")] = [],  # noqa: B006 - typer copies it
) -> None:
    """Checks the configuration here, then starts the run there. The same run is not started twice at once."""
    import yaml

    from pipeline.cluster.jobs import submit_run
    from pipeline.config import load_config

    checked = load_config(config, overrides)
    for warning in _warnings(checked):
        typer.echo(f"WARNING {warning}", err=True)
    text = yaml.safe_dump(json.loads(checked.model_dump_json()), sort_keys=False)
    job = submit_run(checked.name, text, address=address)
    typer.echo(job)
    typer.echo(f"mae job logs {job} --address {address} --follow", err=True)


def _warnings(config: "RunConfig") -> Iterator[str]:
    """What works here and may not work there."""
    for field, address in (
        ("store", config.store),
        ("data.source", config.data.source),
        ("data.labels", config.data.labels),
    ):
        if address and not address.startswith("s3://"):
            what = "file" if field == "data.labels" else "folder"
            yield f"{field} {address} is a {what}: every node of the cluster must see it under this path"
    uri = config.tracking.uri
    if uri is None or uri.startswith("sqlite"):
        shown = uri or "is not set: where the cluster sets no MLFLOW_TRACKING_URI it"
        yield f"tracking.uri {shown} is a file of the machine that drives the run; name an MLflow server"


@app.command()
def status(job: JobId, address: Address) -> None:
    """Prints one JSON line: job, status, message."""
    from pipeline.cluster.jobs import job_status

    typer.echo(json.dumps(job_status(job, address=address)))


@app.command()
def logs(
    job: JobId,
    address: Address,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Until the job ends.")] = False,
) -> None:
    """Prints the run's output."""
    from pipeline.cluster.jobs import job_logs

    for text in job_logs(job, address=address, until="end" if follow else "now"):
        typer.echo(text, nl=False)


@app.command()
def stop(job: JobId, address: Address) -> None:
    """Asks the run to save and stop; submitting it again goes on from there."""
    from pipeline.cluster.jobs import stop_job

    typer.echo(json.dumps(stop_job(job, address=address)))


@app.command("list")
def list_jobs(address: Address) -> None:
    """Prints one JSON line a job."""
    from pipeline.cluster.jobs import list_runs

    for row in list_runs(address=address):
        typer.echo(json.dumps(row))
