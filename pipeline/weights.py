"""Weight files: safetensors in a store, with the configuration they were made for beside them.

    encoder.safetensors   float32 tensors by the names of ViTEncoder      (what probes, fine-tuning and others read)
    model.safetensors     the whole autoencoder, decoder included
    config.json           the MAEConfig both were made for
Nothing here unpickles. Errors: DataError when a file is damaged; MissingObject when it is absent."""

import json
from collections.abc import Mapping

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from mae_core.config import MAEConfig
from pipeline.errors import DataError
from pipeline.graph.step import canonical
from pipeline.storage import Store

ENCODER = "encoder.safetensors"
MODEL = "model.safetensors"
CONFIG = "config.json"


def write_weights(store: Store, weights: Mapping[str, Tensor], config: MAEConfig) -> tuple[str, ...]:
    """Writes a trained autoencoder (names of MaskedAutoencoder); returns the keys of the three files."""
    encoder = {name.removeprefix("encoder."): value for name, value in weights.items() if name.startswith("encoder.")}
    store.write(MODEL, save({name: value.contiguous() for name, value in weights.items()}))
    store.write(ENCODER, save({name: value.contiguous() for name, value in encoder.items()}))
    store.write(CONFIG, json.dumps(canonical(config), indent=1, sort_keys=True).encode())
    return ENCODER, MODEL, CONFIG


def read_weights(store: Store, key: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file."""
    try:
        return dict(load(store.read(key)))
    except SafetensorError as cause:
        raise DataError(f"{store.uri}/{key} is damaged ({cause}): delete the step's folder and run it again") from cause
