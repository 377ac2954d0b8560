"""make demo: the whole pipeline on scikit-learn's digits, with embedded defaults (local Ray, a folder as store, SQLite MLflow).

Leaves OUT/summary.json: scores, seconds by step, and where the report, the store and the tracking lie."""

import json
import os
import sys
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import typer


def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything the demo makes.")] = Path(".demo"),
    seeds: Annotated[int, typer.Option(min=1, help="Evaluations are repeated with so many seeds.")] = 1,
    quick: Annotated[
        bool, typer.Option("--quick", help="Ten epochs instead of a hundred: does it run at all?")
    ] = False,
) -> None:
    """Runs the digits configuration in OUT."""
    from jobs.digits import write_digits
    from jobs.run import run_and_show
    from pipeline.config import load_config
    from pipeline.runs.summary import RunSummary

    out = out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    overrides = [
        f"store={out / 'store'}",
        f"data.source={write_digits(out / 'digits')}",
        f"evaluation.seeds={list(range(seeds))}",
        f"resources.cpus_per_worker={min(1.0, (os.cpu_count() or 1) / 2)}",
        *(["pretrain.epochs=10"] if quick else []),
    ]
    with resources.as_file(resources.files("jobs") / "configs" / "digits.yaml") as path:
        summary: RunSummary = run_and_show(load_config(path, overrides), executor="ray")
    if summary.exit_code == 0:
        (out / "summary.json").write_text(json.dumps(as_summary(summary), indent=1) + "\n")
        print(f"summary   {out / 'summary.json'}", file=sys.stderr)
    raise typer.Exit(summary.exit_code)


def as_summary(summary: Any) -> dict[str, Any]:
    """Mean scores by protocol and encoder, seconds by step, addresses."""
    scores: dict[str, dict[str, float]] = {}
    for score in summary.scores:
        scores.setdefault(score.protocol, {})[score.encoder] = score.mean
    return {
        "scores": scores,
        "seconds": {outcome.step.name: round(outcome.seconds, 3) for outcome in summary.outcomes},
        **{key: summary.addresses[key] for key in ("report", "store", "tracking")},
    }


def main() -> None:
    """A person's mistake is one clear line."""
    from jobs.cli import guarded

    guarded(lambda: typer.run(demo))


if __name__ == "__main__":
    main()
