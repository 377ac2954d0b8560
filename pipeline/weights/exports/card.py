"""The model card: README.md of an export, in the form that Hugging Face shows, with its facts as YAML in front.

Every card says what the model is, how to load it and scale the pixels, and its architecture. What only the store knows (data,
lineage, scores, how to reproduce it) comes as an Origin."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from mae_core.config import ViTConfig, size_name

README = "README.md"


@dataclass(frozen=True, kw_only=True)
class Result:
    """A score for the card's front matter, where Hugging Face finds it."""

    dataset: str
    name: str
    """`top-1 accuracy, linear (5 seeds)`."""
    percent: float


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where weights come from."""

    name: str = ""
    sections: Mapping[str, str] = field(default_factory=dict)
    """Heading -> Markdown below it, in order."""
    results: Sequence[Result] = ()


@dataclass(frozen=True, kw_only=True)
class Usage:
    """How a program loads and calls an export."""

    library: str
    """As Hugging Face names it: `timm`, `transformers`, `onnx`, `pytorch`."""
    what: str
    """`encoder`, `masked autoencoder` or `image classifier`."""
    code: str
    """Python that runs in the export's folder, given `pixels`."""
    pixels: str
    """What `pixels` is."""
    notes: str = ""
    """Markdown behind it."""


def normalised_pixels(config: ViTConfig) -> str:
    """Return what the pixels are that an encoder of this config reads."""
    height, width = config.image_size
    return (
        f"`pixels` is float32 [batch, {config.in_channels}, {height}, {width}]: (image / 255 - mean) / std with mean "
        f"{list(config.pixel_mean)}, std {list(config.pixel_std)}."
    )


def card(config: ViTConfig, usage: Usage, origin: Origin, *, classes: Sequence[str] = ()) -> bytes:
    """Return the README of an export."""
    title = f"{origin.name}: " * bool(origin.name) + f"{size_name(config)}, {usage.what}"
    height, width = config.image_size
    sections = {
        "Use": f"In this folder:\n\n```python\n{usage.code.strip()}\n```\n\n{usage.pixels}"
        + (f"\n\n{usage.notes.strip()}" if usage.notes else ""),
        "Architecture": _table(
            {
                "model": f"Vision Transformer, {config.depth} blocks of width {config.embed_dim}, {config.num_heads} heads, "
                f"MLP of width {config.mlp_dim}",
                "image": f"{height} x {width} pixels, {config.in_channels} channels, patches of {config.patch_size} x "
                f"{config.patch_size}",
                "positions": "fixed sine-cosine table" if config.positions == "sine_cosine" else "learned table",
                "LayerNorm epsilon": f"{config.layer_norm_eps:g}",
                **({"classes": f"{len(classes)}: {_some(classes)}"} if classes else {}),
            }
        ),
        **origin.sections,
    }
    body = "\n\n".join(f"## {heading}\n\n{text.strip()}" for heading, text in sections.items())
    front = yaml.safe_dump(_front_matter(usage, origin, title, classes), sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n\n# {title}\n\n{_opening(usage)}\n\n{body}\n".encode()


def _opening(usage: Usage) -> str:
    if usage.what == "image classifier":
        return "An image classifier: an encoder of images, trained with a linear head on the mean of its patch tokens."
    return (
        f"A Vision Transformer {usage.what}, pretrained without labels as a "
        "[Masked Autoencoder](https://arxiv.org/abs/2111.06377)."
    )


def _front_matter(usage: Usage, origin: Origin, title: str, classes: Sequence[str]) -> dict[str, Any]:
    task = "image-classification" if classes else "image-feature-extraction"
    tags = ["vision-transformer", "masked-autoencoder", "self-supervised-learning", "mae-pipeline"]
    front: dict[str, Any] = {"library_name": usage.library, "pipeline_tag": task, "tags": tags}
    if origin.results:
        by_dataset: dict[str, list[dict[str, Any]]] = {}
        for one in origin.results:
            metric = {"type": "accuracy", "name": one.name, "value": round(one.percent, 2)}
            by_dataset.setdefault(one.dataset, []).append(metric)
        results = [
            {"task": {"type": "image-classification"}, "dataset": {"name": name, "type": name}, "metrics": metrics}
            for name, metrics in by_dataset.items()
        ]
        front["model-index"] = [{"name": title, "results": results}]
    return front


def _table(rows: Mapping[str, str]) -> str:
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows.items())


def _some(classes: Sequence[str]) -> str:
    return ", ".join(classes[:10]) + (f" and {len(classes) - 10} more (config.json)" if len(classes) > 10 else "")
