"""`make demo`: the whole pipeline on scikit-learn's handwritten digits.

Ray runs on this machine, the store is a folder, MLflow's database is SQLite. Writes OUT/summary.json:
mean scores, seconds per step, and where the report, the store and MLflow's database are."""

import json
import os
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from pipeline.runs.summary import RunSummary


def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything that the demo writes.")] = Path(".demo"),
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds to evaluate with.")] = 1,
    quick: Annotated[
        bool, typer.Option("--quick", help="Train 10 epochs instead of 100, to see whether it runs at all.")
    ] = False,
) -> None:
    """Run jobs/configs/digits.yaml with everything in one folder."""
    out = out.absolute()
    typer.echo(f"demo  handwritten digits  {out}", err=True)
    from jobs.digits import write_digits
    from jobs.options import read_config
    from pipeline.runs.terminal import run_and_show

    out.mkdir(parents=True, exist_ok=True)
    overrides = [
        f"store={out / 'store'}",
        f"data.source={write_digits(out / 'digits')}",
        f"evaluation.seeds={list(range(seeds))}",
        # two workers also fit on a machine with one core
        f"resources.cpus_per_worker={min(1.0, (os.cpu_count() or 1) / 2)}",
        *(["pretrain.epochs=10"] if quick else []),
    ]
    with resources.as_file(resources.files("jobs") / "configs" / "digits.yaml") as path:
        summary = run_and_show(read_config(path, overrides, record=True), executor="ray")
    if summary.exit_code == 0:
        (out / "summary.json").write_text(json.dumps(results(summary), indent=1) + "\n")
        typer.echo(f"summary   {out / 'summary.json'}", err=True)
    raise typer.Exit(summary.exit_code)


def results(summary: "RunSummary") -> dict[str, Any]:
    """Return mean scores by protocol and encoder, seconds by step, and addresses."""
    scores: dict[str, dict[str, float]] = {}
    for score in summary.scores:
        scores.setdefault(score.protocol, {})[score.encoder] = score.mean
    return {
        "scores": scores,
        "seconds": {outcome.step.name: round(outcome.seconds, 3) for outcome in summary.outcomes},
        **{key: summary.addresses[key] for key in ("report", "store", "tracking")},
    }


def main() -> None:
    """Entry point of `make demo`."""
    from jobs.cli import guarded

    guarded(lambda: typer.run(demo))


if __name__ == "__main__":
    main()
