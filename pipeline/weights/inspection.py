"""What a weight file or folder holds, as it is understood here, and its conversion into our own format.

Errors: those of `imports` for weights that are not understood."""

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from mae_core.config import MAEConfig, size_name
from mae_core.interop import detect_layout
from pipeline.errors import ConfigError
from pipeline.graph.step import canonical
from pipeline.storage import FileStore, Store
from pipeline.weights.exports import Origin, export_autoencoder, export_encoder
from pipeline.weights.foreign import read_foreign_weights
from pipeline.weights.imports import OWN_LAYOUT, ImportReport
from pipeline.weights.own import CLASSIFIER, CONFIG, read_classifier, weights_digest
from pipeline.weights.reading import ImportedWeights, import_weights, own_or_given

Kind = Literal["encoder", "autoencoder", "classifier"]
REPORT = "import.json"
"""What was imported and how, beside the weights."""
_HEADS = ("head.weight", "classifier.weight")


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What weights are. Its fields are the keys of `mae model inspect --json`."""

    source: str
    kind: Kind
    layout: str
    size: str
    """`ViT-B/16`; empty if the encoder is not understood."""
    config: Mapping[str, Any]
    """As understood: the fields of ViTConfig below `encoder`, those of an autoencoder beside it."""
    assumed: tuple[str, ...]
    left_out: tuple[str, ...]
    notes: tuple[str, ...]
    tensors: int
    """In the file, whether or not they are imported, as `parameters` and `dtypes`."""
    parameters: int
    dtypes: Mapping[str, int]
    """Type -> tensors."""
    norm: float
    """Euclidean norm over all weights that are imported, or over the file's if none are."""
    sha256: str
    """Of what is imported; empty if nothing is."""
    problem: str = ""
    """Why the encoder cannot be imported by itself."""

    def lines(self) -> list[str]:
        """Return all of it as text."""
        dtypes = ", ".join(f"{count} {name}" if len(self.dtypes) > 1 else name for name, count in self.dtypes.items())
        encoder = self.config.get("encoder", {})
        rows = {
            "kind": f"{self.kind}{f', {self.size}' * bool(self.size)}",
            "layout": self.layout,
            "parameters": f"{self.parameters:,} in {self.tensors} tensors, {dtypes}",
            "norm": f"{self.norm:.4g}",
            "sha256": self.sha256,
            "encoder": _fields(encoder),
            "decoder": _fields({name: value for name, value in self.config.items() if name != "encoder"}),
            "assumed": ", ".join(self.assumed) or "nothing",
            "left out": f"{', '.join(self.left_out[:6])}{f' and {len(self.left_out) - 6} more' * (len(self.left_out) > 6)}"
            or "nothing",
            "problem": self.problem,
        }
        return [self.source, *(f"  {name:<11} {text}" for name, text in rows.items() if text), *self.notes]

    def as_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def inspect_weights(path: Path, *, source: str, prefix: str | None = None, **options: Any) -> Inspection:
    """Read weights and say what they are. `options`: those of import_autoencoder."""
    if (path / CLASSIFIER).is_file() and (path / CONFIG).is_file():
        config, classes, weights = read_classifier(FileStore(path.absolute()))
        report = ImportReport(source, OWN_LAYOUT, (), (), (f"{len(classes)} classes: {', '.join(classes[:10])}",))
        imported = ImportedWeights(config=config, weights=weights, report=report)
        return _inspection(source, "classifier", weights, imported)
    found = read_foreign_weights(own_or_given(path), prefix=prefix)
    # a head lies outside the encoder's prefix in Hugging Face's files
    names = (*found.state_dict, *found.left_out)
    classifies = any(name.endswith(_HEADS) and not name.startswith("decoder.") for name in names)
    try:
        imported = import_weights(path, prefix=prefix, **options)
    except ConfigError as cause:
        # A classifier's encoder may not stand alone: without its last norm, say.
        if not classifies:
            raise
        return Inspection(
            source=source,
            kind="classifier",
            layout=detect_layout(found.state_dict),
            size="",
            config={},
            assumed=(),
            left_out=found.left_out,
            notes=found.notes,
            **_measured(found.state_dict, found.state_dict),
            sha256="",
            problem=str(cause),
        )
    kind: Kind = "autoencoder" if imported.whole else "classifier" if classifies else "encoder"
    return _inspection(source, kind, found.state_dict, imported)


def _fields(config: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in config.items())


def _inspection(source: str, kind: Kind, stored: Mapping[str, Tensor], imported: ImportedWeights) -> Inspection:
    report, config = imported.report, canonical(imported.config)
    return Inspection(
        source=source,
        kind=kind,
        layout=report.layout,
        size=size_name(imported.encoder),
        config=config if imported.whole else {"encoder": config},
        assumed=report.assumed,
        left_out=report.left_out,
        notes=report.notes,
        **_measured(stored, imported.weights),
        sha256=weights_digest(imported.weights),
    )


def _measured(stored: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Any]:
    squares = (float(value.double().square().sum()) for value in weights.values() if value.is_floating_point())
    return {
        "tensors": len(stored),
        "parameters": sum(value.numel() for value in stored.values()),
        "dtypes": dict(Counter(str(value.dtype).removeprefix("torch.") for value in stored.values())),
        "norm": math.sqrt(sum(squares)),
    }


def convert_weights(
    path: Path, store: Store, *, source: str, prefix: str | None = None, **options: Any
) -> tuple[str, ...]:
    """Write weights in our own format, with a report of what was imported; return the keys of the files."""
    imported = import_weights(path, prefix=prefix, **options)
    report = imported.report
    digest = weights_digest(imported.weights)
    body = {
        "source": source,
        "layout": report.layout,
        "kind": "autoencoder" if imported.whole else "encoder",
        "left_out": list(report.left_out),
        "assumed": list(report.assumed),
        "notes": list(report.notes),
        "sha256": digest,
    }
    store.write(REPORT, json.dumps(body, indent=1).encode())
    lines = [f"Imported from `{Path(source).name}` (layout {report.layout}), sha256 of the tensors `{digest}`."]
    lines += [f"Assumed, because the file does not state it: {', '.join(report.assumed)}."] if report.assumed else []
    origin = Origin(sections={"Lineage": "\n".join(lines)})
    if isinstance(imported.config, MAEConfig):
        files = export_autoencoder(store, imported.weights, imported.config, to="safetensors", origin=origin)
    else:
        files = export_encoder(store, imported.weights, imported.config, to="safetensors", origin=origin)
    return REPORT, *files
