"""The report of a run: scores, loss and speed curves, reconstructions before and after training, data, steps, configuration.

Output: index.html (self-contained), reconstructions.png, curves.png, scores.png. They hold times and are therefore not among the
receipt's hashed files (docs/decisions/002-what-a-receipt-vouches-for.md); the scores are in its facts."""

import datetime
import io
import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from pipeline.data.dataset.facts import DatasetFacts, SplitLabels
from pipeline.evaluation.protocol import ScoreFacts
from pipeline.graph.receipts import installed_versions
from pipeline.graph.step import Attempt, StageInput, StageResult
from pipeline.reporting.figures import Curves, curve_png, scores_png
from pipeline.reporting.format import count
from pipeline.reporting.page import Card, DatasetCard, ReportData, render_page
from pipeline.reporting.reconstructions import reconstruction_grid_png
from pipeline.reporting.summaries import Score, StepRow
from pipeline.training.facts import PretrainFacts
from pipeline.weights import ENCODER, ImportFacts

VERSION = 1
PAGE = "index.html"
PICTURES = ("reconstructions.png", "curves.png", "scores.png")


@dataclass(frozen=True, kw_only=True)
class Scored:
    """An evaluation step among the report's inputs."""

    input: str
    """Its name there."""
    protocol: str
    dataset: str
    encoder: Literal["pretrained", "random"]


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """What the report shows."""

    title: str
    scored: tuple[Scored, ...]
    sources: Mapping[str, str]
    """Address of the images for every input that is a dataset; the one for pretraining is named `shard`."""
    config: Mapping[str, Any]
    """The resolved configuration, without the fields that change no result."""


def report(config: ReportConfig, inputs: Mapping[str, StageInput], attempt: Attempt) -> StageResult:
    """Draw the pictures and write the page."""
    scores = collect_scores(config.scored, inputs)
    pretrained = _pretrained(config, inputs) if "pretrain" in inputs else _imported(config, inputs["import"])
    pictures = dict(pretrained.pictures)
    if any(not score.measure for score in scores):
        pictures["scores.png"] = scores_png(scores)
    for name, png in pictures.items():
        attempt.store.write(name, png)
    page = render_page(
        ReportData(
            title=config.title,
            summary=pretrained.summary,
            created=datetime.datetime.now(tz=datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
            scores=scores,
            cards=pretrained.cards,
            reconstructions_png=pictures.get("reconstructions.png"),
            reconstructions_note=pretrained.note,
            curves_png=pictures.get("curves.png"),
            scores_png=pictures.get("scores.png"),
            datasets=[_dataset_card(name, config, inputs) for name in config.sources],
            steps=[_step_row(name, step) for name, step in inputs.items()],
            config=config.config,
            versions=installed_versions(),
            hardware={"machine": platform.machine(), "CPUs": str(os.cpu_count()), "system": platform.platform()},
            command=pretrained.command,
            addresses={**pretrained.addresses, "data": inputs["shard"].root_uri},
        )
    )
    attempt.store.write(PAGE, page.encode())
    return StageResult(
        {"page": PAGE, "scores": {f"{s.protocol}/{s.dataset}/{s.encoder}": list(s.values) for s in scores}}
    )


@dataclass(frozen=True, kw_only=True)
class _Origin:
    """What the page says of where the encoder comes from."""

    summary: str
    command: str
    addresses: Mapping[str, str]
    cards: Sequence[Card] = ()
    pictures: Mapping[str, bytes] = field(default_factory=dict)
    note: str = ""
    """On the reconstructions."""


def _pretrained(config: ReportConfig, inputs: Mapping[str, StageInput]) -> _Origin:
    pretrained, model = inputs["pretrain"], config.config["model"]
    shown = "held-out" if DatasetFacts.read(inputs["shard"].facts).panel_split == "test" else "training"
    panel = np.load(io.BytesIO(pretrained.store.read("reconstructions.npz")), allow_pickle=False)["images"]
    rows = [json.loads(line) for line in pretrained.store.read("history.jsonl").splitlines()]
    normalised = model["target"] == "normalised"
    loss = f"{PretrainFacts.read(pretrained.facts).loss:.3f}"
    return _Origin(
        summary=_summary(config, inputs),
        command="mae run CONFIG.yaml",
        addresses={"encoder": f"{pretrained.store.uri}/{ENCODER}"},
        cards=(Card(label="final loss", value=loss, note=f"on {model['loss_on']} patches"), _speed(rows)),
        pictures={
            "reconstructions.png": reconstruction_grid_png(panel, statistics="true" if normalised else "predicted"),
            "curves.png": curve_png(_curves(rows)),
        },
        note=f"{len(panel)} {shown} images, {model['mask_ratio']:.0%} of the patches hidden",
    )


def _imported(config: ReportConfig, imported: StageInput) -> _Origin:
    facts, told = ImportFacts.read(imported.facts), imported.made.get("notes", {})
    file, assumed = str(told.get("file", "")), ", ".join(told.get("assumed", ()))
    understood = [f"{facts.layout} weights {file}", *([f"assumed {assumed}"] if assumed else []), *facts.notes]
    return _Origin(
        summary="; ".join([_encoder_text(config), *understood]),
        command="mae evaluate WEIGHTS --data DIR",
        addresses={
            "weights": file,
            "their SHA-256": facts.sha256,
            "encoder": f"{imported.store.uri}/{ENCODER}",
        },
    )


def collect_scores(scored: tuple[Scored, ...], inputs: Mapping[str, StageInput]) -> list[Score]:
    """Collect the scores over seeds, in order of first appearance. Skipped evaluations have none."""
    found: dict[tuple[str, str, str], list[ScoreFacts]] = {}
    for one in scored:
        facts = ScoreFacts.read(inputs[one.input].facts)
        if facts.score is not None:
            found.setdefault((one.protocol, one.dataset, one.encoder), []).append(facts)
    return [
        Score(
            protocol=protocol,
            dataset=dataset,
            encoder=encoder,
            values=tuple(facts.score for facts in seeds if facts.score is not None),
            images=seeds[0].images,
            labels=seeds[0].labels,
            measure=seeds[0].measure or "",
            setting=seeds[0].setting or "",
            others=_other_settings(seeds),
        )
        for (protocol, dataset, encoder), seeds in found.items()
    ]


def _other_settings(seeds: Sequence[ScoreFacts]) -> dict[str, tuple[float, ...]]:
    settings = dict.fromkeys(key for facts in seeds for key in facts.top1_by_setting or {} if key != facts.setting)
    return {key: tuple((facts.top1_by_setting or {})[key] for facts in seeds) for key in settings}


def _speed(rows: Sequence[Mapping[str, float]]) -> Card:
    """Images per second, and the shares of time spent waiting. Histories of older versions lack some of the columns."""
    shares = {"mfu": "of the peak used", "data_wait": "waiting for data", "checkpoint_wait": "for checkpoints"}
    means = {key: statistics.fmean(row[key] for row in rows if key in row) for key in shares if key in rows[-1]}
    note = ", ".join(f"{100 * means[key]:.1f} % {label}" for key, label in shares.items() if key in means)
    # the median: pauses for checkpoints and a slow start say nothing about the speed
    speed = statistics.median(row["images_per_s"] for row in rows)
    return Card(label="pretraining speed", value=f"{count(speed)} images/s", note=note)


def _curves(rows: Sequence[Mapping[str, Any]]) -> Curves:
    return Curves(
        steps=[row["step"] for row in rows],
        images_seen=[row["images"] for row in rows],
        loss=[row["loss"] for row in rows],
        learning_rate=[row["lr"] for row in rows],
        images_per_s=[row["images_per_s"] for row in rows],
        milestones=_milestones(rows),
    )


def _milestones(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """Return (global step, accuracy) of the checkpoints that were scored along the way, by protocol."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for protocol in ("knn", "ridge", "probe"):
            if f"milestone_{protocol}" in row:
                # The row is that of the step at which the score became known.
                step = row["milestone_images"] * row["step"] / row["images"]
                found.setdefault(protocol, []).append((step, row[f"milestone_{protocol}"]))
    return found


def _summary(config: ReportConfig, inputs: Mapping[str, StageInput]) -> str:
    recipe = config.config["pretrain"]
    served = DatasetFacts.read(inputs["shard"].facts).counts.splits["train"].served
    return (
        f"{_encoder_text(config)}; pretrained on {served} images, {recipe['epochs']} epochs at a global batch of "
        f"{recipe['global_batch']}"
    )


def _encoder_text(config: ReportConfig) -> str:
    encoder = config.config["model"]["encoder"]
    height, width = encoder["image_size"]
    return f"ViT {encoder['embed_dim']} wide, {encoder['depth']} deep, patch {encoder['patch_size']}, {height} x {width} px"


def _dataset_card(name: str, config: ReportConfig, inputs: Mapping[str, StageInput]) -> DatasetCard:
    facts = DatasetFacts.read(inputs[name].facts)
    total = facts.counts.total
    return DatasetCard(
        name=name,
        source=config.sources[name],
        listed=total.listed,
        stored=total.stored,
        served=total.served,
        duplicates=total.duplicates,
        quarantined=total.quarantined,
        splits=tuple(_in_words(split, known) for split, known in (facts.labels or {}).items()),
        reasons=tuple((bad.source, bad.reason) for bad in facts.quarantine_examples),
        digest=facts.digest,
    )


def _in_words(split: str, known: SplitLabels) -> str:
    """Return a split's images, labels and classes. A score on classes that training lacks says little of the encoder."""
    text = f"{split}: {count(known.images)} images, {count(known.labelled)} labelled, {count(known.classes)} classes"
    return f"{text}; train has none of {', '.join(known.not_in_train)}" if known.not_in_train else text


def _step_row(name: str, step: StageInput) -> StepRow:
    return StepRow(
        name=name,
        state="done",
        fingerprint=step.fingerprint,
        seconds=float(step.made["seconds"]),
        generation=step.generation,
        uri=step.root_uri,
        detail=str(step.facts.get("skipped", "")),
    )
