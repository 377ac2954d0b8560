"""Weights of a finished step in another program's format, with their model card: an encoder, an autoencoder or a classifier.

Errors: DataError if there is no such step; ConfigError for a format that does not fit what it holds."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from pydantic import TypeAdapter
from torch import Tensor

from mae_core.config import ViTConfig
from pipeline.config import RunConfig
from pipeline.data.dataset.facts import DatasetFacts
from pipeline.errors import ConfigError, DataError
from pipeline.graph.receipts import Receipt, claims, read_receipt
from pipeline.runs.finished.cards import Described, Finished, origin_of
from pipeline.runs.finished.pretrainings import Pretraining, checkpoint_at, pretraining_at, pretraining_of
from pipeline.runs.workflow import build
from pipeline.storage import Store, open_store
from pipeline.weights import (
    CLASSIFIER,
    Origin,
    export_autoencoder,
    export_classifier,
    export_encoder,
    export_onnx,
    read_weights,
)

Format = Literal["timm", "hf-vit", "hf-vitmae", "safetensors", "onnx"]


@dataclass(frozen=True)
class FinishedClassifier:
    """A finished evaluation step that trained a classifier."""

    root: Store
    receipt: Receipt

    @property
    def encoder(self) -> ViTConfig:
        """Its encoder's config."""
        return TypeAdapter(ViTConfig).validate_python(self.receipt.identity["config"]["encoder"])

    def weights(self) -> dict[str, Tensor]:
        """Return the weights by names of Classifier."""
        return read_weights(self.receipt.as_input(self.root.uri).store, CLASSIFIER)

    def classes(self, finished: Finished) -> tuple[str, ...]:
        """Return the names of its classes, which its dataset's receipt has."""
        found = finished.step(self.receipt.identity["inputs"]["shards"])
        if found is None:
            raise DataError(
                f"{self.root.uri}: its shards are not in {finished.store.uri}, so its classes have no names"
            )
        return DatasetFacts.read(found[1].facts).classes


class Exported(NamedTuple):
    """What was written."""

    files: tuple[str, ...]
    notes: tuple[str, ...] = ()
    """What was checked, for people."""


def source_of(config: RunConfig, step: str | None) -> Pretraining | FinishedClassifier:
    """Return what to export of a configuration: its pretraining, or the classifier of the step of this name."""
    if step is None:
        return pretraining_of(config)
    steps = {one.name: one for one in build(config) if one.kind in ("pretrain", "evaluate")}
    if step not in steps:
        raise ConfigError(f"--step {step}: the run has {', '.join(steps)}")
    if steps[step].kind == "pretrain":
        return pretraining_of(config)
    return _classifier(open_store(config.store).at(steps[step].directory))


def source_at(address: str, step: str | None) -> Pretraining | FinishedClassifier:
    """Return what to export of a step's directory, or of a run's store."""
    store = open_store(address)
    if step is not None:
        directories = Finished.of(store).named(step)
        if len(directories) != 1:
            found = (
                f"several steps {step}: {', '.join(sorted(directories))}" if directories else f"no finished step {step}"
            )
            raise DataError(f"{store.uri} holds {found}. Give the YAML file of a run, or the directory of one step")
        store = store.at(directories[0])
    receipt = read_receipt(store) if claims(store) else None
    return _classifier(store) if receipt and receipt.kind == "evaluate" else pretraining_at(store.uri)


def _classifier(root: Store) -> FinishedClassifier:
    receipt = read_receipt(root)
    if receipt is None:
        raise DataError(f"{root.uri} is not finished: `mae run` finishes it")
    if CLASSIFIER not in {file.key for file in receipt.files}:
        raise DataError(
            f"{root.uri} is a {receipt.step} step, which keeps no classifier. Those of finetune, partial and scratch do; for the "
            "encoder, give the pretrain step"
        )
    return FinishedClassifier(root, receipt)


def export(
    out: Store,
    source: Pretraining | FinishedClassifier,
    *,
    at: int | None,
    to: Format,
    name: str = "",
    terms: str | None = None,
) -> Exported:
    """Write weights into an empty folder. `name`: of the run, for the card; `terms`: those of the data."""
    existing = next(out.list(), None)
    if existing:
        raise ConfigError(f"--out {out.uri} is not empty (it holds {existing.key}): name a new folder")
    finished = Finished.of(open_store(source.root.uri.rpartition("/")[0]))
    if isinstance(source, FinishedClassifier):
        if at is not None or to == "hf-vitmae":
            what = f"--at {at}" if at is not None else f"--format {to}"
            raise ConfigError(f"{what} is for a pretraining, and {source.root.uri} is a classifier: leave it out")
        origin = origin_of(_described(source, source.receipt, "", name), finished, terms=terms)
        return _write_classifier(out, source, source.classes(finished), to, origin)
    weights, receipt = source.weights(at), read_receipt(source.root)
    checkpoint = checkpoint_at(source.root, at) if at is not None else ""
    origin = origin_of(_described(source, receipt, checkpoint, name), finished, terms=terms)
    return _write_pretraining(out, source, weights, to, origin)


def _described(
    source: Pretraining | FinishedClassifier, receipt: Receipt | None, checkpoint: str, name: str
) -> Described:
    known = receipt if isinstance(source, FinishedClassifier) and receipt else source
    assert isinstance(known, Receipt | Pretraining)  # noqa: S101 - for the type checker
    return Described(
        name=name,
        directory=source.root.uri.rpartition("/")[2],
        fingerprint=known.fingerprint,
        identity=known.identity,
        receipt=receipt,
        checkpoint=checkpoint or (str(receipt.made["notes"].get("checkpoint", "")) if receipt else ""),
    )


def _write_pretraining(
    out: Store, source: Pretraining, weights: Mapping[str, Tensor], to: Format, origin: Origin
) -> Exported:
    if to in ("hf-vitmae", "safetensors"):
        library: Literal["huggingface", "safetensors"] = "huggingface" if to == "hf-vitmae" else "safetensors"
        return Exported(export_autoencoder(out, weights, source.model, to=library, origin=origin))
    encoder = {name.removeprefix("encoder."): value for name, value in weights.items() if name.startswith("encoder.")}
    config = source.model.encoder
    if to == "onnx":
        made = export_onnx(out, encoder, config, origin=origin)
        return Exported(made.files, (_checked(made.difference),))
    return Exported(export_encoder(out, encoder, config, to="timm" if to == "timm" else "huggingface", origin=origin))


def _write_classifier(
    out: Store, source: FinishedClassifier, classes: tuple[str, ...], to: Format, origin: Origin
) -> Exported:
    weights, config = source.weights(), source.encoder
    if to == "onnx":
        made = export_onnx(out, weights, config, classes=classes, origin=origin)
        return Exported(made.files, (_checked(made.difference),))
    library: Literal["timm", "huggingface", "safetensors"] = "huggingface" if to == "hf-vit" else to  # type: ignore[assignment]
    return Exported(export_classifier(out, weights, config, classes, to=library, origin=origin))


def _checked(difference: float) -> str:
    return f"checked: onnxruntime and torch differ by at most {difference:.1e}"
