"""The run that evaluates somebody's weights on somebody's images: its configuration follows from the weights and a few options.

Errors: ConfigError for an option or a protocol that cannot be; those of reading weights."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError

from pipeline.config import RunConfig, absolute_address, config_from
from pipeline.errors import ConfigError
from pipeline.evaluation.protocols import PROTOCOL_NAMES
from pipeline.weights import GivenWeights, StatedFields, read_given

FROZEN = ("knn", "ridge", "linear", "rankme")
"""Protocols where none are named: those on features that are computed once."""
ALL = "all"
_ENCODER_FIELD = re.compile(r"model\.encoder\.(\w+)=(.*)", re.DOTALL)


class Evaluation(NamedTuple):
    """A run that is ready to start, and the weights that it is about."""

    given: GivenWeights
    config: RunConfig


def evaluation_of(
    weights: Path,
    data: str,
    *,
    protocols: str = "",
    store: str = "",
    prefix: str | None = None,
    options: Mapping[str, str | int | float | None] | None = None,
    overrides: Sequence[str] = (),
) -> Evaluation:
    """Read the weights and return the configuration of their evaluation.

    `protocols`: names with commas between them, `all`, or nothing for those on frozen features. `options`: fields of the encoder
    that the file does not state or states wrongly, as a person writes them. `overrides`: as of --set."""
    given = read_given(weights, stated_fields(options or {}, overrides), prefix=prefix)
    encoder = dataclasses.asdict(given.config)
    document: dict[str, Any] = {
        "name": re.sub(r"[^A-Za-z0-9._-]", "-", weights.absolute().name)[:64],
        "data": {"source": data},
        "model": {"encoder": {key: list(v) if isinstance(v, tuple) else v for key, v in encoder.items()}},
        "weights": {
            "file": absolute_address(str(weights)),
            "sha256": given.facts.sha256,
            "prefix": prefix,
            "assumed": list(given.report.assumed),
        },
        "evaluation": {
            "datasets": [
                {
                    "name": _short_name(data),
                    "protocols": list(protocols_named(protocols, given)),
                }
            ]
        },
    }
    if store:
        document["store"] = store
    config = config_from(document, list(overrides), command="mae evaluate")
    if config.model.encoder != given.config:
        raise ConfigError(
            "--set model.encoder: the encoder's form is that of the weights. Correct what was understood of them with --num-heads, "
            "--image-size, --layer-norm-eps, --pixel-mean or --pixel-std"
        )
    return Evaluation(given, config)


def protocols_named(text: str, given: GivenWeights) -> tuple[str, ...]:
    """Return the protocols that an option names."""
    if not text:
        return FROZEN
    if text == ALL:
        return tuple(name for name in PROTOCOL_NAMES if name != "own_head" or given.head)
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if unknown := [name for name in names if name not in PROTOCOL_NAMES]:
        raise ConfigError(f"--protocols {text}: {unknown[0]} is unknown: write {', '.join((ALL, *PROTOCOL_NAMES))}")
    if "own_head" in names and given.head is None:
        raise ConfigError(f"--protocols {text}: {given.report.source} has no classification head: leave own_head out")
    return names


def stated_fields(options: Mapping[str, str | int | float | None], overrides: Sequence[str] = ()) -> StatedFields:
    """Return the encoder's fields that a person states, as options or as `--set model.encoder.<field>=<value>`."""
    found: dict[str, Any] = {}
    for override in overrides:
        match = _ENCODER_FIELD.fullmatch(override)
        if match and match[1] in StatedFields.model_fields:
            found[match[1]] = yaml.safe_load(match[2])
    for name, value in options.items():
        if value is not None:
            found[name] = _numbers(value) if isinstance(value, str) else value
    if isinstance(size := found.get("image_size"), list | int):
        found["image_size"] = [size, size] if isinstance(size, int) else size * 2 if len(size) == 1 else size
    try:
        return StatedFields.model_validate(found)
    except ValidationError as error:
        field = str(error.errors()[0]["loc"][0])
        raise ConfigError(
            f"--{field.replace('_', '-')} {options.get(field, found[field])}: write {_WRITTEN.get(field, 'a number')}"
        ) from error


_WRITTEN = {
    "image_size": "pixels, as 224 or 224x448 (height x width)",
    "pixel_mean": "one number per channel on the scale 0..1, as 0.485,0.456,0.406",
    "pixel_std": "one number per channel on the scale 0..1, as 0.229,0.224,0.225",
}


def _numbers(text: str) -> list[Any]:
    return [yaml.safe_load(part) for part in re.split(r"[,x]", text)]


def _short_name(source: str) -> str:
    """Return a data set's name in tables, from its address."""
    last = source.rstrip("/").rpartition("/")[2].lower()
    return re.sub(r"[^a-z0-9_-]", "-", last).lstrip("-_")[:32] or "data"
