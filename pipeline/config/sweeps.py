"""What a sweep varies: a YAML file or `--grid` and `--random`, as points in the configuration's fields.

    name: mask_ratio                        # the file's name if left out
    config: ../vit_large.yaml               # what is varied; --config takes its place
    set: {pretrain.epochs: 800}             # changes `config`, and only that one
    grid: {model.mask_ratio: [0.4, 0.75]}   # every combination; or
    members: [{label: shallow, set: {model.decoder_depth: 1}}]
    paper:                                  # published rows that stand beside the members that they are of
      source: He et al. 2022, figure 5
      rows: [{at: {model.mask_ratio: 0.75}, scores: {finetune: 84.9, linear: 73.5}}]
    not_built: [{label: colour jitter, why: ..., scores: {finetune: 84.3, linear: 71.9}}]

A *point* is a mapping of dotted fields to values. Units: published scores in per cent.
Errors: ConfigError, with the file or option and what to write."""

import itertools
import json
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, ValidationError, model_validator

from pipeline.config.document import read_yaml, yaml_value
from pipeline.config.fields import Name, Section
from pipeline.errors import ConfigError

Point = Mapping[str, Any]
Percent = Annotated[float, Field(ge=0, le=100)]
Label = Annotated[str, Field(min_length=1, max_length=60)]
MOST_MEMBERS = 1000
"""More is more likely a mistake in the grid."""
OF_THE_WHOLE_SWEEP = ("name", "store", "tracking")
"""Fields that all members share."""
_RANGE = re.compile(r"(log:)?([-+.\deE]+)\.\.([-+.\deE]+)")


class Member(Section):
    """One configuration of a sweep."""

    label: Label | None = None
    """What tables call it; what it sets if left out."""
    set: dict[str, Any]
    """Values by dotted field; empty for the configuration as it is."""


class PaperRow(Section):
    """A published row, beside the member that it is of."""

    at: dict[str, Any]
    """What that member sets."""
    scores: dict[str, Percent] = Field(min_length=1)
    """By protocol, in per cent."""


class Paper(Section):
    """Published figures."""

    source: str
    """Where they were published, with the number of the table or figure."""
    setting: str = ""
    """What they were measured with."""
    rows: tuple[PaperRow, ...] = Field(min_length=1)


class NotBuilt(Section):
    """A published row that this pipeline has no option for."""

    label: Label
    why: str
    scores: dict[str, Percent]


class SweepFile(Section):
    """A sweep as a YAML file says it. Exactly one of `grid` and `members` is given."""

    name: Name | None = None
    title: str = ""
    config: str
    set: dict[str, Any] = Field(default_factory=dict)
    grid: dict[str, tuple[Any, ...]] | None = None
    members: tuple[Member, ...] | None = None
    paper: Paper | None = None
    not_built: tuple[NotBuilt, ...] = ()

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if (self.grid is None) == (self.members is None):
            raise ValueError("write either grid or members")
        if not self.paper:
            return self
        varied = self.points if self.grid is None else points(self.grid)
        for row in self.paper.rows:
            if row.at not in varied:
                raise ValueError(f"paper.rows: no member sets {described(row.at)}; add it to grid or members")
        return self

    @property
    def points(self) -> list[Point]:
        """The points of `members`."""
        return [one.set for one in self.members or ()]


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, of which some are drawn. Whole numbers if both ends are."""

    low: float
    high: float
    logarithmic: bool

    def draw(self, source: random.Random) -> float:
        """Return a number, floats with 4 digits so that they can be read and typed again."""
        low, high = (math.log(self.low), math.log(self.high)) if self.logarithmic else (self.low, self.high)
        drawn = low + (high - low) * source.random()
        value = math.exp(drawn) if self.logarithmic else drawn
        if isinstance(self.low, int) and isinstance(self.high, int):
            return min(self.high, max(self.low, round(value)))
        return float(f"{value:.4g}")


def is_sweep(path: Path) -> bool:
    """Return whether a YAML file says what to vary; otherwise it is a run's configuration."""
    return bool({"grid", "members"} & read_yaml(path).keys())


def read_sweep(path: Path) -> SweepFile:
    """Read a sweep's file. `config` becomes absolute: it starts at the file's folder."""
    document = read_yaml(path)
    try:
        read = SweepFile.model_validate(document)
    except ValidationError as error:
        raise ConfigError("\n".join(dict.fromkeys(_explain(path, one) for one in error.errors()))) from None
    return read.model_copy(update={"config": str(path.parent.resolve() / read.config), "name": read.name or path.stem})


def _explain(path: Path, problem: Any) -> str:
    field = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "value_error":
        return f"{path}: {problem['ctx']['error']}"
    if problem["type"] == "extra_forbidden":
        return f"{path}: {field} is not a field of a sweep; those are {', '.join(SweepFile.model_fields)}"
    if problem["type"] == "missing":
        return f"{path}: {field} is missing"
    return f"{path}: {field} = {problem['input']!r}: {problem['msg']}"


def parse_grid(options: Sequence[str]) -> dict[str, tuple[Any, ...]]:
    """Return the axes that `--grid KEY=V1,V2` options name."""
    axes: dict[str, tuple[Any, ...]] = {}
    for option in options:
        key, equals, text = option.partition("=")
        key, said = key.strip(), f"--grid {option}"
        if not equals or not all(key.split(".")):
            raise ConfigError(f"{said}: write KEY=V1,V2, for example --grid model.mask_ratio=0.4,0.75")
        if key in axes:
            raise ConfigError(f"{said}: {key} has a grid already; write all of its values in one --grid")
        axes[key] = tuple(yaml_value(f"[{text}]", said=said))
    return axes


def points(grid: Mapping[str, Sequence[Any]], *, draws: int | None = None, seed: int = 0) -> list[Point]:
    """Return every combination of the grid's values, or `draws` different ones that the seed decides.

    More draws of one seed begin with the same points, so that a sweep can be made longer. A text such as `0.1..0.9` or
    `log:1e-5..1e-3` is a range, out of which values can only be drawn.
    """
    axes = {key: [_range_or(value, key) for value in values] for key, values in grid.items()}
    if empty := next((key for key, values in axes.items() if not values), None):
        raise ConfigError(f"the grid of {empty} is empty: write at least one value, {empty}=V1,V2")
    if not axes:
        raise ConfigError("nothing varies: add --grid KEY=V1,V2, or give a sweep's file")
    ranges = [key for key, values in axes.items() if any(isinstance(value, Range) for value in values)]
    if ranges and draws is None:
        raise ConfigError(f"{ranges[0]} is a range: add --random N to draw N points out of it, or write its values")
    number = math.prod(map(len, axes.values()))
    if (asked := number if draws is None else draws) > MOST_MEMBERS:
        raise ConfigError(f"a sweep of {asked} members: {MOST_MEMBERS} at most; write fewer values, or --random N")
    if draws is None:
        return list(_combinations(axes))
    if not ranges and draws > number:
        raise ConfigError(f"--random {draws}: the grid has only {number} points; draw fewer, or leave --random out")
    return _drawn(axes, draws, random.Random(seed))  # noqa: S311 - a draw, no secret


def _combinations(axes: Mapping[str, Sequence[Any]]) -> Iterator[Point]:
    return (dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values()))


def _drawn(axes: Mapping[str, Sequence[Any]], draws: int, source: random.Random) -> list[Point]:
    """Draw until there are enough different points."""
    found: list[Point] = []
    for _ in range(1000 * draws):
        chosen = {key: source.choice(values) for key, values in axes.items()}
        point = {key: one.draw(source) if isinstance(one, Range) else one for key, one in chosen.items()}
        if point not in found:
            found.append(point)
        if len(found) == draws:
            return found
    raise ConfigError(f"--random {draws}: the ranges have only about {len(found)} different points; draw fewer")


def _range_or(value: Any, key: str) -> Any:
    """Return the range that a text names, or the value itself."""
    if not isinstance(value, str) or not (written := _RANGE.fullmatch(value)):
        return value
    try:
        low, high = (int(end) if end.lstrip("+-").isdecimal() else float(end) for end in written.groups()[1:])
    except ValueError:
        return value  # a text that only looks like one; the field's own check sees it
    if not low < high or (written[1] and low <= 0):
        least = "0 < low < high" if written[1] else "low < high"
        raise ConfigError(f"{key}={value}: a range needs {least}")
    return Range(low, high, logarithmic=bool(written[1]))


def described(point: Point) -> str:
    """Return what a point sets in one line, `mask_ratio=0.4 decoder.depth=2`."""
    return " ".join(f"{short}={text_of(point[key])}" for key, short in short_names(point).items()) or "as configured"


def text_of(value: Any) -> str:
    """Return a value as a label shows it."""
    if isinstance(value, Mapping):
        return ",".join(f"{key}:{text_of(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return "x".join(map(text_of, value))
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def short_names(keys: Sequence[str] | Point) -> dict[str, str]:
    """Return the shortest ending of each dotted field that no other one shares."""

    def ending(key: str, parts: int) -> str:
        return ".".join(key.split(".")[-parts:])

    found = {}
    for key in keys:
        lengths = range(1, key.count(".") + 2)
        found[key] = next(
            (ending(key, n) for n in lengths if sum(ending(one, n) == ending(key, n) for one in keys) == 1), key
        )
    return found
