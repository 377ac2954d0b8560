"""Import whatever a weight file or folder holds: an autoencoder if it has a decoder, else an encoder.

Errors: those of `imports`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mae_core.config import MAEConfig, ViTConfig
from mae_core.interop import detect_layout
from pipeline.errors import ConfigError
from pipeline.weights.foreign import ForeignWeights, read_foreign_weights
from pipeline.weights.imports import ImportReport, import_autoencoder, import_encoder
from pipeline.weights.own import ENCODER, MODEL

_OF_DECODERS = ("decoder_num_heads", "mask_ratio", "target")
"""Options of import_autoencoder that import_encoder does not take."""


@dataclass(frozen=True, kw_only=True)
class ImportedWeights:
    """Weights of ViTEncoder, or of MaskedAutoencoder where the config is an autoencoder's."""

    config: ViTConfig | MAEConfig
    weights: Mapping[str, Tensor]
    report: ImportReport

    @property
    def whole(self) -> bool:
        """Whether there is a decoder."""
        return isinstance(self.config, MAEConfig)

    @property
    def encoder(self) -> ViTConfig:
        """The encoder's config."""
        return self.config.encoder if isinstance(self.config, MAEConfig) else self.config


def import_weights(
    path: Path,
    *,
    prefix: str | None = None,
    encoder_only: bool = False,
    assume: Mapping[str, Any] | None = None,
    **options: Any,
) -> ImportedWeights:
    """Import all that is there. `options`: those of import_autoencoder; `assume`: their values where nothing states them."""
    if not encoder_only and has_decoder(read_foreign_weights(own_or_given(path), prefix=prefix)):
        whole = import_autoencoder(path, prefix=prefix, assume=assume, **options)
        return ImportedWeights(config=whole.config, weights=whole.weights, report=whole.report)
    if unused := [name for name in _OF_DECODERS if options.pop(name, None) is not None]:
        raise ConfigError(f"{path}: {', '.join(unused)} describes a decoder, and none is imported: leave it out")
    assumed = {name: value for name, value in (assume or {}).items() if name not in _OF_DECODERS}
    encoder = import_encoder(path, prefix=prefix, assume=assumed, **options)
    return ImportedWeights(config=encoder.config, weights=encoder.weights, report=encoder.report)


def own_or_given(path: Path) -> Path:
    """Return the file of a folder with our encoder alone, whose name other programs do not use; any other path as it is."""
    return path / ENCODER if (path / ENCODER).is_file() and not (path / MODEL).is_file() else path


def has_decoder(found: ForeignWeights) -> bool:
    """Return whether a file holds a masked autoencoder's decoder."""
    kernel = found.state_dict.get("encoder.patch_embed.weight")  # ours is a matrix; others have a convolution
    if kernel is not None and kernel.ndim == 2:
        return True
    try:
        return detect_layout(found.state_dict) in ("official_mae", "hf_vitmae")
    except ConfigError:
        return False  # the import says what is wrong with it
