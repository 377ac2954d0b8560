"""Paired tests of runs, on the predictions that their evaluations kept per image.

Each run is tested against the first, for every score that both have, over the seeds that both have."""

import io
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.evaluation.predictions import PREDICTIONS
from pipeline.reporting.comparison.values import PRETRAINED, PairedResult
from pipeline.runs.comparing.history import score_steps
from pipeline.runs.comparing.loading import LoadedRun
from pipeline.runs.comparing.statistics import Outcomes, holm, paired_test


class _Predicted(NamedTuple):
    """One row per scored image, by sample id: [n] each."""

    digest: str  # of the data that the ids are of
    ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    right: Outcomes


def paired_results(loaded: Sequence[LoadedRun]) -> tuple[list[PairedResult], list[str]]:
    """Return the tests, and a note for each that could not be made."""
    results: list[PairedResult] = []
    notes: list[str] = []
    if len(loaded) < 2:
        return results, notes
    first, *others = loaded
    ours = _outcomes(first)
    for other in others:
        theirs = _outcomes(other)
        for score in sorted({*ours} & {*theirs}):
            seeds = sorted({*ours[score]} & {*theirs[score]})
            label = f"{other.row.name} and {first.row.name}: {score}"
            if not seeds:
                notes.append(f"{label}: no paired test, as no seed was scored in both")
                continue
            pairs = [(theirs[score][seed], ours[score][seed]) for seed in seeds]
            if all(_same_images(ours, theirs) for ours, theirs in pairs):
                results.append(_result(other.row.name, first.row.name, score, pairs))
            else:
                notes.append(f"{label}: no paired test, as other images were scored")
    adjusted = holm([one.p for one in results])
    return [replace(one, p_holm=p) for one, p in zip(results, adjusted, strict=True)], notes


def _same_images(one: _Predicted, other: _Predicted) -> bool:
    # an id is a row number of its own snapshot, so it says nothing about other data
    return (
        one.digest == other.digest and np.array_equal(one.ids, other.ids) and np.array_equal(one.labels, other.labels)
    )


def _result(run: str, against: str, score: str, pairs: Sequence[tuple[_Predicted, _Predicted]]) -> PairedResult:
    test = paired_test(np.stack([one.right for one, _ in pairs]), np.stack([other.right for _, other in pairs]))
    return PairedResult(
        run=run,
        against=against,
        score=score,
        images=len(pairs[0][0].ids),
        seeds=len(pairs),
        difference=100 * test.difference,
        low=100 * test.low,
        high=100 * test.high,
        only_run=test.only_first,
        only_against=test.only_second,
        p=test.p,
        p_holm=test.p,
        test=test.test,
    )


def _outcomes(run: LoadedRun) -> dict[str, dict[int, _Predicted]]:
    """Return `<protocol>/<dataset>` -> seed -> what the pretrained encoder's classifier predicted."""
    found: dict[str, dict[int, _Predicted]] = {}
    for one in score_steps(run.steps):
        kept = any(file.key == PREDICTIONS for file in one.step.receipt.files)
        if one.score.endswith(f"/{PRETRAINED}") and kept:
            table = pq.read_table(io.BytesIO(one.step.files.read(PREDICTIONS)))
            ids, labels = (table.column(name).to_numpy() for name in ("sample_id", "label"))
            best = table.column("top5").combine_chunks().flatten().to_numpy().reshape(len(ids), -1)[:, 0]
            found.setdefault(one.column, {})[one.seed] = _Predicted(
                run.data_digest(one.step), ids, labels, best == labels
            )
    return found
