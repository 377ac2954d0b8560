"""The whole graph on one screen: a RunConfig becomes Steps.

    snapshot -> shard -> pretrain -> { linear, finetune } x datasets x { pretrained, random } x seeds -> report
An evaluation dataset that is the pretraining source itself shares its snapshot and shards. The random encoder's evaluations do
not depend on pretraining, so another mask ratio does not run them again."""

from collections.abc import Mapping
from typing import Any, Literal

from pipeline.config import RunConfig
from pipeline.graph.step import Step, canonical
from pipeline.stages.finetune import FinetuneConfig, finetune
from pipeline.stages.linear import LinearStageConfig, linear
from pipeline.stages.pretrain import PretrainConfig, pretrain
from pipeline.stages.report import ReportConfig, Scored, report
from pipeline.stages.shard import ShardStageConfig, shard
from pipeline.stages.snapshot import SnapshotConfig, snapshot
from pipeline.training.checkpoints import resume_point

OUTSIDE = ("name", "store", "resources", "tracking")
"""Sections of the configuration that decide no result."""
Encoder = Literal["pretrained", "random"]
ENCODERS: tuple[Encoder, ...] = ("pretrained", "random")


def build(config: RunConfig) -> list[Step]:
    """Every step of the run, inputs before what reads them."""
    resources = config.resources.model_dump()
    shards = {config.data.source: _shards(config, config.data.source, suffix="")}
    pretrained = Step(
        name="pretrain",
        function=pretrain,
        config=PretrainConfig(model=config.model, recipe=config.pretrain, seed=config.seed),
        inputs={"shards": shards[config.data.source]},
        resources=resources,
        resume_point=resume_point,
    )
    evaluations: dict[str, Step] = {}
    scored: list[Scored] = []
    for dataset in config.evaluation.datasets:
        source = dataset.source or config.data.source
        if source not in shards:
            shards[source] = _shards(config, source, suffix=f"-{dataset.name}")
        for protocol in dataset.protocols:
            for encoder in ENCODERS:
                for seed in config.evaluation.seeds:
                    name = f"{protocol}-{dataset.name}-{encoder}-s{seed}"
                    inputs = {"shards": shards[source]} | ({"pretrain": pretrained} if encoder == "pretrained" else {})
                    evaluations[name] = _evaluation(config, name, protocol, encoder, seed, inputs, resources)
                    scored.append(Scored(input=name, protocol=protocol, dataset=dataset.name, encoder=encoder))
    datasets = {step.name: step for step in shards.values()}
    inside = {key: value for key, value in config.model_dump().items() if key not in OUTSIDE}
    inside["data"] = {key: value for key, value in inside["data"].items() if not key.startswith("bad_share")}
    page = Step(
        name="report",
        function=report,
        config=ReportConfig(
            title="Masked autoencoder",
            scored=tuple(scored),
            sources={step.name: source for source, step in shards.items()},
            config=canonical(inside),
        ),
        inputs={**datasets, "pretrain": pretrained, **evaluations},
    )
    snapshots = [step.inputs["snapshot"] for step in shards.values()]
    return [*snapshots, *shards.values(), pretrained, *evaluations.values(), page]


def _shards(config: RunConfig, source: str, *, suffix: str) -> Step:
    """The snapshot of a source and its shards."""
    data = config.data
    listing = Step(
        name=f"snapshot{suffix}",
        function=snapshot,
        config=SnapshotConfig(source=source, snapshot=data.snapshot, test_share=data.test_share, seed=data.seed),
    )
    return Step(
        name=f"shard{suffix}",
        function=shard,
        config=ShardStageConfig(
            source=source,
            seed=data.seed,
            shard_max_bytes=data.shard_max_bytes,
            min_shards=data.min_shards,
            image_max_short_side=data.image_max_short_side,
            image_max_pixels=data.image_max_pixels,
        ),
        inputs={"snapshot": listing},
        resources={"bad_share_warn": data.bad_share_warn, "bad_share_stop": data.bad_share_stop},
    )


def _evaluation(
    config: RunConfig,
    name: str,
    protocol: Literal["linear", "finetune"],
    encoder: Encoder,
    seed: int,
    inputs: Mapping[str, Step],
    resources: Mapping[str, Any],
) -> Step:
    evaluation, shape = config.evaluation, config.model.encoder
    if protocol == "linear":
        probe = LinearStageConfig(
            encoder=shape, weights=encoder, probe=evaluation.linear, train_labels=evaluation.train_labels, seed=seed
        )
        return Step(name=name, function=linear, config=probe, inputs=inputs, resources=resources)
    tuning = FinetuneConfig(
        encoder=shape, weights=encoder, recipe=evaluation.finetune, train_labels=evaluation.train_labels, seed=seed
    )
    return Step(
        name=name, function=finetune, config=tuning, inputs=inputs, resources=resources, resume_point=resume_point
    )
