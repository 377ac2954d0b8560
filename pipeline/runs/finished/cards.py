"""What a model card says of weights from a store: their data, lineage, scores, and how to make them again.

All of it is read from receipts. Steps are found by fingerprint in the store's history, so that no configuration is needed."""

import datetime
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from pipeline.data.dataset.facts import DatasetFacts, SnapshotFacts
from pipeline.graph.plan import HISTORY
from pipeline.graph.receipts import Receipt, read_receipt
from pipeline.graph.step import StageInput
from pipeline.reporting.summaries import Score, pairs
from pipeline.stages.report import Scored, collect_scores
from pipeline.storage import Store
from pipeline.weights import Origin, Result

NOT_STATED = "not stated (`mae model export --data-terms TEXT` writes them here)"


@dataclass(frozen=True)
class Finished:
    """Finished steps of a store, by fingerprint."""

    store: Store
    directories: Mapping[str, str]
    """First 12 digits of the fingerprint -> the step's directory."""

    @classmethod
    def of(cls, store: Store) -> "Finished":
        """Read the store's history, one listing."""
        names = [info.key.removeprefix(HISTORY).removesuffix(".json").split("/") for info in store.list(HISTORY)]
        return cls(store, {name[1]: "-".join(name) for name in names if len(name) == 2})

    def step(self, fingerprint: str) -> tuple[StageInput, Receipt] | None:
        """Return a finished step and its receipt, or None if it is not in this store."""
        directory = self.directories.get(fingerprint[:12])
        root = self.store.at(directory) if directory else None
        receipt = read_receipt(root) if root else None
        return (receipt.as_input(root.uri), receipt) if root and receipt else None

    def named(self, name: str) -> list[str]:
        """Return the directories of the steps of a name."""
        return [directory for key, directory in self.directories.items() if directory == f"{name}-{key}"]


@dataclass(frozen=True, kw_only=True)
class Described:
    """The step that weights come from."""

    name: str
    """Of the run; empty if it is not known."""
    directory: str
    fingerprint: str
    identity: Mapping[str, Any]
    receipt: Receipt | None
    """None for a checkpoint of a training that goes on."""
    checkpoint: str
    """Key of the checkpoint that holds the weights."""

    @property
    def is_classifier(self) -> bool:
        """Whether it is a fine-tuned classifier rather than a pretraining."""
        return self.receipt is not None and self.receipt.kind == "evaluate"


def origin_of(made: Described, finished: Finished, *, terms: str | None) -> Origin:
    """Return what the model card of a pretraining or of a fine-tuned classifier says of its origin."""
    report = _report(made, finished)
    scores = _scores(made, report, finished) if report else []
    sections = {
        "Data": _data(made, finished, terms),
        "Lineage": "\n".join(f"- {line}" for line in _lineage(made, finished)),
        "Scores": _score_table(scores),
        "Reproduce": _reproduce(made, report),
    }
    results = [
        Result(
            dataset=one.dataset,
            name=f"top-1 accuracy, {one.protocol}{f' ({len(one.values)} seeds)' * (len(one.values) > 1)}",
            percent=100 * one.mean,
        )
        for one in scores
        if not one.measure and (one.encoder == "pretrained" or made.is_classifier)
    ]
    return Origin(name=made.name, sections=sections, results=results)


def _data(made: Described, finished: Finished, terms: str | None) -> str:
    """Describe the dataset that was trained on, as a table."""
    rows = {"terms": terms or NOT_STATED}
    if found := finished.step(made.identity["inputs"]["shards"]):
        done, receipt = found
        facts = DatasetFacts.read(receipt.facts)
        splits = (f"{name} {counts.served:,}" for name, counts in facts.counts.splits.items())
        rows = {
            "source": ", ".join(dict.fromkeys(f"`{one}`" for one in _sources(receipt, finished)))
            or "not in this store",
            "images": f"{', '.join(splits)}; {facts.quarantined:,} unreadable, {facts.counts.total.duplicates:,} duplicates",
            "classes": f"{len(facts.classes):,}",
            "manifest": f"`{facts.digest}` in `{done.root_uri.rpartition('/')[2]}`",
            **rows,
        }
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows.items())


def _sources(dataset: Receipt, finished: Finished) -> Iterator[str]:
    """Yield the address of every snapshot below a shard or join step."""
    for _, receipt in _ancestors(dataset, finished):
        if receipt.kind == "snapshot":
            yield SnapshotFacts.read(receipt.facts).source


def _ancestors(receipt: Receipt, finished: Finished) -> Iterator[tuple[StageInput, Receipt]]:
    """Yield every step below one, each once."""
    seen: set[str] = set()
    waiting = list(receipt.identity["inputs"].values())
    while waiting:
        fingerprint = waiting.pop(0)
        if fingerprint in seen or not (found := finished.step(fingerprint)):
            continue
        seen.add(fingerprint)
        yield found
        waiting += found[1].identity["inputs"].values()


def _lineage(made: Described, finished: Finished) -> Iterator[str]:
    """Yield one line for each step on the way from the weights to the source."""
    config, encoder = made.identity["config"], "pretrain" in made.identity["inputs"]
    what = "classifier" if made.is_classifier else "encoder"
    yield f"{what}: `{made.directory}`, checkpoint `{made.checkpoint}`, fingerprint `{made.fingerprint}`"
    if encoder and (found := finished.step(made.identity["inputs"]["pretrain"])):
        done, receipt = found
        config, checkpoint = receipt.identity["config"], receipt.made["notes"].get("checkpoint", "")
        yield f"encoder: `{_directory(done)}`, checkpoint `{checkpoint}`, fingerprint `{receipt.fingerprint}`"
    if start := config.get("start"):
        yield f"continues from checkpoint `{start['checkpoint']}` (manifest sha256 `{start['manifest_sha256']}`)"
    if digest := config.get("start_sha256"):
        yield f"started from imported weights, sha256 of their tensors `{digest}`"
    if made.is_classifier and not encoder:
        yield "started from random weights"
    yield from _lineage_of_data(made, finished)
    if made.receipt:
        about = made.receipt.made
        versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        when = datetime.datetime.fromtimestamp(about["time"], tz=datetime.UTC)
        revision = about.get("revision", "unknown")
        yield f"made {when:%Y-%m-%d} by code revision `{revision}`, Python {about['python']}, {versions}"


def _lineage_of_data(made: Described, finished: Finished) -> Iterator[str]:
    if not (found := finished.step(made.identity["inputs"]["shards"])):
        return
    done, receipt = found
    facts = DatasetFacts.read(receipt.facts)
    yield f"shards: `{_directory(done)}`, {facts.shards:,} shards, manifest digest `{facts.digest}`"
    for below, one in _ancestors(receipt, finished):
        if one.kind == "snapshot":
            listed = SnapshotFacts.read(one.facts)
            yield f"snapshot: `{_directory(below)}`, {listed.listed:,} listed in `{listed.source}`"


def _directory(step: StageInput) -> str:
    return step.root_uri.rpartition("/")[2]


def _report(made: Described, finished: Finished) -> Receipt | None:
    """Return the newest report that reads the step."""
    reports = [found[1] for name in finished.named("report") if (found := finished.step(name.rpartition("-")[2]))]
    about = [one for one in reports if made.fingerprint in one.identity["inputs"].values()]
    return max(about, key=lambda one: float(one.made["time"]), default=None)


def _scores(made: Described, report: Receipt, finished: Finished) -> list[Score]:
    """Return the scores of a report: of all its protocols for an encoder, its own for a classifier."""
    prints = report.identity["inputs"]
    scored = [Scored(**one) for one in report.identity["config"]["scored"]]
    scored = [one for one in scored if not made.is_classifier or prints[one.input] == made.fingerprint]
    inputs = {one.input: found[0] for one in scored if (found := finished.step(prints[one.input]))}
    return collect_scores(tuple(one for one in scored if one.input in inputs), inputs)


def _score_table(scores: list[Score]) -> str:
    if not scores:
        return "Not evaluated, or the report of the run is not finished."
    lines = ["| Dataset | Protocol | Pretrained | Random weights | Seeds | Test images | Labels learnt from |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for (dataset, protocol), by_encoder in pairs(scores).items():
        own, random = by_encoder.get("pretrained"), by_encoder.get("random")
        one = own or next(iter(by_encoder.values()))
        lines.append(
            f"| {dataset} | {protocol}{f' ({one.measure})' * bool(one.measure)} | {own.text if own else '-'} | "
            f"{random.text if random else '-'} | {len(one.values)} | {one.images or '-'} | {one.labels or '-'} |"
        )
    return (
        "\n".join(lines)
        + "\n\nTop-1 accuracy unless a measure is named; ± is the sample standard deviation over the seeds."
    )


def _reproduce(made: Described, report: Receipt | None) -> str:
    """Return the resolved configuration and the command."""
    if report:
        config, what = (
            report.identity["config"]["config"],
            "As `config.yaml`, with `store` and `resources` of your own:",
        )
    else:
        config, what = (
            made.identity["config"],
            "The run has no finished report; this is the configuration of the step alone:",
        )
    text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
    imported = bool(report) and bool(config["pretrain"].get("start"))
    advice = "\n\n`pretrain.start` names the weights by digest: write their address instead." * imported
    return f"{what}\n\n```yaml\n{text}```\n\n```console\n$ mae run config.yaml\n```{advice}"
