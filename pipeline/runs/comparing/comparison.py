"""Named runs side by side: what differs, what cannot be compared, and what is drawn of them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from pipeline.data.dataset.facts import DatasetFacts
from pipeline.evaluation.protocol import ScoreFacts
from pipeline.graph.plan import dotted_fields
from pipeline.reporting.comparison.values import PRETRAINED, Comparison, Difference, RunRow
from pipeline.runs.comparing.differences import Scored, differences, short_differences, why_not_comparable
from pipeline.runs.comparing.drawn import curves_of, panels_of
from pipeline.runs.comparing.finding import Found
from pipeline.runs.comparing.history import score_steps
from pipeline.runs.comparing.loading import LoadedRun, load
from pipeline.runs.comparing.pairing import paired_results

_APART = {"encoder", "weights", "seed"}
"""Fields of an evaluation's config in which compared scores may differ."""


def compare(found: Sequence[Found]) -> Comparison:
    """Return the comparison of runs, the first of which the others are tested against."""
    loaded = [load(one) for one in found]
    labels = _labels([one.row for one in loaded])
    loaded = [replace(one, row=replace(one.row, name=label)) for one, label in zip(loaded, labels, strict=True)]
    config, machine = _config_differences(loaded)
    if len(loaded) > 1:  # from each other, not from the defaults
        loaded = [
            replace(one, row=replace(one.row, differs=short_differences(config, index)))
            for index, one in enumerate(loaded)
        ]
    tests, missing = paired_results(loaded)
    curves, hours_unit = curves_of(loaded)
    panels, panel_notes = panels_of(loaded)
    return Comparison(
        rows=[one.row for one in loaded],
        config=config,
        machine=machine,
        data=differences([_data(one) for one in loaded]),
        code=_in_all([one.code for one in loaded]),
        warnings=_warnings(loaded),
        notes=[*(note for one in loaded for note in one.notes), *missing, *panel_notes],
        tests=tests,
        curves=curves,
        panels=panels,
        hours_unit=hours_unit,
    )


def _config_differences(loaded: Sequence[LoadedRun]) -> tuple[list[Difference], list[Difference]]:
    """Return the differences in what decides results, and those in `resources`."""
    found = _in_all([one.config for one in loaded])
    inside = [one for one in found if not one.key.startswith("resources.")]
    return inside, [one for one in found if one not in inside]


def _in_all(known: Sequence[Mapping[str, str]]) -> list[Difference]:
    """Return the differences in keys that all runs have: in a run of another version or source, others are not known."""
    common = set.intersection(*map(set, known)) if known else set()
    return differences([{key: one[key] for key in common} for one in known])


def _data(run: LoadedRun) -> dict[str, str]:
    """Return what is known of the run's datasets: digest, images of each split, classes."""
    found: dict[str, str] = {}
    for name, step in run.steps.items():
        if step.receipt.kind not in {"shard", "join"}:
            continue
        facts = DatasetFacts.read(step.receipt.facts)
        found |= {f"{name} digest": facts.digest[:12], f"{name} classes": str(len(facts.classes))}
        found[f"{name} source"] = str(step.receipt.identity["config"].get("source", ""))
        for split, counts in facts.counts.splits.items():
            found[f"{name} {split} images"] = str(counts.served)
    return found


def _scored(run: LoadedRun) -> dict[str, Scored]:
    """Return how each score of the pretrained encoder came about, by `<protocol>/<dataset>`."""
    found: dict[str, Scored] = {}
    for one in score_steps(run.steps):
        facts = ScoreFacts.read(one.step.receipt.facts)
        if not one.score.endswith(f"/{PRETRAINED}") or facts.score is None or one.column in found:
            continue
        config = one.step.receipt.identity["config"]
        found[one.column] = Scored(
            digest=run.data_digest(one.step),
            images=facts.images,
            version=one.step.receipt.identity["version"],
            settings={"split": "test"}
            | dotted_fields({key: value for key, value in config.items() if key not in _APART}),
        )
    return found


def _warnings(loaded: Sequence[LoadedRun]) -> list[str]:
    if not loaded:
        return []
    first, *others = loaded
    ours, found = _scored(first), []
    for other in others:
        theirs = _scored(other)
        found += [f"{first.row.name} and {other.row.name}: {line}" for line in why_not_comparable(ours, theirs)]
        for one, these, those in ((first, ours, theirs), (other, theirs, ours)):
            if only := sorted({*these} - {*those}):
                found.append(
                    f"{first.row.name} and {other.row.name}: scored in {one.row.name} alone: {', '.join(only)}"
                )
    return found


def _labels(rows: Sequence[RunRow]) -> list[str]:
    """Return a name for each run that no other has."""
    counts = [row.name for row in rows]
    labels = [
        row.name if counts.count(row.name) == 1 else f"{row.name} {row.run_id[:6] or row.store.rpartition('/')[2]}"
        for row in rows
    ]
    return [label if labels.count(label) == 1 else f"{label} #{index}" for index, label in enumerate(labels, 1)]
