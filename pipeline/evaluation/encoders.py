"""Where an encoder comes from: a pretraining of this store, initial weights, or a file by anybody.

The shape of a stored encoder is read from its file, never assumed.
Errors: DataError for a damaged file; ConfigError for weights that are no encoder this package knows."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from mae_core.config import ViTConfig
from mae_core.vit import ViTEncoder, initialise
from pipeline.evaluation.protocol import Subject
from pipeline.graph.step import StageInput
from pipeline.storage import open_store
from pipeline.weights import import_encoder, read_encoder, read_encoder_config


@dataclass(frozen=True)
class Encoder:
    """An encoder with its weights: names of ViTEncoder, float32."""

    config: ViTConfig
    weights: Mapping[str, Tensor]

    def build(self) -> ViTEncoder:
        """Return it as a module in eval mode."""
        module = ViTEncoder(self.config)
        module.load_state_dict(dict(self.weights))
        return module.eval()

    @cached_property
    def digest(self) -> str:
        """SHA-256 of names and values: the same weights have the same digest wherever they come from."""
        content = hashlib.sha256()
        for name, value in sorted(self.weights.items()):
            content.update(f"{name} {tuple(value.shape)}\n".encode())
            content.update(value.detach().contiguous().view(torch.uint8).numpy().data)
        return content.hexdigest()


class EncoderSource(Protocol):
    """A small value that travels to workers, which load the encoder there."""

    def shape(self) -> ViTConfig:
        """Return the encoder's configuration without reading its weights, where that is possible."""
        ...

    def load(self) -> Encoder:
        """Return the encoder with its weights."""
        ...


@dataclass(frozen=True)
class Pretrained:
    """The encoder that a pretraining step, or an export as safetensors, left in a store."""

    uri: str
    """Directory of `encoder.safetensors` and `config.json`."""

    def shape(self) -> ViTConfig:
        """Read `config.json`."""
        return read_encoder_config(open_store(self.uri))

    def load(self) -> Encoder:
        """Read both files."""
        return Encoder(*read_encoder(open_store(self.uri)))


@dataclass(frozen=True)
class Initial:
    """An encoder with its initial weights, drawn from a seed."""

    config: ViTConfig
    seed: int

    def shape(self) -> ViTConfig:
        """Return the configuration as given."""
        return self.config

    def load(self) -> Encoder:
        """Initialise a new encoder."""
        module = ViTEncoder(self.config)
        initialise(module, generator=torch.Generator().manual_seed(self.seed))
        return Encoder(self.config, module.state_dict())


@dataclass(frozen=True)
class WeightsFile:
    """A file or folder in any layout that `pipeline.weights` reads: ours, timm's, Hugging Face's, the official one."""

    path: Path

    def shape(self) -> ViTConfig:
        """Read the file: the shapes of its tensors are the configuration."""
        return self.load().config

    def load(self) -> Encoder:
        """Read and convert the file."""
        imported = import_encoder(self.path)
        return Encoder(imported.config, imported.weights)


def encoder_source(subject: Subject, inputs: Mapping[str, StageInput]) -> EncoderSource:
    """Return where the encoder of an evaluation step comes from."""
    if subject.weights == "random":
        return Initial(subject.encoder, subject.seed)
    return Pretrained(inputs["pretrain"].store.uri)
