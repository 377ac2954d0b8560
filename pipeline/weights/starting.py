"""Weights of elsewhere as the start of a pretraining: checked against the run's model, and resized to its images.

The encoder is taken, and the decoder too if the weights have one that fits; what is not taken is drawn from the run's seed.
Learned positions are interpolated to the run's grid. The fixed sine-cosine table is computed for that grid instead, in encoder and
decoder alike: the table is a formula, so interpolating it would only blur it. Fields that shapes do not determine and the file
does not state, such as num_heads, are taken from the run's configuration.

The digest covers the tensors as they were imported, before they are resized: neither their address, the container nor the version
of an interpolation changes it.
Errors: ConfigError for weights of another architecture, with what to write; DataError for a file that cannot be read."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from mae_core.config import MAEConfig, ViTConfig
from mae_core.mae import MaskedAutoencoder
from mae_core.positions import interpolate_positions
from pipeline.errors import ConfigError
from pipeline.weights.addresses import state_of, weights_at
from pipeline.weights.own import weights_digest
from pipeline.weights.reading import ImportedWeights, import_weights

Decoder = Literal["auto", "fresh"]

_MAY_DIFFER = ("image_size", "positions", "pixel_mean", "pixel_std", "layer_norm_eps")
"""Fields of the encoder that weights need not share with the run; what becomes of them is in the notes."""
_DECODER = (
    "decoder_embed_dim",
    "decoder_depth",
    "decoder_num_heads",
    "decoder_mlp_ratio",
    "target_dim",
    "encoder_input",
)


@dataclass(frozen=True, kw_only=True)
class StartSummary:
    """What a pretraining starts from."""

    source: str
    layout: str
    sha256: str
    """Of the imported tensors: names, shapes and values."""
    taken: tuple[str, ...]
    fresh: tuple[str, ...]
    """Tensors that are drawn from the run's seed."""
    interpolated: tuple[str, ...]
    notes: tuple[str, ...]
    """What to know before trusting it: another pixel scale, what was assumed, what was left out."""

    def lines(self) -> list[str]:
        """Return the summary as text, one fact per line."""
        fresh = f"{len(self.fresh)} fresh{_parts(self.fresh)}"
        counts = f"{len(self.taken)} tensors taken, {fresh}, {len(self.interpolated)} interpolated"
        names = f" ({', '.join(self.interpolated)})" if self.interpolated else ""
        return [
            f"starts from {self.source} (layout {self.layout}, sha256 {self.sha256[:12]}): {counts}{names}",
            *self.notes,
        ]


@dataclass(frozen=True)
class Start:
    """Weights to start from, by names of MaskedAutoencoder, and where they come from."""

    weights: Mapping[str, Tensor]
    summary: StartSummary


def starting_weights(address: str, model: MAEConfig, *, decoder: Decoder) -> Start:
    """Import weights as the start of a pretraining of `model`."""
    assumed = {
        "num_heads": model.encoder.num_heads,
        "decoder_num_heads": model.decoder_num_heads,
        "layer_norm_eps": model.encoder.layer_norm_eps,
        "pixel_mean": model.encoder.pixel_mean,
        "pixel_std": model.encoder.pixel_std,
        "mask_ratio": model.mask_ratio,
        "target": model.target if model.target != "pca" else "normalised",
    }
    with weights_at(address) as path:
        imported = import_weights(path, encoder_only=decoder == "fresh", assume=assumed)
    _check(address, imported.config, model)
    weights = {name if imported.whole else f"encoder.{name}": value for name, value in imported.weights.items()}
    digest = weights_digest(weights)
    notes = _notes(imported, model)
    interpolated: tuple[str, ...] = ()
    if "encoder.positions" in weights:
        stored, grids = weights["encoder.positions"], (imported.encoder.grid, model.encoder.grid)
        weights["encoder.positions"] = interpolate_positions(stored, old_grid=grids[0], new_grid=grids[1]).contiguous()
        interpolated = ("encoder.positions",) if grids[0] != grids[1] else ()
    summary = StartSummary(
        source=address,
        layout=imported.report.layout,
        sha256=digest,
        taken=tuple(sorted(weights)),
        fresh=tuple(sorted(_names(model) - weights.keys())),
        interpolated=interpolated,
        notes=notes,
    )
    return Start(weights, summary)


def start_summary(address: str, model: MAEConfig, *, decoder: Decoder) -> StartSummary:
    """Return what a pretraining of `model` would start from. Weights are read again only if their files have changed."""
    return _summary(address, state_of(address), model, decoder)


@lru_cache(maxsize=128)  # a run asks several times, and weights take seconds to read
def _summary(address: str, state: object, model: MAEConfig, decoder: Decoder) -> StartSummary:
    return starting_weights(address, model, decoder=decoder).summary


def _check(address: str, found: ViTConfig | MAEConfig, model: MAEConfig) -> None:
    """Raise ConfigError, with what to write, unless the weights fit the model of the run."""
    encoder = found.encoder if isinstance(found, MAEConfig) else found
    names = [one.name for one in fields(ViTConfig) if one.name not in _MAY_DIFFER]
    if wrong := _differing(encoder, model.encoder, names):
        advice = ", ".join(f"model.encoder.{name}: {getattr(encoder, name)}" for name in wrong)
        told = ", ".join(f"{name}={getattr(encoder, name)}, not {getattr(model.encoder, name)}" for name in wrong)
        why = " (a kernel of another patch size cannot be resized without changing what it computes)"
        raise ConfigError(
            f"pretrain.start={address}: the encoder there has {told}{why * ('patch_size' in wrong)}. Write {advice}, or start from "
            "other weights"
        )
    if encoder.positions == "learned" and model.encoder.positions != "learned":
        raise ConfigError(
            f"pretrain.start={address}: its positions are trained, and this run would replace them by the fixed table. Write "
            "model.encoder.positions: learned"
        )
    if isinstance(found, MAEConfig) and (wrong := _differing(found, model, _DECODER)):
        told = ", ".join(f"{name}={getattr(found, name)}, not {getattr(model, name)}" for name in wrong)
        raise ConfigError(
            f"pretrain.start={address}: the decoder there has {told}. Write these below model, or pretrain.start_decoder: fresh to "
            "take the encoder alone"
        )


def _differing(found: Any, wanted: Any, names: tuple[str, ...] | list[str]) -> list[str]:
    return [name for name in names if getattr(found, name) != getattr(wanted, name)]


def _notes(imported: ImportedWeights, model: MAEConfig) -> tuple[str, ...]:
    """Return one line for each thing that differs although the weights fit, and for what was assumed and left out."""
    found, wanted, report = imported.encoder, model.encoder, imported.report
    notes = []
    if (found.pixel_mean, found.pixel_std) != (wanted.pixel_mean, wanted.pixel_std):
        notes.append(
            f"its pixels were scaled with mean {list(found.pixel_mean)}, std {list(found.pixel_std)}; this run's are with "
            f"{list(wanted.pixel_mean)}, {list(wanted.pixel_std)} (model.encoder.pixel_mean, pixel_std)"
        )
    if found.layer_norm_eps != wanted.layer_norm_eps:
        notes.append(f"its layer_norm_eps is {found.layer_norm_eps}, this run's {wanted.layer_norm_eps}")
    if found.image_size != wanted.image_size:
        how = "interpolated" if found.positions == "learned" else "computed for the new grid"
        notes.append(f"its images had {_size(found)} pixels, this run's have {_size(wanted)}: positions are {how}")
    if found.positions != wanted.positions:
        notes.append("its positions are the fixed table; here they are learned, and start as that table")
    if imported.whole and isinstance(imported.config, MAEConfig) and imported.config.target != model.target:
        notes.append(f"its decoder predicted target {imported.config.target}, this run's is {model.target}")
    if report.assumed:
        notes.append(f"not stated there, taken from this run: {', '.join(report.assumed)}")
    if report.left_out:
        shown = ", ".join(report.left_out[:4])
        notes.append(f"left out: {shown}{f' and {len(report.left_out) - 4} more' * (len(report.left_out) > 4)}")
    return (*notes, *report.notes)


def _size(config: ViTConfig) -> str:
    return " x ".join(map(str, config.image_size))


def _names(model: MAEConfig) -> set[str]:
    with torch.device("meta"):
        return set(MaskedAutoencoder(model, generator=torch.Generator("cpu")).state_dict())


def _parts(names: tuple[str, ...]) -> str:
    """Return which part of the model fresh tensors are, if they are one."""
    parts = sorted({name.partition(".")[0] for name in names})
    return f" ({', '.join(parts)})" if parts else ""
