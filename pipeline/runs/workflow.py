"""The graph of a run: a RunConfig becomes Steps.

    snapshot -> shard [-> join] -> pretrain -> protocols x datasets x { pretrained, random } x seeds -> report

Weights from elsewhere (`weights`) replace the pretraining by their import, which needs no shards.

If the source has several snapshots, each is a part that is sharded by itself, and `join` writes one manifest over all of them.
An evaluation dataset that is the pretraining source shares its snapshots and shards. Evaluations of the random encoder do not
depend on pretraining, so that another mask ratio does not repeat them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from pipeline.config import Moved, RunConfig, SourceConfig, WeightsConfig
from pipeline.data.snapshots.config import SnapshotConfig
from pipeline.data.sources.listing import MOVED
from pipeline.data.sources.splits import SplitFrom
from pipeline.evaluation.protocol import EncoderOrigin, EvaluationProtocol, ProtocolConfig
from pipeline.evaluation.protocols import protocol_named
from pipeline.graph.step import Step, canonical
from pipeline.stages.import_weights import ASSUMED, FILE, ImportConfig, import_weights
from pipeline.stages.join import JoinConfig, join
from pipeline.stages.pretrain import MILESTONE_OPTIONS, START_ADDRESS, START_DECODER, pretrain
from pipeline.stages.report import ReportConfig, Scored, report
from pipeline.stages.shard import ShardStageConfig, shard
from pipeline.stages.snapshot import snapshot
from pipeline.training.checkpoints.format import resume_point
from pipeline.training.spec.train_spec import PretrainConfig
from pipeline.weights import StartSummary, start_summary

COMPARED_AT = "compared_at"
"""Option of snapshot and shard steps whose files have moved: `Moved.compared_at`."""
OUTSIDE = ("name", "store", "resources", "tracking")
"""Sections of the configuration that change no result. The report's fingerprint leaves them out."""


def build(config: RunConfig) -> list[Step]:
    """Return every step of the run, inputs before their readers."""
    own = _Source.of(config.data.source, config.data)
    shards = {own: _dataset(config, own, snapshot_names(config), suffix="")}
    start = start_of(config)
    pretrained = _import(config, config.weights) if config.weights else _pretraining(config, shards[own], start)
    evaluations: dict[str, Step] = {}
    scored: list[Scored] = []
    for dataset in config.evaluation.datasets:
        source = _Source.of(dataset.source, dataset) if dataset.source else own
        if source not in shards:  # its first snapshot only: --refresh grows the pretraining source, never a benchmark
            shards[source] = _dataset(config, source, snapshot_names(config)[:1], suffix=f"-{dataset.name}")
        for protocol in dataset.protocols:
            chosen = protocol_named(protocol)
            variants = chosen.variants(config.evaluation.settings(protocol))
            for (variant, settings), encoder, seed in product(
                variants.items(), chosen.origins, config.evaluation.seeds
            ):
                row = f"{protocol}{variant}"
                name = f"{row}-{dataset.name}-{encoder}-s{seed}"
                # the random encoder must not depend on pretraining, or a new mask ratio would score it again
                inputs = {"shards": shards[source]} | ({"pretrain": pretrained} if encoder == "pretrained" else {})
                evaluations[name] = _evaluation(config, name, chosen, settings, encoder, seed, inputs)
                scored.append(Scored(input=name, protocol=row, dataset=dataset.name, encoder=encoder))
    # Inputs of the report, named `shard` and `shard-<dataset>` also where they are joins: its fingerprint covers the names.
    datasets = {f"shard{s.name.removeprefix('join').removeprefix('shard')}": s for s in shards.values()}
    inside = {key: value for key, value in config.model_dump().items() if key not in OUTSIDE}
    # thresholds for bad images: they stop or warn and change no result
    inside["data"] = {key: value for key, value in inside["data"].items() if not key.startswith("bad_share")}
    inside["evaluation"] = {key: value for key, value in inside["evaluation"].items() if key not in MILESTONE_OPTIONS}
    if config.weights:  # the import's fingerprint stands for them, wherever they lie
        del inside["weights"]["file"], inside["weights"]["assumed"]
    # not the address: it changes no result
    inside["pretrain"]["start"] = f"sha256:{start.sha256}" if start else None
    page = Step(
        kind="report",
        name="report",
        function=report,
        config=ReportConfig(
            title="Evaluation of weights" if config.weights else "Masked autoencoder",
            scored=tuple(scored),
            sources={name: source.uri for name, source in zip(datasets, shards, strict=True)},
            config=canonical(inside),
        ),
        inputs={**datasets, pretrained.kind: pretrained, **evaluations},
    )
    parts = [part for step in shards.values() for part in (step.inputs.values() if step.kind == "join" else [step])]
    snapshots = [step.inputs["snapshot"] for step in parts]
    joins = [step for step in shards.values() if step.kind == "join"]
    return [*snapshots, *parts, *joins, pretrained, *evaluations.values(), page]


def _pretraining(config: RunConfig, shards: Step, start: StartSummary | None) -> Step:
    return Step(
        kind="pretrain",
        name="pretrain",
        function=pretrain,
        config=PretrainConfig(
            model=config.model,
            recipe=config.pretrain.recipe,
            seed=config.seed,
            start=config.fork,
            start_sha256=start.sha256 if start else "",
        ),
        inputs={"shards": shards},
        resources=config.resources,
        options={
            **{name: getattr(config.evaluation, name) for name in MILESTONE_OPTIONS},
            **({START_ADDRESS: config.pretrain.start, START_DECODER: config.pretrain.start_decoder} if start else {}),
        },
        resume_point=resume_point,
    )


def _import(config: RunConfig, weights: WeightsConfig) -> Step:
    return Step(
        kind="import",
        name="import",
        function=import_weights,
        config=ImportConfig(sha256=weights.sha256, prefix=weights.prefix, encoder=config.model.encoder),
        options={FILE: weights.file, ASSUMED: weights.assumed},
        resources=config.resources,
    )


def start_of(config: RunConfig) -> StartSummary | None:
    """Return the weights that pretraining starts from; None for random ones and for a fork. Reads them, once per process."""
    recipe = config.pretrain
    return start_summary(recipe.start, config.model, decoder=recipe.start_decoder) if recipe.start else None


@dataclass(frozen=True)
class _Source:
    """The address of images and how to read them. Equal sources share their snapshots and shards."""

    uri: str
    labels: str | None
    image_column: str
    label_column: str | None
    split_column: str | None
    split_from: SplitFrom | None
    moved: Moved | None

    @classmethod
    def of(cls, uri: str, reading: SourceConfig) -> "_Source":
        return cls(uri, **{name: getattr(reading, name) for name in SourceConfig.model_fields}, moved=reading.moved)

    @property
    def options(self) -> dict[str, Any]:
        """Where the steps find the files, if they have moved. Outside the fingerprints, as all options are."""
        if self.moved is None:
            return {}
        return {
            MOVED: {"source": self.moved.source, "labels": self.moved.labels},
            COMPARED_AT: self.moved.compared_at,
        }


def snapshot_names(config: RunConfig) -> tuple[str, ...]:
    """Return the names of the snapshots of data.source, oldest first."""
    names = config.data.snapshot
    return (names,) if isinstance(names, str) else names


def parts_of_sources(config: RunConfig) -> dict[str, list[Step]]:
    """Return the shard steps of each source, oldest part first, by the section that names it: `data`, `evaluation.datasets.0`."""
    own = _Source.of(config.data.source, config.data)
    found, seen = {"data": _parts(config, own, snapshot_names(config), suffix="")}, {own}
    for number, dataset in enumerate(config.evaluation.datasets):
        source = _Source.of(dataset.source, dataset) if dataset.source else own
        if source not in seen:
            parts = _parts(config, source, snapshot_names(config)[:1], suffix=f"-{dataset.name}")
            found[f"evaluation.datasets.{number}"] = parts
        seen.add(source)
    return found


def _parts(config: RunConfig, source: _Source, names: Sequence[str], *, suffix: str) -> list[Step]:
    """One shard step per snapshot."""
    return [_shards(config, source, step) for step in _listings(config, source, names, suffix=suffix)]


def _dataset(config: RunConfig, source: _Source, names: Sequence[str], *, suffix: str) -> Step:
    """The shard step of a source or, if it has several snapshots, the join of their shards."""
    parts = _parts(config, source, names, suffix=suffix)
    if len(parts) == 1:
        return parts[0]
    return Step(
        kind="join",
        name=f"join{suffix}",
        function=join,
        config=JoinConfig(source=source.uri, snapshots=tuple(names)),
        inputs=_numbered(parts),
    )


def _listings(config: RunConfig, source: _Source, names: Sequence[str], *, suffix: str) -> list[Step]:
    """One snapshot step per name. Each lists the images that the earlier ones do not."""
    steps: list[Step] = []
    for number, name in enumerate(names, 1):
        taken = SnapshotConfig(
            source=source.uri,
            snapshot=name,
            test_share=config.data.test_share,
            seed=config.data.seed,
            labels=source.labels,
            image_column=source.image_column,
            label_column=source.label_column,
            split_column=source.split_column,
            split_from=source.split_from,
        )
        part = (
            f".{number}" if steps else ""
        )  # the first keeps its name, so that later parts do not change its fingerprint
        steps.append(
            Step(
                kind="snapshot",
                name=f"snapshot{part}{suffix}",
                function=snapshot,
                config=taken,
                inputs=_numbered(steps),
                options=source.options,
            )
        )
    return steps


def _numbered(parts: Sequence[Step]) -> dict[str, Step]:
    # fixed width: readers take the parts sorted by name
    return {f"part{number:04d}": step for number, step in enumerate(parts, 1)}


def _shards(config: RunConfig, source: _Source, listing: Step) -> Step:
    """The shard step of a snapshot."""
    data = config.data
    return Step(
        kind="shard",
        # shard.2 belongs to snapshot.2, so a later part changes no name of an earlier one
        name=listing.name.replace("snapshot", "shard", 1),
        function=shard,
        config=ShardStageConfig(
            source=source.uri,
            seed=data.seed,
            shard_max_bytes=data.shard_max_bytes,
            min_shards=data.min_shards,
            image_max_short_side=data.image_max_short_side,
            image_max_pixels=data.image_max_pixels,
            image_column=source.image_column,
            label_column=source.label_column,
        ),
        inputs={"snapshot": listing},
        options={"bad_share_stop": data.bad_share_stop, **source.options},
    )


def _evaluation(
    config: RunConfig,
    name: str,
    protocol: EvaluationProtocol,
    settings: Any,
    origin: EncoderOrigin,
    seed: int,
    inputs: Mapping[str, Step],
) -> Step:
    evaluation = config.evaluation
    common = ProtocolConfig(
        encoder=config.model.encoder,
        weights=origin,
        train_labels=evaluation.train_labels,
        seed=seed,
        split=evaluation.split,
    )
    return Step(
        kind="evaluate",
        name=name,
        function=protocol.evaluate,
        config=protocol.step_config(common, settings),
        inputs=inputs,
        resources=config.resources,
        resume_point=protocol.resume_point,
    )
