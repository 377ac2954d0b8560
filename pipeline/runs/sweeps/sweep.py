"""A sweep: several configurations that differ in named fields, checked together before anything starts.

Errors: ConfigError for a field or value that a configuration refuses, for two members that are the same run, and for fields that
all members share. What is wrong with every member is said once."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import RunConfig, load_config
from pipeline.config.fields import NAME, PATTERN_MEANINGS
from pipeline.config.sweeps import (
    OF_THE_WHOLE_SWEEP,
    NotBuilt,
    Paper,
    PaperRow,
    Point,
    SweepFile,
    described,
    is_sweep,
    parse_grid,
    points,
    read_sweep,
    short_names,
    text_of,
)
from pipeline.errors import ConfigError
from pipeline.graph.step import Step
from pipeline.runs.sources.state import settled_for_run
from pipeline.runs.sweeps.graph import Member, share_steps
from pipeline.runs.workflow import build
from pipeline.tracking.names import SWEEP_TAG


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """What the command line says beside the file."""

    config: Path | None = None
    """The configuration that is varied, in place of the one that a sweep's file names."""
    overrides: Sequence[str] = ()
    """`a.b=value`, for all members."""
    grid: Sequence[str] = ()
    """`KEY=V1,V2`; takes the place of a key's values in the file's grid."""
    draws: int | None = None
    seed: int = 0
    name: str = ""


@dataclass(frozen=True, kw_only=True)
class SweepMember:
    """One configuration of a sweep."""

    label: str
    point: Point
    run: Member

    @property
    def config(self) -> RunConfig:
        """The whole configuration, with which `mae run` finds the same steps."""
        return self.run.config


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What is run, and what is published about it."""

    name: str
    title: str
    members: Sequence[SweepMember]
    paper: Paper | None = None
    not_built: Sequence[NotBuilt] = ()

    def published(self, point: Point) -> PaperRow | None:
        """Return the published row of a point."""
        return next((row for row in self.paper.rows if row.at == point), None) if self.paper else None


def load_sweep(
    path: Path, options: SweepOptions, *, say: Callable[[str], None] = lambda _: None, record: bool = False
) -> Sweep:
    """Read a sweep's file, or a configuration and what varies it, into checked members.

    `say`: shown lines about the state of the data; `record`: remember in the store that data have moved."""
    grid = parse_grid(options.grid)
    if is_sweep(path):
        file = read_sweep(path)
        said, base = str(path), options.config or Path(file.config)
    else:
        if options.config is not None:
            raise ConfigError(f"--config {options.config}: {path} is a run's configuration itself; leave --config out")
        file = SweepFile(config=str(path), grid={})
        said, base = "--grid", path
    points_by_label = _labelled(file, grid, options)
    # a configuration that the user names instead is taken as it is
    fixed = {} if options.config else file.set
    changes = {label: {**fixed, **point} for label, point in points_by_label.items()}
    _check_shared(changes, said)
    configs = _settled(_read_all(base, options.overrides, changes, said), say=say, record=record)
    varied = dict.fromkeys(key for point in points_by_label.values() for key in point)
    name = _checked_name(options.name or file.name or "-".join(short_names(varied).values()))
    graphs = share_steps({label: build(config) for label, config in configs.items()})
    _check_different(graphs, changes)
    return Sweep(
        name=name,
        title=file.title or name,
        members=[
            SweepMember(
                label=label,
                point=points_by_label[label],
                run=Member(config=configs[label], steps=graphs[label], tags={SWEEP_TAG: name}),
            )
            for label in configs
        ],
        paper=file.paper,
        not_built=file.not_built,
    )


def _labelled(file: SweepFile, grid: Mapping[str, Sequence[Any]], options: SweepOptions) -> dict[str, Point]:
    """Return the points that are asked for, by label."""
    if file.members is None:
        found = points({**(file.grid or {}), **grid}, draws=options.draws, seed=options.seed)
        labels = _labels(found)
    elif grid or options.draws is not None:
        raise ConfigError(
            "this sweep's file lists its members: --grid and --random vary a configuration or a file with a grid"
        )
    else:
        found = file.points
        labels = [one.label or described(one.set) for one in file.members]
    if twice := next((label for label in labels if labels.count(label) > 1), None):
        raise ConfigError(f"two members are called {twice!r}: values or labels are there twice; write each once")
    return dict(zip(labels, found, strict=True))


def _labels(found: Sequence[Point]) -> list[str]:
    """Name each point by what it sets, with the field's shortest unambiguous ending."""
    names = short_names(list(dict.fromkeys(key for point in found for key in point)))
    return [" ".join(f"{names[key]}={text_of(value)}" for key, value in point.items()) for point in found]


def _check_shared(changes: Mapping[str, Point], said: str) -> None:
    for key in dict.fromkeys(key for point in changes.values() for key in point):
        if key.partition(".")[0] in OF_THE_WHOLE_SWEEP:
            raise ConfigError(
                f"{said}: {key} is shared by all members of a sweep; set it for all of them with --set {key}=..."
            )


def _read_all(path: Path, overrides: Sequence[str], changes: Mapping[str, Point], said: str) -> dict[str, RunConfig]:
    """Read every member's configuration. Raises one ConfigError with all that is wrong."""
    configs: dict[str, RunConfig] = {}
    refused: dict[str, list[str]] = {}
    for label, point in changes.items():
        try:
            configs[label] = load_config(path, overrides, changes=point, changed_by=said)
        except ConfigError as error:
            for line in str(error).splitlines():
                refused.setdefault(line, []).append(label)
    if refused:
        lines = (
            line if len(labels) == len(changes) else f"member {labels[0]}: {line}" for line, labels in refused.items()
        )
        raise ConfigError("\n".join(lines))
    return configs


def _settled(configs: Mapping[str, RunConfig], *, say: Callable[[str], None], record: bool) -> dict[str, RunConfig]:
    """Settle which state of the data each member reads. What is said of several is said once."""
    said: set[str] = set()

    def once(line: str) -> None:
        if line not in said:
            said.add(line)
            say(line)

    return {label: settled_for_run(config, say=once, record=record) for label, config in configs.items()}


def _checked_name(name: str) -> str:
    if not re.match(NAME, name):
        raise ConfigError(f"the sweep's name {name!r} is not usable: write {PATTERN_MEANINGS[NAME]} with --name")
    return name


def _check_different(graphs: Mapping[str, Sequence[Step]], changes: Mapping[str, Point]) -> None:
    """Raise ConfigError if two members would be the same run."""
    by_report: dict[str, str] = {}
    for label, steps in graphs.items():
        # its fingerprint covers everything that can change a result
        report = next(step for step in steps if step.kind == "report")
        same = by_report.setdefault(report.title, label)
        if same != label:
            differing = [key for key, value in changes[label].items() if changes[same].get(key) != value]
            why = f": {', '.join(differing)} changes no result" if differing else ""
            raise ConfigError(f"members {same} and {label} are the same run{why}. Leave one of them out")
