"""mae shards verify, inspect, index: a dataset read back, shown, or made of tars that lie somewhere."""

import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

from pipeline import cluster
from pipeline.cluster.tasks import Executor
from pipeline.config import RunConfig, absolute, load_config
from pipeline.data.dataset.integrity import Verification
from pipeline.data.dataset.survey import survey
from pipeline.data.sources.listing import KINDS, list_source
from pipeline.errors import ConfigError, DataError
from pipeline.graph.runner import Outcome
from pipeline.graph.step import Step
from pipeline.reporting.shard_pictures import survey_png, survey_table, terminal_sheet, verification_table
from pipeline.reporting.terminal import ProgressDisplay
from pipeline.runs.datasets import FinishedDataset, dataset_in, datasets_of, make_datasets
from pipeline.runs.hooks import detail_of
from pipeline.runs.summary import EXIT_CODES
from pipeline.runs.verification import verify

CLUSTER_FROM_BYTES = 2 * 2**30
"""Less is read here before a cluster has started."""


def verify_command(target: str, overrides: Sequence[str], *, workers: int | None, as_json: bool) -> int:
    """Verifies every dataset; 1 when anything was found."""
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.WARNING)
    datasets = find_datasets(target, overrides)
    executor = choose_executor(datasets, workers)
    if executor == "ray":
        cluster.connect(cpus=workers)
    errors = Console(stderr=True, highlight=False)
    try:
        with ProgressDisplay(console=errors) as display:
            found = [
                verify(one, executor=executor, progress=display.for_step(f"verify {one.receipt.step}"))
                for one in datasets
            ]
    finally:
        if executor == "ray":
            cluster.disconnect()
    shown = errors if as_json else Console(highlight=False)
    for verification in found:
        shown.print(verification_table(verification), soft_wrap=True)
    if as_json:
        for verification in found:
            print(json.dumps(as_line(verification)))
    return 0 if all(verification.clean for verification in found) else 1


def as_line(verification: Verification) -> dict[str, object]:
    """One JSON line of `mae shards verify --json`."""
    return {"clean": verification.clean, **asdict(verification)}


def inspect_command(
    target: str, overrides: Sequence[str], *, out: Path, split: str | None, samples: int, seed: int
) -> int:
    """Shows the first dataset: a picture in a file, tables here."""
    dataset = find_datasets(target, overrides)[0]
    manifest = dataset.address.open()
    if split is not None and split not in manifest.splits:
        raise ConfigError(f"--split {split!r} is none of this dataset's: write {' or '.join(manifest.splits)}")
    console = Console(highlight=False)
    seen = survey(manifest, splits=[split] if split else manifest.splits, images=samples, seed=seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(survey_png(seen))
    if sys.stdout.isatty() and seen.shown:
        console.print(terminal_sheet(seen.shown))
        console.print()
    console.print(survey_table(seen), soft_wrap=True)
    unreadable = [one for one in seen.shown if one.image is None]
    if unreadable:
        console.print(
            f"\n{len(unreadable)} of {len(seen.shown)} images cannot be read; `mae shards verify` says why. First: "
            f"{unreadable[0].source}: {unreadable[0].trouble}",
            soft_wrap=True,
        )
    console.print(f"\ndataset  {manifest.digest[:12]}  {dataset.step_uri}\npicture  {out.absolute()}", soft_wrap=True)
    return 0


def index_command(source: str, overrides: Sequence[str], *, store: str, workers: int | None) -> int:
    """Snapshot and shard steps of a source of tars, and what they found; the tars stay as they are."""
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.WARNING)
    config = index_config(source, store, overrides)
    first = next((item for item in list_source(config.data.source) if item.role != "ignored"), None)
    if first is not None and first.role != "tar":
        raise ConfigError(
            f"{config.data.source} holds {KINDS[first.role]} ({first.path}), and only tars are indexed: `mae run` takes these in"
        )
    executor: Executor = "ray" if "RAY_ADDRESS" in os.environ or (workers or 1) > 1 else "in_process"
    if executor == "ray":
        cluster.connect(cpus=workers)
    errors = Console(stderr=True, highlight=False)
    try:
        with ProgressDisplay(console=errors) as display:
            outcomes = make_datasets(config, executor=executor, hooks=_Shown(display))
    finally:
        if executor == "ray":
            cluster.disconnect()
    if any(outcome.state not in {"done", "cached"} for outcome in outcomes):
        return EXIT_CODES["stopped" if any(outcome.state == "stopped" for outcome in outcomes) else "failed"]
    dataset = datasets_of(config)[0]
    manifest = dataset.address.open()
    shown = Console(highlight=False)
    shown.print(survey_table(survey(manifest, splits=manifest.splits, images=0)), soft_wrap=True)
    shown.print(f"\ndataset  {manifest.digest[:12]}  {dataset.step_uri}", soft_wrap=True)
    return 0


def index_config(source: str, store: str, overrides: Sequence[str]) -> RunConfig:
    """A run's configuration as far as shards depend on it: a run with the same `data` finds these shards done."""
    document = {"store": absolute(store), "data": {"source": absolute(source)}, "model": {"size": "tiny"}}
    with TemporaryDirectory() as folder:
        path = Path(folder) / "index.yaml"
        path.write_text(json.dumps(document))  # JSON is YAML
        return load_config(path, overrides)


class _Shown:
    """The runner's hooks: the terminal, and no tracking."""

    tracking_uri = ""

    def __init__(self, display: ProgressDisplay) -> None:
        self.display = display

    def begin(self, step: Step) -> str:
        self.display.step_state(step.name, "running")
        return ""

    def progress(self, step_name: str, done: int, total: int, unit: str, fields: Mapping[str, float]) -> None:
        self.display.update(step_name, done, total, unit, fields)

    def end(self, outcome: Outcome) -> None:
        self.display.step_state(outcome.step.name, outcome.state, detail=detail_of(outcome))


def find_datasets(target: str, overrides: Sequence[str]) -> list[FinishedDataset]:
    """Those of a configuration, or the one in a step's directory."""
    if target.endswith((".yaml", ".yml")):
        return datasets_of(load_config(Path(target), overrides))
    if overrides:
        raise ConfigError(f"--set changes a configuration, and {target!r} is the directory of a step: leave it out")
    return [dataset_in(target)]


def choose_executor(datasets: Sequence[FinishedDataset], workers: int | None) -> Executor:
    """A cluster where there is one, or where there is enough to read and more than one CPU to do it."""
    if "RAY_ADDRESS" in os.environ:
        return "ray"
    cpus = os.cpu_count() or 1
    if workers is not None:
        return "in_process" if workers == 1 else "ray"
    try:
        lines = [line for dataset in datasets for line in dataset.address.open().all_shards().to_pylist()]
    except DataError:  # verify tells of damaged tables
        return "in_process"
    return "ray" if cpus > 1 and sum(line["bytes"] for line in lines) >= CLUSTER_FROM_BYTES else "in_process"
