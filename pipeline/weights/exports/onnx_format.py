"""ONNX: an encoder or a classifier as a program of its own, with the pixel scale inside.

    input    pixels   float32 [batch, C, H, W], in 0..1 (an image divided by 255); the batch is free, the image's size is not
    output   cls      float32 [batch, D], the class token's feature;  mean [batch, D], the mean of the patches;
             patches  float32 [batch, L, D]
             logits   float32 [batch, classes], instead, for a classifier
0..1 is what image libraries give, so a caller needs to know neither mean nor std.

What onnxruntime computes from the written file is compared with torch before anything is stored.
Errors: ConfigError if the packages of the extra `onnx` are absent; PipelineError if the two programs differ."""

import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mae_core.classification.heads import Classifier
from mae_core.config import ViTConfig
from mae_core.vit import ViTEncoder
from pipeline.errors import ConfigError, PipelineError
from pipeline.graph.step import canonical
from pipeline.storage import Store
from pipeline.weights.exports.card import README, Origin, Usage, card
from pipeline.weights.own import CONFIG

PROGRAM = "model.onnx"
OPSET = 18
TOLERANCE = 1e-4
"""Largest difference between onnxruntime and torch in any output; both compute in float32."""
FEATURES = ("cls", "mean", "patches")
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_INLINE_BYTES = 1_500_000_000
"""Larger weights go into a file beside the program: protobuf ends at 2 GiB."""


class OnnxExport(NamedTuple):
    """What was written."""

    files: tuple[str, ...]
    difference: float
    """The largest between onnxruntime and torch, over all outputs."""


class _WithScale(nn.Module):
    """Scales pixels in 0..1 as the model expects them."""

    mean: Tensor  # [C, 1, 1], as `std`
    std: Tensor

    def __init__(self, model: nn.Module, config: ViTConfig) -> None:
        super().__init__()
        self.model, self.config = model, config
        self.register_buffer("mean", torch.tensor(config.pixel_mean)[:, None, None])
        self.register_buffer("std", torch.tensor(config.pixel_std)[:, None, None])

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        out: Tensor = self.model((pixels - self.mean) / self.std)
        if isinstance(self.model, Classifier):
            return (out,)
        patches = out[:, -self.config.num_patches :]
        return out[:, : self.config.cls_tokens].mean(dim=1), patches.mean(dim=1), patches


def export_onnx(
    store: Store,
    weights: Mapping[str, Tensor],
    config: ViTConfig,
    *,
    classes: Sequence[str] = (),
    origin: Origin = Origin(),  # noqa: B008 - frozen
) -> OnnxExport:
    """Write ViTEncoder(config) or, with `classes`, a fine-tuned Classifier as an ONNX program."""
    if missing := [name for name in _PACKAGES if find_spec(name) is None]:
        raise ConfigError(f"--format onnx needs {', '.join(missing)}: pip install 'mae-pipeline[onnx]'")
    module = _module(weights, config, classes)
    outputs = ("logits",) if classes else FEATURES
    with TemporaryDirectory(prefix="mae-onnx-") as scratch:
        path = Path(scratch) / PROGRAM
        _write_program(module, path, outputs)
        difference = largest_difference(module, path)
        if not difference <= TOLERANCE:  # also if it is NaN
            raise PipelineError(
                f"onnxruntime computes other values than torch (largest difference {difference:.2g}, allowed {TOLERANCE:g}), so "
                "nothing was written: try another version of onnxruntime, or --format safetensors"
            )
        files = sorted(file.name for file in path.parent.iterdir())
        for name in files:
            store.upload(name, path.with_name(name))
    store.write(README, card(config, _usage(config, outputs, difference), origin, classes=classes))
    labels = {"id2label": {str(number): name for number, name in enumerate(classes)}} if classes else {}
    body = {"encoder": canonical(config), "opset": OPSET, "outputs": list(outputs), **labels}
    store.write(CONFIG, json.dumps(body, indent=1, sort_keys=True).encode())
    return OnnxExport((*files, README, CONFIG), difference)


def largest_difference(module: nn.Module, path: Path) -> float:
    """Return the largest difference between onnxruntime and torch over random images, in batches of 1 and of 3."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    generator, found = torch.Generator().manual_seed(0), 0.0
    for batch in (1, 3):
        pixels = torch.rand(_shape(module, batch), generator=generator)
        with torch.inference_mode():
            ours = module(pixels)
        theirs = session.run(None, {"pixels": pixels.numpy()})
        found = max(found, *(float((torch.as_tensor(b) - a).abs().max()) for a, b in zip(ours, theirs, strict=True)))
    return found


def _module(weights: Mapping[str, Tensor], config: ViTConfig, classes: Sequence[str]) -> _WithScale:
    model: nn.Module = ViTEncoder(config)
    if classes:
        model = Classifier(model, num_classes=len(classes), generator=torch.Generator())  # type: ignore[arg-type]
    model.load_state_dict(dict(weights))
    return _WithScale(model, config).eval()


def _shape(module: Any, batch: int) -> tuple[int, ...]:
    return batch, module.config.in_channels, *module.config.image_size


def _write_program(module: nn.Module, path: Path, outputs: Sequence[str]) -> None:
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [one.level for one in loggers]
    size = sum(value.numel() * value.element_size() for value in module.state_dict().values())
    try:
        for one in loggers:
            one.setLevel(logging.ERROR)  # they narrate how they rewrite the graph
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module,
                (torch.zeros(_shape(module, 2)),),
                dynamo=True,
                opset_version=OPSET,
                input_names=["pixels"],
                output_names=list(outputs),
                dynamic_shapes={"pixels": {0: torch.export.Dim("batch", min=1)}},
                verbose=False,
            )
            assert program is not None  # noqa: S101 - with dynamo=True it never is
            program.save(path, external_data=size > _INLINE_BYTES)
    finally:
        for one, level in zip(loggers, levels, strict=True):
            one.setLevel(level)


def _usage(config: ViTConfig, outputs: Sequence[str], difference: float) -> Usage:
    import onnxruntime

    height, width = config.image_size
    one = len(outputs) == 1
    return Usage(
        library="onnx",
        what="image classifier" if one else "encoder",
        code="import onnxruntime\n\n"
        f'session = onnxruntime.InferenceSession("{PROGRAM}")\n'
        f'{outputs[0] + "," if one else ", ".join(outputs)} = session.run(None, {{"pixels": pixels}})',
        pixels=f"`pixels` is a NumPy array, float32 [batch, {config.in_channels}, {height}, {width}] in 0..1: an image divided by "
        "255. The mean and standard deviation that the model was trained with are part of the program. The batch is free.",
        notes=f"Opset {OPSET}. Checked with onnxruntime {onnxruntime.__version__} against torch {torch.__version__}: the largest "
        f"difference is {difference:.1e}.",
    )
