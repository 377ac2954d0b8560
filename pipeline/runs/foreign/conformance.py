"""Whether weights are read rightly and score as published: checks, each with its outcome and what it rests on.

Without images: every tensor is accounted for, nothing had to be assumed, and tokens of fixed random images equal those of timm and
transformers. With ImageNet: the accuracy, against the figures that were published for the released weights.
Units: accuracies in per cent, differences in percentage points. Errors: those of the run on ImageNet."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mae_core.config import SIZES, ViTConfig
from pipeline.cluster.tasks import Executor
from pipeline.errors import ConfigError, DataError
from pipeline.runs.foreign.evaluation import evaluation_of
from pipeline.runs.foreign.libraries import Outputs, our_outputs, timm_outputs, transformers_outputs
from pipeline.runs.sources.state import settled_for_run
from pipeline.runs.terminal import run_and_show
from pipeline.weights import GivenWeights, StatedFields, read_given

TOLERANCE = 1e-3
"""Largest difference between two programs' outputs, as a share of the outputs' root mean square. Rounding in float32 stays below
1e-4 through 40 blocks; another number of heads, norm or position table makes a difference above 1e-2."""
IMAGES = 4
LINEAR: Mapping[str, float] = {"base": 67.8, "large": 76.0, "huge": 77.2}
"""Linear probe of the released pretrained weights on ImageNet-1k (facebookresearch/mae, FINETUNE.md)."""
FINETUNED: Mapping[str, float] = {"base": 83.664, "large": 85.952, "huge": 86.928}
"""Accuracy of the released fine-tuned classifiers on ImageNet-1k at 224 pixels (there)."""
LINEAR_TOLERANCE, FINETUNED_TOLERANCE = 0.3, 0.1
"""A probe is trained anew, and seeds differ by up to 0.1; a finished classifier differs by decoding and resizing alone."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    state: Literal["passed", "failed", "not checked"]
    detail: str


class Published(NamedTuple):
    """A published accuracy, and the protocol that has to reach it."""

    protocol: str
    accuracy: float
    tolerance: float


def checks_without_images(
    path: Path, stated: StatedFields, *, prefix: str | None
) -> tuple[GivenWeights | None, list[Check]]:
    """Return the weights, if they could be read, and the checks that need no data."""
    try:
        given = read_given(path, stated, prefix=prefix)
    except (ConfigError, DataError) as problem:
        return None, [Check("tensors", "failed", str(problem))]
    left_out = given.report.left_out
    names = f"{', '.join(left_out[:4])}{f' and {len(left_out) - 4} more' * (len(left_out) > 4)}"
    checks = [
        Check(
            "tensors",
            "passed",
            f"layout {given.facts.layout}: {len(given.weights)} tensors of {given.facts.parameters:,} finite values are taken; "
            f"left out: {names or 'none'}",
        ),
        _stated(given),
    ]
    pixels = torch.randn(
        IMAGES, given.config.in_channels, *given.config.image_size, generator=torch.Generator().manual_seed(0)
    )
    ours = our_outputs(given, pixels)
    for name, run in (("timm", timm_outputs), ("transformers", transformers_outputs)):
        checks += _compared(name, ours, run(path, given, pixels, prefix=prefix))
    return given, checks


def _stated(given: GivenWeights) -> Check:
    if not given.report.assumed:
        return Check("configuration", "passed", "the file, or an option, states heads, eps and the scale of pixels")
    return Check("configuration", "not checked", f"nobody states {', '.join(given.report.assumed)}: assumed")


def _compared(name: str, ours: Outputs, theirs: Outputs | str) -> list[Check]:
    if isinstance(theirs, str):
        return [Check(f"{name} tokens", "not checked", theirs)]
    pairs = [("tokens", ours.tokens, theirs.tokens)]
    if ours.scores is not None and theirs.scores is not None:
        pairs.append(("scores", ours.scores, theirs.scores))
    return [_equal(f"{name} {what}", one, other, theirs.through) for what, one, other in pairs]


def _equal(name: str, ours: Tensor, theirs: Tensor, through: str) -> Check:
    if ours.shape != theirs.shape:
        return Check(name, "failed", f"{tuple(ours.shape)} here, {tuple(theirs.shape)} there ({through})")
    largest = float((ours - theirs).abs().max())
    share = largest / max(float(theirs.square().mean().sqrt()), 1e-30)
    return Check(
        name,
        "passed" if share <= TOLERANCE else "failed",
        f"largest difference {largest:.1e}, {share:.1e} of their root mean square; up to {TOLERANCE:g} is rounding ({through})",
    )


def published_score(
    path: Path,
    given: GivenWeights,
    imagenet: str,
    *,
    store: str,
    prefix: str | None,
    options: Mapping[str, str | int | float | None],
    overrides: Sequence[str],
    executor: Executor,
) -> Check:
    """Score the weights on ImageNet as their figure was published, and compare. Without ImageNet, say what is expected."""
    expected = published(given.config, classes=given.facts.classes)
    if not imagenet:
        what = (
            f"{expected.accuracy:g} % by {expected.protocol} if these are the released weights"
            if expected
            else "no figure"
        )
        return Check("ImageNet", "not checked", f"--imagenet DIR would score them; expected: {what}")
    protocol = expected.protocol if expected else "own_head" if given.head else "linear_online"
    evaluation = ["evaluation.split=val", *(["evaluation.preset=mae-paper"] if protocol == "linear_online" else [])]
    _, config = evaluation_of(
        path,
        imagenet,
        protocols=protocol,
        store=store,
        prefix=prefix,
        options=options,
        overrides=[*evaluation, *overrides],
    )
    summary = run_and_show(settled_for_run(config, say=lambda _: None, record=True), executor=executor)
    score = next((one for one in summary.scores if (one.protocol, one.encoder) == (protocol, "pretrained")), None)
    if score is None:
        return Check("ImageNet", "failed", f"{protocol} gave no score: the table above says why")
    return judged(given, 100 * score.mean, protocol, expected)


def published(config: ViTConfig, *, classes: int | None) -> Published | None:
    """Return the published accuracy of the released weights of this form, or None if none of them has it."""
    form = ("embed_dim", "depth", "num_heads", "patch_size", "image_size")
    size = next(
        (
            name
            for name in LINEAR
            if all(getattr(SIZES[name](), field) == getattr(config, field) for field in form)
            and not config.num_register_tokens
        ),
        None,
    )
    if size is None or classes not in (None, 1000):
        return None
    if classes:
        return Published("own_head", FINETUNED[size], FINETUNED_TOLERANCE)
    return Published("linear_online", LINEAR[size], LINEAR_TOLERANCE)


def judged(given: GivenWeights, accuracy: float, protocol: str, expected: Published | None) -> Check:
    """Compare an accuracy with the published one."""
    if expected is None:
        return Check(
            "ImageNet", "not checked", f"{protocol} {accuracy:.2f} %; no figure is published for such an encoder"
        )
    difference = accuracy - expected.accuracy
    text = f"{protocol} {accuracy:.2f} %, published {expected.accuracy:g} % ({difference:+.2f}, allowed {expected.tolerance:g})"
    if abs(difference) <= expected.tolerance:
        return Check("ImageNet", "passed", text)
    return Check("ImageNet", "failed", f"{text}. Likely: {'; '.join(likely_reasons(given, accuracy, difference))}")


def likely_reasons(given: GivenWeights, accuracy: float, difference: float) -> list[str]:
    """Return what most often makes such a difference, the likeliest first."""
    config, assumed = given.config, " ".join(given.report.assumed)
    reasons = []
    if accuracy < 1 and given.head:
        reasons.append("the class folders are not in the order of the head's outputs (names of WordNet ids, sorted)")
    if difference < -2 and "num_heads" in assumed:
        reasons.append(f"another number of heads than {config.num_heads} (--num-heads)")
    if "pixel_mean" in assumed or "pixel_std" in assumed:
        reasons.append("another normalisation of pixels (--pixel-mean, --pixel-std)")
    if config.layer_norm_eps < 1e-6:
        reasons.append("layer_norm_eps=1e-12 of Hugging Face, where training had 1e-6 (--layer-norm-eps 1e-6)")
    if any(note.startswith("positions resized") for note in given.facts.notes):
        reasons.append("positions resized to another image size than that of the weights")
    if not reasons or abs(difference) < 2:
        reasons.append(
            "another crop (here 224 of 256 pixels) or interpolation (here bicubic), or images that were re-encoded"
        )
    reasons.append("other weights than the released ones of this form")
    return reasons
