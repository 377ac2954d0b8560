"""Exports to a folder: which files each program gets.

    timm         model.safetensors, config.json (for timm.create_model("local-dir:...")), README.md
    huggingface  model.safetensors, config.json, preprocessor_config.json, README.md; tensors under the names in transformers'
                 files, which versions 4 and 5 read
    safetensors  encoder.safetensors (or all three files of a pretraining, or classifier.safetensors), config.json, README.md: our
                 own names, read by import_encoder
The weights are written first and config.json last, each file atomically: a folder with a config.json is complete. Position
embeddings are stored as tables where the other program expects tables.
Errors: ConfigError for a config that the other program cannot represent."""

import json
from collections.abc import Mapping, Sequence
from typing import Literal

from safetensors.torch import save
from torch import Tensor

from mae_core.config import MAEConfig, ViTConfig
from pipeline.errors import ConfigError
from pipeline.graph.step import canonical
from pipeline.storage import Store
from pipeline.weights.exports.card import README, Origin, Usage, card, normalised_pixels
from pipeline.weights.exports.hf_format import write_hf_autoencoder, write_hf_classifier, write_hf_encoder
from pipeline.weights.exports.timm_format import write_timm
from pipeline.weights.own import CLASSIFIER, CONFIG, ENCODER, write_weights

_ENCODER_CODE = """
import json
from mae_core import ViTConfig, ViTEncoder
from safetensors.torch import load_file

model = ViTEncoder(ViTConfig(**json.load(open("config.json"))["encoder"])).eval()
model.load_state_dict(load_file("encoder.safetensors"))
tokens = model(pixels)  # class token first; model.encode(pixels, pool="mean") is one feature per image
"""
_CLASSIFIER_CODE = """
import json
import torch
from mae_core import Classifier, ViTConfig, ViTEncoder
from safetensors.torch import load_file

config = json.load(open("config.json"))
encoder, classes = ViTEncoder(ViTConfig(**config["encoder"])), config["classifier"]["classes"]
model = Classifier(encoder, num_classes=len(classes), generator=torch.Generator()).eval()
model.load_state_dict(load_file("classifier.safetensors"))
logits = model(pixels)  # in the order of `classes`
"""
_MAE_CORE = "`mae_core` is the part of mae-pipeline that needs torch and numpy alone."


def export_encoder(
    store: Store,
    weights: Mapping[str, Tensor],
    config: ViTConfig,
    *,
    to: Literal["timm", "huggingface", "safetensors"],
    origin: Origin = Origin(),  # noqa: B008 - frozen
) -> tuple[str, ...]:
    """Write the weights of ViTEncoder(config) to a folder; return the keys of its files."""
    match to:
        case "timm":
            return write_timm(store, weights, config, origin=origin)
        case "huggingface":
            return write_hf_encoder(store, weights, config, origin)
        case "safetensors":
            # safetensors refuses views with strides.
            store.write(ENCODER, save({name: value.contiguous() for name, value in weights.items()}))
            store.write(README, card(config, _own("encoder", _ENCODER_CODE, config), origin))
            store.write(CONFIG, json.dumps({"encoder": canonical(config)}, indent=1, sort_keys=True).encode())
            return ENCODER, README, CONFIG
    raise _unknown_target(to, "timm, huggingface, safetensors")


def export_autoencoder(
    store: Store,
    weights: Mapping[str, Tensor],
    config: MAEConfig,
    *,
    to: Literal["huggingface", "safetensors"],
    origin: Origin = Origin(),  # noqa: B008 - frozen
) -> tuple[str, ...]:
    """Write the weights of MaskedAutoencoder(config) to a folder; return the keys of its files."""
    match to:
        case "huggingface":
            return write_hf_autoencoder(store, weights, config, origin)
        case "safetensors":
            usage = _own("masked autoencoder", _ENCODER_CODE, config.encoder)
            store.write(README, card(config.encoder, usage, origin))
            return README, *write_weights(store, weights, config)
    raise _unknown_target(to, "huggingface, safetensors")


def export_classifier(
    store: Store,
    weights: Mapping[str, Tensor],
    config: ViTConfig,
    classes: Sequence[str],
    *,
    to: Literal["timm", "huggingface", "safetensors"],
    origin: Origin = Origin(),  # noqa: B008 - frozen
) -> tuple[str, ...]:
    """Write the weights of a fine-tuned Classifier, which pools the mean and has its own norm; return the keys of the files."""
    match to:
        case "timm":
            return write_timm(store, weights, config, classes=classes, origin=origin)
        case "huggingface":
            return write_hf_classifier(store, weights, config, classes, origin)
        case "safetensors":
            store.write(CLASSIFIER, save({name: value.contiguous() for name, value in weights.items()}))
            usage = _own("image classifier", _CLASSIFIER_CODE, config)
            store.write(README, card(config, usage, origin, classes=classes))
            body = {
                "encoder": canonical(config),
                "classifier": {"classes": list(classes), "pool": "mean", "norm": "fresh"},
            }
            store.write(CONFIG, json.dumps(body, indent=1, sort_keys=True).encode())
            return CLASSIFIER, README, CONFIG
    raise _unknown_target(to, "timm, huggingface, safetensors")


def _own(what: str, code: str, config: ViTConfig) -> Usage:
    return Usage(library="pytorch", what=what, code=code, pixels=normalised_pixels(config), notes=_MAE_CORE)


def _unknown_target(to: str, known: str) -> ConfigError:
    return ConfigError(f"to={to!r} is unknown: write one of {known}")
