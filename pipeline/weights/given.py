"""Weights that somebody gives to be evaluated: the encoder in the form and at the size in which it is run, its head, and a digest.

Where a file leaves something open, what the caller states wins over what the file states, and that over the defaults (`imports`).
`image_size` is that of the images to be encoded. If it is not the size that the weights were made for, learned positions are
resized.
Errors: those of `imports`."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from mae_core.config import ViTConfig
from mae_core.positions import resized_encoder
from pipeline.errors import ConfigError
from pipeline.graph.facts import Facts
from pipeline.graph.receipts import RECEIPT, read_receipt
from pipeline.storage import FileStore
from pipeline.weights.foreign import ForeignWeights, files_read, read_foreign_weights
from pipeline.weights.heads import Head, HeadReads, head_in
from pipeline.weights.imports import OWN_LAYOUT, ImportedEncoder, ImportReport, StatedFields, encoder_in, is_own
from pipeline.weights.own import ENCODER

_BYTES_AT_A_TIME = 2**24


@dataclass(frozen=True)
class GivenWeights:
    """An encoder from elsewhere."""

    config: ViTConfig
    weights: dict[str, Tensor]
    head: Head | None
    facts: "ImportFacts"
    report: ImportReport


@dataclass(frozen=True, kw_only=True)
class ImportFacts(Facts):
    """What was understood of a file of weights."""

    layout: str
    sha256: str
    parameters: int
    """Of the encoder."""
    left_out: tuple[str, ...] = ()
    """The first names in the file that are not the encoder's."""
    notes: tuple[str, ...] = ()
    classes: int | None = None
    """Outputs of the classification head; None if there is none."""
    head_reads: HeadReads | None = None


def read_given(path: Path, stated: StatedFields, *, prefix: str | None = None) -> GivenWeights:
    """Read the encoder of a file or folder, and its classification head if it has one.

    `prefix` chooses among several models in one file; see `import_encoder`.
    """
    found = read_foreign_weights(_weights_at(path), prefix=prefix)
    found, notes = _with_token_norm(found)
    encoder = _encoder_at_size(path, found, stated, notes)
    head = head_in(found, encoder.config)
    if isinstance(head, str):
        notes.append(head)
        head = None
    report = encoder.report._replace(notes=(*encoder.report.notes, *notes))
    return GivenWeights(
        encoder.config,
        encoder.weights,
        head[0] if head else None,
        ImportFacts(
            layout=report.layout,
            sha256=digest_of(path),
            parameters=sum(value.numel() for value in encoder.weights.values()),
            left_out=report.left_out[:100],
            notes=report.notes,
            classes=len(head[0].weight) if head else None,
            head_reads=head[1] if head else None,
        ),
        report,
    )


def digest_of(path: Path) -> str:
    """Return a SHA-256 of what is read for a file or folder. Of a single file it is the file's own, as sha256sum prints it."""
    files = files_read(_weights_at(path))
    digests = [_sha256(file) for file in files]
    if len(files) == 1:
        return digests[0]
    listed = "".join(f"{digest}  {file.name}\n" for digest, file in zip(digests, files, strict=True))
    return hashlib.sha256(listed.encode()).hexdigest()


def _sha256(file: Path) -> str:
    content = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(_BYTES_AT_A_TIME):
            content.update(block)
    return content.hexdigest()


def _weights_at(path: Path) -> Path:
    """Return where the weights are: in a folder of ours the encoder's file, in the directory of a step its finished generation."""
    if (path / RECEIPT).is_file() and (receipt := read_receipt(FileStore(path.absolute()))):
        path = path / f"g{receipt.generation:04d}"
    return path / ENCODER if (path / ENCODER).is_file() else path


def _with_token_norm(found: ForeignWeights) -> tuple[ForeignWeights, list[str]]:
    """Give a classifier that normalises the mean of its tokens a norm for each token, which protocols on frozen features need."""
    if "fc_norm.weight" not in found.state_dict or "norm.weight" in found.state_dict:
        return found, []
    norm = {f"norm.{kind}": found.state_dict[f"fc_norm.{kind}"] for kind in ("weight", "bias")}
    note = (
        "fc_norm also stands in for the norm of the tokens, which such a classifier lacks: its own head (own_head) and fine-tuning "
        "are as in the original, features of the frozen encoder are not"
    )
    return replace(found, state_dict={**found.state_dict, **norm}), [note]


def _encoder_at_size(path: Path, found: ForeignWeights, stated: StatedFields, notes: list[str]) -> ImportedEncoder:
    """Import the encoder at the stated image size. If its positions are resized, a line is added to the notes."""
    sizeless = stated.model_copy(update={"image_size": None})
    own = is_own(found)
    if own:
        encoder = encoder_in(_weights_at(path), found, StatedFields())
        _check_agreement(path, encoder.config, sizeless)
    else:
        encoder = _first_that_fits(lambda: encoder_in(path, found, stated), lambda: encoder_in(path, found, sizeless))
    if stated.image_size in (None, encoder.config.image_size):
        return encoder
    weights, config = resized_encoder(encoder.weights, encoder.config, image_size=stated.image_size)
    if config.positions == "learned":
        notes.append(
            f"positions resized from {_by(encoder.config.grid)} patches to {_by(config.grid)} (bicubic, antialiased, as in timm)"
        )
    return encoder._replace(weights=weights, config=config)


def _first_that_fits(*ways: Callable[[], ImportedEncoder]) -> ImportedEncoder:
    """Return what the first way gives that raises no ConfigError. The stated size is first taken for the one the weights are of."""
    for way in ways[:-1]:
        try:
            return way()
        except ConfigError:
            continue
    return ways[-1]()


def _check_agreement(path: Path, config: ViTConfig, stated: StatedFields) -> None:
    for name, value in stated.stated().items():
        if getattr(config, name, value) != value:
            raise ConfigError(
                f"{path}: {name}={value}, but its config.json says {getattr(config, name)}: leave the option out"
            )


def _by(pair: tuple[int, int]) -> str:
    return f"{pair[0]} x {pair[1]}"


def understood(given: GivenWeights) -> list[str]:
    """Return what was understood of the weights as text, one fact per line, with the option that corrects it."""
    config, facts = given.config, given.facts
    registers = f", {config.num_register_tokens} registers" if config.num_register_tokens else ""
    assumed = {text.partition("=")[0] for text in given.report.assumed}
    how = {name: "assumed" if name in assumed else "stated" for name in StatedFields.model_fields}
    own = " (this project)" if facts.layout == OWN_LAYOUT else ""
    lines = [
        given.report.source,
        f"  layout         {facts.layout}{own}, {facts.parameters:,} parameters",
        f"  encoder        {config.embed_dim} wide, {config.depth} deep, patch {config.patch_size}, "
        f"{config.positions} positions{registers}",
        f"  heads          {config.num_heads} ({how['num_heads']}; --num-heads)",
        f"  images         {_by(config.image_size)} pixels (--image-size)",
        f"  normalisation  mean {_numbers(config.pixel_mean)}, std {_numbers(config.pixel_std)} "
        f"({how['pixel_mean']}; --pixel-mean, --pixel-std)",
        f"  norm eps       {config.layer_norm_eps:g} ({how['layer_norm_eps']}; --layer-norm-eps)",
        f"  left out       {_names(given.report.left_out)}",
    ]
    if facts.classes:
        lines.append(f"  own head       {facts.classes} classes, reads {facts.head_reads} (--protocols own_head)")
    return [*lines, *(f"  note           {note}" for note in facts.notes)]


def _numbers(values: tuple[float, ...]) -> str:
    return ",".join(f"{value:g}" for value in values)


def _names(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:6])}{f' and {len(names) - 6} more' * (len(names) > 6)}" or "nothing"
