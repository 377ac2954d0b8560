"""A YAML file as plain mappings and lists: a repeated key is refused, and a value is written under a dotted name.

Errors: ConfigError with the file and its line, or the option that a value came from."""

from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import ConfigError


class _UniqueKeys(yaml.SafeLoader):
    """Safe YAML in which a repeated key is an error; PyYAML would silently take the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002 - PyYAML's
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key is not a name", key_node.start_mark)
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key_node.value!r} is written twice", key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping. Raises ConfigError for any other file."""
    try:
        document = yaml.load(path.read_text(), Loader=_UniqueKeys)  # noqa: S506 - a SafeLoader
    except (OSError, UnicodeDecodeError) as cause:
        reason = cause.strerror if isinstance(cause, OSError) else "it is not text"
        raise ConfigError(f"{path}: cannot be read ({reason}). Give the path of a YAML file") from cause
    except yaml.YAMLError as cause:
        where = getattr(cause, "problem_mark", None)
        line = f":{where.line + 1}" if where else ""
        raise ConfigError(f"{path}{line}: not YAML ({getattr(cause, 'problem', cause)}). Correct that line") from cause
    if not isinstance(document, dict):
        found = "is empty" if document is None else f"holds a {type(document).__name__}"
        raise ConfigError(f"{path}: {found}: write a mapping of fields such as data, model, pretrain")
    return document


def yaml_value(text: str, *, said: str) -> Any:
    """Return the value that a command line gives as YAML. `said`: how an error begins."""
    try:
        return yaml.load(text, Loader=_UniqueKeys)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as cause:
        raise ConfigError(f"{said}: {text!r} is not a YAML value") from cause


def set_field(document: dict[str, Any], dotted: str, value: Any, *, said: str) -> None:
    """Write a value under `a.b` (or `a.0.b` for a list's element) into the document. `said`: how an error begins."""
    parts = dotted.split(".")
    section: Any = document
    for depth, part in enumerate(parts):
        key: Any = part
        if isinstance(section, list) and part.isdecimal() and int(part) < len(section):
            key = int(part)
        elif not isinstance(section, dict):
            parent = ".".join(parts[:depth])
            raise ConfigError(f"{said}: {parent} is {section!r} and has no {part}; set {parent} as a whole")
        # a section that the file leaves out or leaves empty
        if key is part and section.get(key) is None:
            section[key] = {}
        outer, section = section, section[key]
    outer[key] = value
