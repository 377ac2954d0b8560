"""What is known of a run's data before it trains: how the sources were read, and which scores cannot be.

Known after listing for folders and tables, after indexing for tars. Nothing here reads an image or a source; only `preview_source`
lists one. Errors: those of the store."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from rich.console import RenderableType

from pipeline.cluster.progress import Progress
from pipeline.config import RunConfig
from pipeline.data.dataset.address import dataset_address, labels_of
from pipeline.data.dataset.facts import (
    DatasetFacts,
    ScoredSplit,
    SnapshotFacts,
    SplitLabels,
    unsuited,
)
from pipeline.data.dataset.understanding import EXAMPLES, notes_on_classes
from pipeline.data.snapshots.config import where_it_is
from pipeline.data.snapshots.rereading import not_compared, reread
from pipeline.data.snapshots.writer import preview
from pipeline.errors import ConfigError, DataError, PipelineError
from pipeline.evaluation.protocols import protocol_of
from pipeline.graph.receipts import read_receipt
from pipeline.graph.step import StageInput, Step
from pipeline.reporting.data_table import data_table
from pipeline.reporting.format import count
from pipeline.runs.workflow import build
from pipeline.storage import Store

log = logging.getLogger(__name__)

JUDGED = "judged/2.json"
"""Marks the directory of a snapshot of an older version whose listing this version reads in the same way."""
KEPT = "judged/kept.json"
"""Marks one that the user keeps although this version reads it otherwise."""
PREVIEW_FILES = 200_000
_CUT = (
    f"{{source}}: splits and classes were read from its first {count(PREVIEW_FILES)} files only; the snapshot step reads all of "
    "them, and stops if the others contradict these"
)
Finished = Callable[[Step], StageInput | None]
"""Returns a step that has its receipt, as its readers see it."""


@dataclass(frozen=True)
class DatasetFindings:
    """What is known of one dataset of a run."""

    step: Step
    """The shard or join step."""
    waiting: Sequence[Step]
    """Those that would train or score on it."""
    skipped: Mapping[str, str]
    """Evaluation dataset -> why it is not evaluated, and the way out."""
    problem: str
    """Why nothing can be trained or evaluated on it; empty if it can."""
    warnings: tuple[str, ...]


def finished_in(store: Store) -> Finished:
    """Return the function that looks a step up in the store."""

    def finished(step: Step) -> StageInput | None:
        root = store.at(step.directory)
        receipt = read_receipt(root)
        return receipt.as_input(root.uri) if receipt else None

    return finished


def examine(
    config: RunConfig, steps: Sequence[Step], finished: Finished, *, previews: Mapping[str, SnapshotFacts] | None = None
) -> list[DatasetFindings]:
    """Return what is known of every dataset that a step would still train or score on.

    `previews`: listings, by step, that were made only to look."""
    found = []
    # not by the report's rows, which may be variants, such as `partial-0.5`
    protocols = {step.name: protocol_of(step.function) for step in steps if step.kind == "evaluate"}
    scored = {
        one.input: f"{one.protocol}-{one.dataset}"
        for step in steps
        if step.kind == "report"
        for one in step.config.scored
        if protocols[one.input].needs_labels
    }
    # by name: one finding for a dataset, however many steps read it
    for dataset in {step.inputs["shards"].name: step.inputs["shards"] for step in _readers(steps)}.values():
        waiting = [step for step in _readers(steps) if step.inputs["shards"] is dataset and finished(step) is None]
        known = _known_labels(dataset, finished, previews or {})
        if waiting and known:
            # of the protocols that need labels; the others are evaluated on every dataset
            evaluated = {scored[step.name] for step in waiting if step.name in scored}
            learns = any(step.name not in protocols or protocols[step.name].learns for step in waiting)
            judged = _judge(config, dataset, waiting, known, sorted(evaluated), learns=learns)
            found.append(_with_small_images(judged, config.model.encoder.patch_size, finished(dataset)))
    return found


def problem_of(findings: Sequence[DatasetFindings]) -> ConfigError | None:
    """Return the first reason for not starting, or None."""
    return next((ConfigError(one.problem) for one in findings if one.problem), None)


def lines_of(findings: Sequence[DatasetFindings]) -> list[str]:
    """Return one line per evaluation that is skipped and per warning."""
    return [line for one in findings for line in (*(f"{n}: {why}" for n, why in one.skipped.items()), *one.warnings)]


def table_of(step: Step, done: StageInput) -> RenderableType | None:
    """Return the table of a finished snapshot, shard or join step."""
    if step.kind == "snapshot":
        facts = SnapshotFacts.read(done.facts)
        return snapshot_table(step.name, facts)
    if step.kind in {"shard", "join"} and _is_of_tars(step, done):
        made = DatasetFacts.read(done.facts)
        return data_table(
            step.name,
            labels_of(done),
            unit="images",
            classes=made.classes,
            notes=notes_on_classes(made.classes),
        )
    return None


def snapshot_table(name: str, facts: SnapshotFacts) -> RenderableType:
    """Return the table of a listing. Listings of older versions have no labels by split."""
    tars = facts.kind == "tars"
    known = facts.understood
    splits = (
        known.splits
        if known
        else {split: SplitLabels(images=images, labelled=0, classes=0) for split, images in facts.splits.items()}
    )
    return data_table(
        name,
        splits,
        unit="tars" if tars else "images",
        classes=None if tars or known is None else facts.classes,
        origin=known.origin if known else None,
        label_tables={path: one.images for path, one in (facts.label_tables or {}).items()},
        image_folders=bool(facts.image_folders),
        passed_over=known.passed_over if known else None,
        notes=known.notes if known else (),
    )


def preview_source(config: RunConfig, progress: Progress) -> RenderableType:
    """Return the table of data.source as a run would list it for the first time."""
    step = next(step for step in build(config) if step.kind == "snapshot")
    return preview_table(step, preview(where_it_is(step.config, step.options), progress, files=PREVIEW_FILES))


def preview_table(step: Step, facts: SnapshotFacts) -> RenderableType:
    """Return the table of a source from a listing of its first PREVIEW_FILES files."""
    part = f" (the first {count(PREVIEW_FILES)} files)" if _is_cut(facts) else ""
    return snapshot_table(f"{step.name}: {step.config.source}{part}", facts)


@dataclass(frozen=True)
class DataDescription:
    """What is known of the data of a run that has not begun."""

    tables: Sequence[RenderableType]
    lines: Sequence[str]
    problems: Mapping[str, PipelineError | ConfigError]
    """Step -> why it cannot run."""


def describe(config: RunConfig, steps: Sequence[Step], store: Store) -> DataDescription:
    """Describe the data of a run. Sources that are not listed yet are listed, up to their first PREVIEW_FILES files."""
    finished = finished_in(store)
    tables: list[RenderableType] = []
    problems: dict[str, PipelineError | ConfigError] = {}
    previews: dict[str, SnapshotFacts] = {}
    lines: list[str] = []
    for step in steps:
        if step.kind != "snapshot":
            continue
        check_reading(step, finished, mark=False)
        done = finished(step)
        try:
            if done:
                tables += [table] if (table := table_of(step, done)) else []
            elif not step.inputs:  # a later part is what is new, which only a whole listing finds
                facts = preview(where_it_is(step.config, step.options), Unseen(), files=PREVIEW_FILES)
                tables.append(preview_table(step, facts))
                previews |= {} if _is_cut(facts) else {step.name: facts}
                lines += [_CUT.format(source=step.config.source)] if _is_cut(facts) else []
        except (DataError, ConfigError) as problem:
            problems[step.name] = problem
    findings = examine(config, steps, finished, previews=previews)
    for one in findings:
        if one.problem:
            problems |= {reader.name: ConfigError(one.problem) for reader in one.waiting}
    return DataDescription(tables, [*lines, *lines_of(findings)], problems)


class Unseen:
    """Progress that nobody looks at."""

    def update(self, done: int, total: int, *, unit: str, **fields: float) -> None:
        """Do nothing."""

    def say(self, text: str) -> None:
        """Do nothing."""


def check_reading(step: Step, finished: Finished, *, mark: bool) -> None:
    """Raise ConfigError if an older version read a pinned listing otherwise than this one reads the same paths.

    `mark`: write down that both agree, so that it is compared once."""
    done = finished(step)
    if step.kind != "snapshot" or done is None or SnapshotFacts.read(done.facts).understood is not None:
        return
    if done.root.exists(JUDGED) or done.root.exists(KEPT):
        return
    if why := not_compared(step.config, SnapshotFacts.read(done.facts).kind):
        log.warning(
            f"{step.name}: an older version listed {step.config.source}, and its splits and labels are used as they are: {why}"
        )
        then = now = ""
    else:
        earlier = [part for _, source in sorted(step.inputs.items()) if (part := finished(source))]
        then, now = reread(step.config, [*earlier, done])
    if now == "":
        if mark:
            done.root.create(JUDGED, b"{}")
        return
    raise ConfigError(
        f"{step.name}: an older version listed {step.config.source} as\n    {then}\nand this version reads the same paths as\n"
        f"    {now}\nTo list it again under this reading name a new data.snapshot; data.split_from: hash makes it a pool; "
        f"`mae shards keep CONFIG.yaml` keeps the old listing and all that was trained on it"
    )


def keep_reading(step: Step, store: Store) -> bool:
    """Mark a pinned listing as one to keep. Returns False if it does not exist."""
    done = finished_in(store)(step)
    if done is None:
        return False
    done.root.create(KEPT, b"{}")
    return True


def _is_cut(facts: SnapshotFacts) -> bool:
    """Whether a preview may have left files (or rows of tables) out."""
    return facts.listed + facts.ignored >= PREVIEW_FILES


def _readers(steps: Sequence[Step]) -> list[Step]:
    return [step for step in steps if step.kind in {"pretrain", "evaluate"}]


@dataclass(frozen=True)
class _Known:
    classes: Sequence[str]
    labels: Mapping[str, SplitLabels]
    drawn: bool
    """Whether a keyed hash made the splits."""


def _known_labels(dataset: Step, finished: Finished, previews: Mapping[str, SnapshotFacts]) -> _Known | None:
    """What is known of a dataset, from its own receipt or else from that of its only listing."""
    sources = _listings(dataset)
    read = [(step, SnapshotFacts.read(done.facts)) for step in sources if (done := finished(step))]
    read += [(step, previews[step.name]) for step in sources if step.name in previews]
    origins = {facts.understood.origin if facts.understood else _old_origin(step, facts) for step, facts in read}
    drawn = origins <= {"hash"}
    if done := finished(dataset):
        facts = DatasetFacts.read(done.facts)
        return _Known(facts.classes, {n: one for n, one in labels_of(done).items() if n in facts.splits}, drawn)
    if len(sources) == len(read) == 1 and (known := read[0][1].understood) and read[0][1].kind != "tars":
        return _Known(read[0][1].classes, known.splits, drawn)
    return None


def _old_origin(step: Step, facts: SnapshotFacts) -> str:
    """What gave an old listing its splits, as far as its facts say: a source with a test split and no hash has no `val`."""
    return "folders" if "val" in facts.splits or step.config.test_share == 0.0 else "hash"


def _listings(dataset: Step) -> list[Step]:
    parts = dataset.inputs.values() if dataset.kind == "join" else [dataset]
    return [part.inputs["snapshot"] for part in parts]


def _is_of_tars(step: Step, done: StageInput) -> bool:
    return DatasetFacts.read(done.facts).other_members is not None


def _judge(
    config: RunConfig, dataset: Step, waiting: Sequence[Step], known: _Known, evaluated: Sequence[str], *, learns: bool
) -> DatasetFindings:
    """`learns`: whether a step reads the train split."""
    split, source = config.evaluation.split, _listings(dataset)[0].config.source
    train = known.labels.get("train")
    if not learns:
        reason = unsuited(known.classes, known.labels, split, learns=False)
        skipped = {name: f"not evaluated: {reason}; {_way_out(known, split)}" for name in evaluated} if reason else {}
        return DatasetFindings(dataset, waiting, skipped, "", ())
    if train is None or not train.images:
        there = ", ".join(f"{name} ({count(one.images)})" for name, one in known.labels.items())
        return DatasetFindings(
            dataset,
            waiting,
            {},
            f"{source}: no image is in the train split, only in {there or 'no split'}. Add a train/ folder, or set "
            "data.split_from: hash for a random split",
            (),
        )
    skipped, problem = {}, ""
    warnings = []
    reason = unsuited(known.classes, known.labels, split)
    if reason:
        skipped = {name: f"not evaluated: {reason}; {_way_out(known, split)}" for name in evaluated}
    for name, one in known.labels.items():
        if not one.not_in_train:
            continue
        more = ", ..." if len(one.not_in_train) == EXAMPLES else ""
        lacking = f"{source}: the {name} split has classes that train has not ({', '.join(one.not_in_train)}{more})"
        if known.drawn or name != split or not evaluated:
            warnings.append(lacking)
        else:
            problem = (
                f"{lacking}, so its score would mean nothing. Give the labels of its images in data.labels, move them into the "
                "class folders of train, or set evaluation.datasets: [] to pretrain only"
            )
    few = config.evaluation.train_labels
    if evaluated and not reason and few is not None and few < train.classes:
        problem = problem or (
            f"evaluation.train_labels={few} is fewer than the {train.classes} classes of {source}, so that some would have no "
            f"image to learn from. Write {train.classes} or more"
        )
    skipped = {} if problem else skipped
    return DatasetFindings(dataset, waiting, skipped, problem, tuple(warnings))


def _with_small_images(judged: DatasetFindings, patch_size: int, done: StageInput | None) -> DatasetFindings:
    """Add, as a problem, that most images of a finished dataset are smaller than a patch of the encoder.

    They would be enlarged to its image_size, and a patch would show a part of a pixel or two. A few small images among larger ones
    are no problem. The sizes are those of the first shard, whose images are a random part of the training split."""
    if judged.problem or done is None:
        return judged
    manifest = dataset_address(done).open()
    split = "train" if "train" in manifest.splits else next(iter(manifest.splits))
    shards = manifest.shards(split).column("shard").to_pylist()
    samples = manifest.samples(shards[0]) if shards else None
    if samples is None or not len(samples):
        return judged
    side = int(np.median(np.minimum(samples.column("height").to_numpy(), samples.column("width").to_numpy())))
    if not 0 < side < patch_size:
        return judged
    source = _listings(judged.step)[0].config.source
    return replace(
        judged,
        skipped={},
        problem=f"{source}: half of the images have a short side of {side} pixels or fewer, less than a patch of "
        f"{patch_size} x {patch_size} (model.encoder.patch_size). Write a patch_size of at most {side}, with an image_size that it "
        "divides, or give larger images",
    )


def _way_out(known: _Known, split: ScoredSplit) -> str:
    other: ScoredSplit = "val" if split == "test" else "test"
    if not unsuited(known.classes, known.labels, other) and not known.labels[other].not_in_train:
        return f"evaluation.split={other} scores on {other} ({count(known.labels[other].labelled)} labelled images)"
    if not known.classes:
        return "put the images into class folders, or name a file with labels in data.labels"
    if split not in known.labels or not known.labels[split].images:
        return "add images to it, or set data.split_from: hash to hold out data.test_share of all images"
    if any((one := known.labels[name]) and one.images and not one.labelled for name in ("train", split)):
        return "name a file with labels in data.labels, or add evaluation.datasets with a source of its own"
    return "a score needs two classes: point data.source at the folder that holds the class folders, or use data.labels"
