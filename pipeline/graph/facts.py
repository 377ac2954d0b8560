"""Facts: the small values that a step leaves in its receipt, typed as a frozen dataclass.

A stage's facts are declared next to the service that reads them (`pipeline.data.dataset.facts`, `pipeline.training.facts`),
so that readers need not import the stage. In the receipt they are plain JSON. Two rules keep old receipts readable: a field
that is None does not apply and is left out, and a field that this version does not know is ignored."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from pydantic import TypeAdapter, ValidationError

from pipeline.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Base class of all facts."""

    @classmethod
    def read(cls, facts: Mapping[str, Any]) -> Self:
        """Read them from a receipt. Raises DataError if a field is missing or has the wrong type."""
        try:
            # dict(): a receipt may be any mapping, and pydantic takes only dicts for a dataclass
            read: Self = _adapter(cls).validate_python(dict(facts))
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"])
            raise DataError(
                f"a receipt's {cls.__name__} cannot be read: {field}: {first['msg']}. Delete the step's receipt.json, and the "
                "same command runs that step again"
            ) from error
        return read

    def as_json(self) -> dict[str, Any]:
        """Return the facts as plain JSON values, without the fields that are None."""
        values: dict[str, Any] = _adapter(type(self)).dump_python(self, mode="json")
        return {name: value for name, value in values.items() if value is not None}


_ADAPTERS: dict[type[Any], TypeAdapter[Any]] = {}


def _adapter(kind: type[Any]) -> TypeAdapter[Any]:
    if kind not in _ADAPTERS:  # cached: building one takes about a millisecond
        _ADAPTERS[kind] = TypeAdapter(kind)
    return _ADAPTERS[kind]
