"""Facts: the small values that a step leaves in its receipt, as a frozen dataclass that its readers import.

A stage declares its facts beside the service that its readers use (`pipeline.data.dataset.facts`, `pipeline.training.facts`, ...).
In the receipt they are plain JSON. A field that is None does not apply and is left out, so that a new optional field changes no
receipt of an older step; a field that this version does not know is ignored."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from pydantic import TypeAdapter, ValidationError

from pipeline.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Base of all facts."""

    @classmethod
    def read(cls, facts: Mapping[str, Any]) -> Self:
        """Read them from a receipt. Raises DataError where a field is missing or has another type."""
        try:
            read: Self = _adapter(cls).validate_python(dict(facts))
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"])
            raise DataError(
                f"a receipt's {cls.__name__} cannot be read: {field}: {first['msg']}. Delete the step's receipt.json, and the "
                "same command runs the step again"
            ) from error
        return read

    def as_json(self) -> dict[str, Any]:
        """Return them as plain JSON values, without the fields that are None."""
        values: dict[str, Any] = _adapter(type(self)).dump_python(self, mode="json")
        return {name: value for name, value in values.items() if value is not None}


_ADAPTERS: dict[type[Any], TypeAdapter[Any]] = {}


def _adapter(kind: type[Any]) -> TypeAdapter[Any]:
    if kind not in _ADAPTERS:  # building one takes a millisecond
        _ADAPTERS[kind] = TypeAdapter(kind)
    return _ADAPTERS[kind]
