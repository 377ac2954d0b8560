"""Weights from elsewhere take the place of a pretraining: a file or folder becomes an encoder of ours in the store.

Output: encoder.safetensors, config.json and, for a classifier, head.safetensors. Facts: ImportFacts.
Errors: those of reading weights; DataError if the file is another one than was looked at when the run was configured."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mae_core.config import ViTConfig
from pipeline.errors import DataError
from pipeline.graph.step import Attempt, StageInput, StageResult
from pipeline.weights import (
    CONFIG,
    ENCODER,
    HEAD,
    StatedFields,
    digest_of,
    export_encoder,
    read_given,
    write_head,
)

VERSION = 1
FILE = "file"
"""Option of the step: where the weights are. Their digest identifies them, so that the path changes no fingerprint."""

ASSUMED = "assumed"
"""Option of the step: fields of the encoder that nobody stated, for the report."""


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """Which weights, and how they were understood."""

    sha256: str
    prefix: str | None
    encoder: ViTConfig


def import_weights(config: ImportConfig, inputs: Mapping[str, StageInput], attempt: Attempt) -> StageResult:
    """Read the weights and write them in our own form."""
    path = Path(attempt.options[FILE])
    if (digest := digest_of(path)) != config.sha256:
        raise DataError(
            f"{path} has changed: its SHA-256 is {digest[:12]}..., and the run was configured for {config.sha256[:12]}.... Run "
            f"`mae evaluate` again"
        )
    encoder = config.encoder
    stated = StatedFields(
        **{name: getattr(encoder, name) for name in StatedFields.model_fields if hasattr(encoder, name)}
    )
    given = read_given(path, stated, prefix=config.prefix)
    if given.config != encoder:
        raise DataError(
            f"{path}: the weights are of {given.config}, and model.encoder says {encoder}: write that there"
        )
    export_encoder(attempt.store, given.weights, given.config, to="safetensors")
    files = [ENCODER, CONFIG]
    if given.head:
        write_head(attempt.store, given.head)
        files.append(HEAD)
    notes = {"file": str(path), "assumed": list(attempt.options.get(ASSUMED, ()))}
    return StageResult(given.facts.as_json(), files=tuple(files), notes=notes)
