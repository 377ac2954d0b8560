"""This project's own weight files: safetensors in a store, beside the configuration of their model.

    encoder.safetensors   float32 tensors under ViTEncoder's names, for probes, fine-tuning and other programs
    model.safetensors     the whole autoencoder, including the decoder
    classifier.safetensors  a fine-tuned classifier: encoder, norm of the pooled feature, head
    config.json           the MAEConfig of both
Nothing here unpickles. Errors: DataError for a damaged file; MissingObject for an absent one."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from mae_core.config import MAEConfig, ViTConfig
from mae_core.vit import ViTEncoder
from pipeline.errors import ConfigError, DataError
from pipeline.graph.step import canonical
from pipeline.storage import Store

ENCODER = "encoder.safetensors"
MODEL = "model.safetensors"
CLASSIFIER = "classifier.safetensors"
CONFIG = "config.json"


class _Described(BaseModel):
    """The encoder's part of config.json, validated; the other fields of an autoencoder are not read here."""

    model_config = ConfigDict(extra="forbid")
    encoder: ViTConfig


class _DescribedWhole(BaseModel):
    """The whole config.json of an autoencoder, validated."""

    model_config = ConfigDict(extra="forbid")
    autoencoder: MAEConfig


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names, shapes and values: equal weights have equal digests, wherever they come from."""
    content = hashlib.sha256()
    for name, value in sorted(weights.items()):  # files list tensors in any order
        content.update(f"{name} {tuple(value.shape)}\n".encode())
        # The bytes themselves, without copying them.
        content.update(value.detach().contiguous().view(torch.uint8).numpy().data)
    return content.hexdigest()


def write_weights(store: Store, weights: Mapping[str, Tensor], config: MAEConfig) -> tuple[str, ...]:
    """Write a trained autoencoder, given MaskedAutoencoder's state dict; return the keys of the three files."""
    # Stored twice, so that evaluations and other programs need not fetch the decoder.
    encoder = {name.removeprefix("encoder."): value for name, value in weights.items() if name.startswith("encoder.")}
    store.write(MODEL, save({name: value.contiguous() for name, value in weights.items()}))
    store.write(ENCODER, save({name: value.contiguous() for name, value in encoder.items()}))
    # Last: a folder with a config.json is complete.
    store.write(CONFIG, json.dumps(canonical(config), indent=1, sort_keys=True).encode())
    return ENCODER, MODEL, CONFIG


def read_weights(store: Store, key: str) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file."""
    try:
        return dict(load(store.read(key)))
    except SafetensorError as cause:
        raise DataError(
            f"{store.uri}/{key} is damaged ({cause}): delete the step's folder and rerun the step"
        ) from cause


def read_encoder_config(store: Store) -> ViTConfig:
    """Return the encoder's config, of a finished pretraining or of an export as safetensors."""
    try:
        return _Described(encoder=json.loads(store.read(CONFIG))["encoder"]).encoder
    except (ValueError, KeyError, TypeError, ConfigError) as cause:
        raise _undescribed(store, "an encoder", cause) from cause


def read_autoencoder_config(store: Store) -> MAEConfig:
    """Return the config of a finished pretraining's autoencoder, or of an export as safetensors."""
    try:
        return _DescribedWhole(autoencoder=json.loads(store.read(CONFIG))).autoencoder
    except (ValueError, TypeError, ConfigError) as cause:
        raise _undescribed(store, "an autoencoder", cause) from cause


def _undescribed(store: Store, what: str, cause: Exception) -> DataError:
    # pydantic's first line only counts the errors.
    why = "; ".join(str(cause).splitlines()[1:3]) if isinstance(cause, ValidationError) else str(cause)
    return DataError(f"{store.uri}/{CONFIG} does not describe {what} ({why}): train or export it again")


def read_encoder(store: Store) -> tuple[ViTConfig, dict[str, Tensor]]:
    """Return the encoder's config and weights, of a finished pretraining or of an export as safetensors."""
    return read_encoder_config(store), read_weights(store, ENCODER)


def read_classifier(store: Store) -> tuple[ViTConfig, tuple[str, ...], dict[str, Tensor]]:
    """Return encoder's config, class names and weights of a classifier that was exported as safetensors."""
    try:
        classes = tuple(map(str, json.loads(store.read(CONFIG))["classifier"]["classes"]))
    except (ValueError, KeyError, TypeError) as cause:
        raise _undescribed(store, "a classifier", cause) from cause
    return read_encoder_config(store), classes, read_weights(store, CLASSIFIER)


def read_encoder_as(store: Store, config: ViTConfig) -> dict[str, Tensor]:
    """Return the weights of an encoder that has to be as `config` says.

    Raises ConfigError if it is another one, also where only its pixels are normalised in another way, and DataError if the file
    has other tensors than its own config.json describes. Both name what differs.
    """
    stored = read_encoder_config(store)
    if differences := [
        f"{one.name}={getattr(stored, one.name)} instead of {getattr(config, one.name)}"
        for one in fields(ViTConfig)
        if getattr(stored, one.name) != getattr(config, one.name)
    ]:
        raise ConfigError(
            f"{store.uri} holds another encoder: {', '.join(differences)}. Write these below model.encoder, or pretrain again"
        )
    weights = read_weights(store, ENCODER)
    with torch.device("meta"):
        expected = {name: list(value.shape) for name, value in ViTEncoder(config).state_dict().items()}
    found = {name: list(value.shape) for name, value in weights.items()}
    for name in sorted({*found, *expected}):
        if found.get(name) != expected.get(name):
            raise DataError(
                f"{store.uri}/{ENCODER} does not fit its {CONFIG}: {name} is {found.get(name, 'absent')} instead of "
                f"{expected.get(name, 'absent')}. Delete the step's folder and rerun the step, or export it again"
            )
    return weights
