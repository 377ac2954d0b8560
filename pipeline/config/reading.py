"""Read a YAML file and --set overrides into one validated, frozen RunConfig, before anything starts.

Unknown fields, wrong types and impossible values are refused with a ConfigError of one line per field: where it was written, its
name, its value, and what to write instead (docs/decisions/017-no-omegaconf.md)."""

import copy
import dataclasses
import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel, ValidationError

from mae_core.config import MAEConfig
from pipeline.cluster.resources import WORKERS_HINT
from pipeline.config.document import read_yaml, set_field, yaml_value
from pipeline.config.fields import PATTERN_MEANINGS, DatasetConfig, RunConfig
from pipeline.config.paths import resolve_paths, with_absolute_addresses
from pipeline.errors import ConfigError


def load_config(
    path: Path,
    overrides: Sequence[str] = (),
    *,
    changes: Mapping[str, Any] = MappingProxyType({}),
    changed_by: str = "",
) -> RunConfig:
    """Read a YAML file, apply `a.b=value` overrides and validate. Local paths become absolute.

    `changes`: values by dotted field, which win over everything else; errors say that they come from `changed_by`."""
    document, overridden = _read_and_override(path, overrides)
    for dotted, value in changes.items():
        set_field(document, dotted, copy.deepcopy(value), said=f"{changed_by}: {dotted}")
        overridden[dotted] = changed_by
    resolve_paths(document, Path.cwd())
    return _validated(document, overridden, written_in=str(path))


def config_from(document: dict[str, Any], overrides: Sequence[str], *, command: str) -> RunConfig:
    """Validate a document that a command made, with `a.b=value` overrides. Errors of its own fields name the command."""
    overridden = {_override(document, override): "--set" for override in overrides}
    resolve_paths(document, Path.cwd())
    return _validated(document, overridden, written_in=command)


def _validated(document: dict[str, Any], overridden: Mapping[str, str], *, written_in: str) -> RunConfig:
    """`overridden`: where a field was written that is not of `written_in`."""
    try:
        config = RunConfig.model_validate(document)
    except ValidationError as error:
        problems = [_explain(problem) for problem in error.errors()]
    else:
        problems = list(_booleans_for_numbers(document, config))
    if problems:
        # pydantic reports a union once per member; the first line of each field is enough
        lines = {
            field: f"{_origin(field, overridden, written_in)}: {field}{text}" for field, text in reversed(problems)
        }
        raise ConfigError("\n".join(reversed(lines.values())))
    return with_absolute_addresses(config).written_with(
        sorted(overridden, key=lambda dotted: overridden[dotted] == "--set")
    )


def read_document(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a YAML file and apply `a.b=value` overrides, without validation. Relative paths become absolute."""
    return _read_and_override(path, overrides)[0]


def _read_and_override(path: Path, overrides: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the document, and where each overridden field was written."""
    document = read_yaml(path)
    # twice: the file's paths start at its folder, those of overrides at the working directory
    resolve_paths(document, path.parent.resolve())
    overridden = {_override(document, override): "--set" for override in overrides}
    resolve_paths(document, Path.cwd())
    return document, overridden


def _origin(field: str, overridden: Mapping[str, str], written_in: str) -> str:
    """Where a field was written: with what it, its section or one of its own fields was overridden, or else the file."""
    for dotted, origin in reversed(list(overridden.items())):
        if any(f"{inner}.".startswith(f"{outer}.") for inner, outer in ((field, dotted), (dotted, field))):
            return origin
    return written_in


def _override(document: dict[str, Any], override: str) -> str:
    """Write one `a.b=value` (or `a.0.b=value` for a list's element) into the document. Returns `a.b`."""
    dotted, equals, text = override.partition("=")
    dotted = dotted.strip()
    if not equals or not all(dotted.split(".")):
        raise ConfigError(f"--set {override}: write field=value, for example --set pretrain.epochs=100")
    set_field(document, dotted, yaml_value(text, said=f"--set {override}"), said=f"--set {override}")
    return dotted


_MESSAGES: Mapping[str, str] = {
    "int_type": "is not a whole number",
    "int_parsing": "is not a whole number",
    "int_from_float": "is not a whole number",
    "float_type": "is not a number",
    "float_parsing": "is not a number",
    "finite_number": "is not a finite number",
    "string_type": "is not text: write it in quotes",
    "string_too_short": "is empty: write a name",
    "bool_type": "is not true or false",
    "bool_parsing": "is not true or false",
    "tuple_type": "is not a list: write [a, b]",
    "too_long": "has too many values: {max_length} at most",
    "literal_error": "is unknown: write {expected}",
    "greater_than": "is too small: write more than {gt}",
    "greater_than_equal": "is too small: write {ge} or more",
    "less_than": "is too large: write less than {lt}",
    "less_than_equal": "is too large: write {le} or less",
    "model_type": "is not a section: write its fields below it",
    "dataclass_type": "is not a section: write its fields below it",
}
"""What to say for each of pydantic's error types. Braces are filled from the error's context."""


def _explain(problem: Any) -> tuple[str, str]:
    """Put one of pydantic's errors into words: ("pretrain.epochs", " = 'three' is not a whole number")."""
    # pydantic appends the member of a union to the location; only numbers of workers are unions that reach this line
    union = next((i for i, part in enumerate(problem["loc"]) if str(part).startswith(("tuple[", "int"))), None)
    location = [str(part) for part in problem["loc"][:union] if not str(part).startswith("function-")]
    field, kind = ".".join(location), problem["type"]
    if union is not None:
        return field, f" = {problem['input']!r}: {WORKERS_HINT}"
    if kind in ("extra_forbidden", "unexpected_keyword_argument", "invalid_key"):
        known = _known_fields(problem["loc"][:-1])
        near = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the fields here are {', '.join(known)}"
        return field, f" is not a field; {hint}"
    if kind == "missing":
        if location[-1].isdecimal():
            return ".".join(location[:-1]), f" = {list(problem['input'])} has too few values"
        return field, f" is missing; add it, or --set {field}=..."
    if kind == "value_error":
        return _from_own_validator(location, str(problem["ctx"]["error"]))
    if problem["input"] is None:
        return field, " is empty: give it a value, or leave it out"
    meaning = PATTERN_MEANINGS.get(problem["ctx"]["pattern"]) if kind == "string_pattern_mismatch" else None
    text = f"is not usable: write {meaning}" if meaning else _MESSAGES.get(kind, problem["msg"])
    return field, f" = {problem['input']!r} {text.format_map(problem.get('ctx', {}))}"


def _from_own_validator(location: Sequence[str], message: str) -> tuple[str, str]:
    """Our validators write `name=value ...` about one of their fields; that name is appended to the location."""
    named = re.match(r"([a-z_]+(?:\.[a-z_]+)*)(=.*)", message, re.DOTALL)
    if not named:
        return ".".join(location), f": {message}" if not message.startswith("is ") else f" {message}"
    outer = location[:-1] if location and location[-1] == named[1] else location
    return ".".join([*outer, named[1]]), named[2].replace("=", " = ", 1)


def _booleans_for_numbers(value: Any, read: Any, field: str = "") -> Iterator[tuple[str, str]]:
    """Find booleans that became numbers: `epochs: yes` is true in YAML and 1 in pydantic, and neither was meant."""
    if isinstance(value, bool) and not isinstance(read, bool):
        yield field, f" = {value} is not a number: YAML reads yes, no, on, off as true or false"
    pairs: Iterator[tuple[Any, Any]] = iter(())
    if isinstance(value, Mapping):
        pairs = ((key, (item, getattr(read, key, None))) for key, item in value.items())
    elif isinstance(value, list):
        pairs = ((index, (item, read[index])) for index, item in enumerate(value))
    for key, (item, inner) in pairs:
        yield from _booleans_for_numbers(item, inner, f"{field}.{key}" if field else str(key))


def _known_fields(location: Sequence[Any]) -> list[str]:
    """Names of the fields in the section at `location`."""
    kind: Any = RunConfig
    for part in location:
        if isinstance(part, int):
            kind = DatasetConfig
        elif isinstance(kind, type) and issubclass(kind, BaseModel):
            kind = kind.model_fields[part].annotation
        elif dataclasses.is_dataclass(kind):
            kind = next(field.type for field in dataclasses.fields(kind) if field.name == part)
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return list(kind.model_fields)
    if dataclasses.is_dataclass(kind):
        return [field.name for field in dataclasses.fields(kind)] + (["size"] if kind is MAEConfig else [])
    return []
