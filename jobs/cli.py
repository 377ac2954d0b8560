"""The `mae` command. Commands are thin: they parse, call pipeline, print. Heavy imports wait until a command runs.

Exit codes: 0 done, 1 failed, 2 wrong input, 3 stopped and resumable, 4 done with more quarantined images than the warning share."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer

from jobs.job import app as job_app
from jobs.model import app as model_app
from jobs.shards import app as shards_app
from jobs.store import app as store_app

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="From a folder or bucket of images to an evaluated Masked Autoencoder encoder.",
)
app.add_typer(job_app, name="job")
app.add_typer(shards_app, name="shards")
app.add_typer(model_app, name="model")
app.add_typer(store_app, name="store")

Config = Annotated[Path, typer.Argument(help="YAML file of the run.", metavar="CONFIG.yaml")]
Set = Annotated[
    list[str], typer.Option("--set", help="Overrides a field: --set pretrain.epochs=100", metavar="FIELD=VALUE")
]
Refresh = Annotated[
    bool, typer.Option("--refresh", help="Takes in what the source holds beyond its snapshots, as a new part.")
]
AsJson = Annotated[bool, typer.Option("--json", help="End with one JSON line on standard output.")]


@app.command()
def run(
    config: Config,
    overrides: Set = [],  # noqa: B006 - typer copies it
    in_process: Annotated[bool, typer.Option("--in-process", help="No Ray, one worker; a debugger works.")] = False,
    refresh: Refresh = False,
    as_json: AsJson = False,
) -> None:
    """Runs every step that is not done: snapshot, shard, pretrain, evaluate, report."""
    from jobs.run import run_command

    executor: Literal["ray", "in_process"] = "in_process" if in_process else "ray"
    raise typer.Exit(run_command(config, overrides, executor=executor, refresh=refresh, as_json=as_json))


@app.command()
def plan(
    config: Config,
    overrides: Set = [],  # noqa: B006
    refresh: Refresh = False,
    hardware: Annotated[
        str | None, typer.Option(help="A100-40, A100, H100, H200, B200, L40S or CPU; left out: this machine's.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="As --set resources.workers=N.")] = None,
    images: Annotated[int | None, typer.Option(help="In an epoch, where nobody has counted them yet.")] = None,
    prices: Annotated[
        Path | None, typer.Option(help="Your prices, USD a device-hour: a copy of jobs/prices.yaml.", metavar="FILE")
    ] = None,
    tflops: Annotated[float | None, typer.Option(help="A device's peak as measured: dense, TFLOP/s.")] = None,
    mfu: Annotated[float | None, typer.Option(help="Share of the peak that training uses, as measured.")] = None,
    as_json: AsJson = False,
) -> None:
    """Says what is cached, what would run and why, and what that takes: memory, steps, hours, cost. Writes nothing."""
    from jobs.run import Foreseen, plan_command

    given = [*overrides, *([f"resources.workers={workers}"] if workers is not None else [])]
    foreseen = Foreseen(hardware=hardware, images=images, prices=prices, tflops=tflops, mfu=mfu)
    raise typer.Exit(plan_command(config, given, foreseen=foreseen, refresh=refresh, as_json=as_json))


@app.command()
def replay(
    address: Annotated[
        str, typer.Argument(help="A bundle, a training step's directory or a run's store.", metavar="BUNDLE|STORE")
    ],
    step: Annotated[int | None, typer.Option(min=0, help="Which bad step; left out: the last one.")] = None,
    most_steps: Annotated[int, typer.Option(min=0, help="Most steps to do again before it.")] = 1000,
    as_json: AsJson = False,
) -> None:
    """Does a step that was not taken once more, in one process: which samples' losses are not finite?

    Exit code 0 when all is as it was, 1 when not.
    """
    from jobs.replay import replay_command

    raise typer.Exit(replay_command(address, step=step, most_steps=most_steps, as_json=as_json))


@app.command()
def fork(
    config: Config,
    at: Annotated[int, typer.Option(min=1, help="Step of the checkpoint to go on from.")],
    out: Annotated[Path, typer.Option(help="The configuration to write.", metavar="FORK.yaml")],
    overrides: Set = [],  # noqa: B006
) -> None:
    """Writes the configuration of a run whose pretraining goes on from a checkpoint of this one, under another recipe.

    Weights, moments and position are the checkpoint's; learning rate, schedule and epochs may change. `mae run FORK.yaml` runs it.
    """
    from pipeline.runs.fork import fork as write_fork

    start = write_fork(config, overrides, at=at, out=out)
    typer.echo(f"{out}: goes on from {start.checkpoint}. Run it: mae run {out}")


@app.command()
def ui(
    config: Annotated[Path | None, typer.Argument(help="YAML file of a run; left out: the store in ./.mae.")] = None,
    overrides: Set = [],  # noqa: B006
    port: Annotated[int, typer.Option(help="On 127.0.0.1.")] = 5000,
) -> None:
    """Opens MLflow on this machine's loopback, on the runs of a configuration."""
    from jobs.run import ui_command

    raise typer.Exit(ui_command(config, overrides, port=port))


@app.command()
def doctor(
    data: Annotated[
        bool, typer.Option("--data", help="Times decoding here; cores that a GPU needs, by model.")
    ] = False,
    images: Annotated[
        Path | None, typer.Option(help="JPEGs to time with; left out: made-up ones.", metavar="DIR")
    ] = None,
    gpus: Annotated[list[str], typer.Option("--gpu", help="A100, H100, H200, B200; may be repeated.")] = [],  # noqa: B006
    tflops: Annotated[float | None, typer.Option(help="Another GPU's peak: bfloat16, dense.")] = None,
    mfu: Annotated[float, typer.Option(help="Share of the peak that training uses.")] = 0.4,
    seconds: Annotated[float, typer.Option(help="To measure for, on one core and on all.")] = 3.0,
    as_json: AsJson = False,
) -> None:
    """Says whether this machine can do what a run will ask of it."""
    from jobs.doctor import data_command
    from pipeline.errors import ConfigError

    if not data:
        raise ConfigError("doctor: say what is to be looked at: --data")
    raise typer.Exit(data_command(images, gpus=gpus, tflops=tflops, share=mfu, seconds=seconds, as_json=as_json))


def main() -> None:
    """Entry point of `mae`."""
    guarded(app)


def guarded(command: Callable[[], None]) -> None:
    """Runs a command; a person's mistake is one clear line, never a traceback."""
    try:
        command()
    except KeyboardInterrupt:
        sys.exit(3)
    except Exception as error:  # noqa: BLE001 - explain() raises again what is no person's mistake
        from jobs.console import explain

        sys.exit(explain(error))


if __name__ == "__main__":
    main()
