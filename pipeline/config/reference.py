"""The reference of the configuration: every field with its type, its default and its meaning, read from the code.

Meanings are the docstrings below the fields: pydantic keeps those of its models, and those of dataclasses are read from
their source files. Nothing is written twice, so `mae config` and the documentation's page cannot lag behind."""

import ast
import dataclasses
import inspect
import json
import textwrap
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from mae_core.config import SIZES, MAEConfig, ViTConfig
from pipeline.config.fields import DatasetConfig, RunConfig

REQUIRED = "required"
FROM_SIZE = "from model.size"
TYPE_NAMES: Mapping[Any, str] = {
    int: "whole number", float: "number", bool: "true or false", str: "text", type(None): "null",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class FieldReference:
    """One field as a user writes it."""

    name: str
    """With its sections: `pretrain.epochs`. `*` stands for the number of a list's element."""
    type: str
    default: str
    """As YAML, `required`, or `from model.size`. Empty for a section."""
    meaning: str
    section: bool
    """Whether the field holds further fields, which follow it."""


def field_references() -> list[FieldReference]:
    """Return every field of a run's configuration, sections before their fields."""
    return list(_fields(RunConfig, ""))


def attribute_docstrings(kind: type) -> dict[str, str]:
    """Return the docstrings below the fields of a class and its bases, by field."""
    found: dict[str, str] = {}
    # bases first, so that a class may describe an inherited field in its own words
    for one in reversed(kind.__mro__[:-1]):
        if not dataclasses.is_dataclass(one):
            continue
        # from the source: Python drops these strings, and pydantic reads them in the same way
        body = ast.parse(textwrap.dedent(inspect.getsource(one))).body[0]
        statements = body.body if isinstance(body, ast.ClassDef) else []
        for field, text in pairwise(statements):
            match field, text:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=meaning)):
                    found[name] = " ".join(str(meaning).split())
    return found


def _fields(kind: type, prefix: str) -> Iterator[FieldReference]:
    if kind is MAEConfig:
        choices = " | ".join(SIZES)
        meaning = "A named size of the encoder. Fields of `encoder` that are given as well override it."
        yield FieldReference(name=f"{prefix}size", type=choices, default="base", meaning=meaning, section=False)
    for name, annotation, default, meaning in _declared(kind):
        inner = _section_of(annotation)
        optional = type(None) in get_args(annotation)
        yield FieldReference(
            name=prefix + name,
            type=_type_name(annotation),
            default="null" if optional and default is None else _default_text(kind, default, is_section=bool(inner)),
            meaning=meaning or (inspect.cleandoc(inner.__doc__ or "") if inner else ""),
            section=bool(inner),
        )
        if inner:
            yield from _fields(inner, f"{prefix}{name}.{'*.' if _is_list(annotation) else ''}")


def _declared(kind: Any) -> Iterator[tuple[str, Any, Any, str]]:
    """Yield (name, type, default, meaning) of the fields that a section declares."""
    if issubclass(kind, BaseModel):
        for name, info in kind.model_fields.items():
            default = info.get_default(call_default_factory=True)
            yield (
                name,
                info.annotation,
                dataclasses.MISSING if default is PydanticUndefined else default,
                " ".join((info.description or "").split()),
            )
        return
    hints, texts = get_type_hints(kind, include_extras=False), attribute_docstrings(kind)
    for field in dataclasses.fields(kind):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        yield field.name, hints[field.name], default, texts.get(field.name, "")


def _is_list(annotation: Any) -> bool:
    return get_origin(annotation) is tuple


def _section_of(annotation: Any) -> type | None:
    """Return the class whose fields a value of this type has, or None for a plain value."""
    if isinstance(annotation, type) and (issubclass(annotation, BaseModel) or dataclasses.is_dataclass(annotation)):
        return annotation
    return next((inner for one in get_args(annotation) if (inner := _section_of(one))), None)


def _type_name(annotation: Any) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_name(inner[0])
    if origin is Literal:
        return " | ".join(map(str, inner))
    if origin is tuple:
        return f"list of {_type_name(inner[0])}" if inner[-1] is ... else f"[{', '.join(map(_type_name, inner))}]"
    if origin in (Union, types.UnionType):
        return " or ".join(map(_type_name, inner))
    if _section_of(annotation):
        return "section"
    return TYPE_NAMES.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _default_text(kind: type, default: Any, *, is_section: bool) -> str:
    """Return a default as YAML. A section has none of its own: its fields have."""
    if default is dataclasses.MISSING:
        return "" if is_section else FROM_SIZE if kind is ViTConfig else REQUIRED
    if isinstance(default, tuple):
        values = (f"{{name: {one.name}}}" if isinstance(one, DatasetConfig) else _plain(one) for one in default)
        return f"[{', '.join(values)}]"
    return "" if is_section else _plain(default)


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, str):
        # quoted where YAML would read something else, such as a number
        return value if yaml.safe_load(value) == value else json.dumps(value)
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
