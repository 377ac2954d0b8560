"""Where an encoder comes from: a pretraining in a store, random initial weights, or a file from elsewhere.

The shape of a stored encoder is read from its file, never assumed.
Errors: DataError for a damaged file; ConfigError for weights that are not of a known encoder."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from mae_core.config import ViTConfig
from mae_core.vit import ViTEncoder, initialise
from pipeline.errors import DataError
from pipeline.evaluation.protocol import ProtocolConfig
from pipeline.graph.step import StageInput, canonical
from pipeline.storage import open_store
from pipeline.weights import import_encoder, read_encoder, read_encoder_config, weights_digest

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Encoder:
    """An encoder's configuration and weights: float32, by the names of ViTEncoder."""

    config: ViTConfig
    weights: Mapping[str, Tensor]

    def build(self) -> ViTEncoder:
        """Return the encoder as a module in eval mode."""
        module = ViTEncoder(self.config)
        module.load_state_dict(dict(self.weights))
        return module.eval()

    @cached_property
    def digest(self) -> str:
        """SHA-256 of names, shapes and values: equal weights have equal digests, wherever they come from."""
        return weights_digest(self.weights)


class EncoderSource(Protocol):
    """A small value that is sent to workers, which load the encoder themselves."""

    def shape(self) -> ViTConfig:
        """Return the encoder's configuration, without reading its weights if possible."""
        ...

    def load(self) -> Encoder:
        """Return the encoder with its weights."""
        ...


@dataclass(frozen=True)
class Pretrained:
    """An encoder in our own format, written by a pretraining step or by `mae model export --format safetensors`."""

    uri: str
    """Directory with `encoder.safetensors` and `config.json`."""

    def shape(self) -> ViTConfig:
        """Read `config.json`."""
        return read_encoder_config(open_store(self.uri))

    def load(self) -> Encoder:
        """Read both files."""
        return Encoder(*read_encoder(open_store(self.uri)))


@dataclass(frozen=True)
class Initial:
    """An untrained encoder, whose initial weights are drawn from a seed."""

    config: ViTConfig
    seed: int

    def shape(self) -> ViTConfig:
        """Return the configuration as given."""
        return self.config

    def load(self) -> Encoder:
        """Initialise an encoder."""
        module = ViTEncoder(self.config)
        initialise(module, generator=torch.Generator().manual_seed(self.seed))
        return Encoder(self.config, module.state_dict())


@dataclass(frozen=True)
class WeightsFile:
    """A file or folder in any layout that `pipeline.weights` reads: ours, timm's, Hugging Face's, the official MAE's."""

    path: Path
    prefix: str | None = None
    """What the names of the encoder's weights begin with, in a file that holds several models."""

    def shape(self) -> ViTConfig:
        """Read the file. The configuration follows from the shapes of its tensors."""
        return self.load().config

    def load(self) -> Encoder:
        """Read and convert the file, and tell what was taken from it."""
        imported = import_encoder(self.path, prefix=self.prefix)
        _tell("; ".join(imported.report.lines()))
        return Encoder(imported.config, imported.weights)


@cache  # once per process, although each task loads the file
def _tell(text: str) -> None:
    log.warning("%s", text)


def encoder_source(config: ProtocolConfig, inputs: Mapping[str, StageInput]) -> Pretrained | Initial:
    """Return where the encoder of an evaluation step comes from."""
    # The step's seed draws these weights too, so every seed of a baseline has an encoder of its own.
    if config.weights == "random":
        return Initial(config.encoder, config.seed)
    source = Pretrained(inputs["pretrain"].store.uri)
    check_architecture(config.encoder, source)
    return source


def check_architecture(expected: ViTConfig, source: Pretrained) -> None:
    """Raise DataError if a stored encoder is not the one that the configuration describes.

    The normalisation of pixels is part of the description: features of pixels on another scale would be computed without a word."""
    wanted, stored = canonical(expected), canonical(source.shape())
    differs = [
        f"{name} is {stored.get(name)} there and {wanted.get(name)} in model.encoder"
        for name in sorted(wanted.keys() | stored.keys())
        if wanted.get(name) != stored.get(name)
    ]
    if differs:
        raise DataError(
            f"{source.uri}: the encoder is another one: {', '.join(differs)}. Write in model.encoder what is there, or delete the "
            "step's folder, and the same command pretrains again"
        )
