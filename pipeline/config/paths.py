"""Relative paths: those in a YAML file start at its folder; those of `--set`, options and defaults at the working directory.

A file thus means the same from wherever a command is started. Addresses with a scheme, `~` and `$VARIABLE` are left as they
are. What is no address at all is left for the fields' own checks to refuse."""

import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.config.fields import RunConfig, Section
from pipeline.storage import expand_address

log = logging.getLogger(__name__)

_FIELDS = {
    "": ("store",),
    "data": ("source", "labels"),
    "pretrain": ("start",),
    "resources": ("cache_directory",),
    "tracking": ("uri",),
    "weights": ("file",),
}
_SQLITE = "sqlite:///"


def resolve_paths(document: Any, folder: Path) -> None:
    """Make the relative paths of a document absolute, in place. `folder`: where they start."""
    for field, section, name in _written(document):
        prefix = _SQLITE if section[name].startswith(_SQLITE) else ""
        text = section[name].removeprefix(prefix)
        # in tracking.uri only a SQLite address holds a path; its own checks refuse a bare one
        if not _is_relative(text) or (name == "uri") != bool(prefix):
            continue
        path = folder / text
        section[name] = f"{prefix}{path}"
        if not path.exists() and (Path.cwd() / text).exists():
            log.warning(
                "%s: a relative path in a YAML file starts at the file's folder, so this is %s, which does not exist. For %s write "
                "its absolute path, or --set %s=%s",
                *(f"{field}: {text}", path, Path.cwd() / text, field, text),
            )


def with_absolute_addresses(config: RunConfig) -> RunConfig:
    """Make local addresses absolute, because steps run in other processes with other working directories."""
    datasets = tuple(one.model_copy(update=_absolute(one, "source", "labels")) for one in config.evaluation.datasets)
    start = config.pretrain.start
    return config.model_copy(
        update={
            "store": absolute_address(config.store),
            "data": config.data.model_copy(update=_absolute(config.data, "source", "labels")),
            "pretrain": replace(config.pretrain, start=start and absolute_address(expand_address(start))),
            "evaluation": config.evaluation.model_copy(update={"datasets": datasets}),
            "weights": config.weights and config.weights.model_copy(update=_absolute(config.weights, "file")),
        }
    )


def _absolute(section: Section, *names: str) -> dict[str, str]:
    return {name: absolute_address(address) for name in names if (address := getattr(section, name)) is not None}


def absolute_address(address: str) -> str:
    """Return a local path as absolute, and an address with a scheme without its trailing slash."""
    return address.rstrip("/") if "://" in address else str(Path(address).expanduser().absolute())


def _written(document: Any) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yield every address that the document holds: the field's dotted name, its section and its name in that section."""
    sections = {place: document if not place else _get(document, place) for place in _FIELDS}
    names = dict(_FIELDS)
    datasets = _get(_get(document, "evaluation"), "datasets")
    for number, dataset in enumerate(datasets if isinstance(datasets, list) else []):
        place = f"evaluation.datasets.{number}"
        sections[place], names[place] = dataset, ("source", "labels")
    for place, section in sections.items():
        for name in names[place]:
            if isinstance(_get(section, name), str):
                yield f"{place}.{name}".lstrip("."), section, name


def _get(section: Any, name: str) -> Any:
    return section.get(name) if isinstance(section, dict) else None


def _is_relative(text: str) -> bool:
    # also `s3:/bucket`, whose missing slash is better reported than joined to a folder
    has_scheme = "://" in text or re.match(r"[a-z0-9]+:/", text)
    return bool(text.strip()) and not has_scheme and not text.startswith(("/", "~", "$", ":"))
