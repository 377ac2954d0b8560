"""What is drawn of a run: its curves while it was pretrained, and its reconstructions."""

import io
from collections.abc import Mapping, Sequence

import numpy as np

from pipeline.reporting.comparison.values import MILESTONES, Curve, Panel
from pipeline.runs.comparing.loading import LoadedRun
from pipeline.runs.comparing.rows import hours_by_row, logged

RECONSTRUCTIONS = "reconstructions.npz"


def curves_of(loaded: Sequence[LoadedRun]) -> tuple[list[Curve], str]:
    """Return what each pretraining logged, and what the hours are: GPU-hours only if every run knows its GPUs."""
    histories = [(run, logged(run.pretrained)) for run in loaded if run.pretrained]
    gpus = [_gpus(run, rows) for run, rows in histories]
    in_gpus = all(gpus)
    curves = [
        Curve(
            run=run.row.name,
            images=[row["images"] for row in rows],
            steps=[row["step"] for row in rows],
            hours=hours_by_row(rows, devices=count if in_gpus else None),
            loss=[row["loss"] for row in rows],
            milestones=_milestones(rows),
        )
        for (run, rows), count in zip(histories, gpus, strict=True)
    ]
    return curves, "GPU-hours" if in_gpus and curves else "hours of training"


def _gpus(run: LoadedRun, rows: Sequence[Mapping[str, float]]) -> list[float] | None:
    """Return how many GPUs trained up to each row, or None if it was on CPUs or is not known."""
    configured = run.config.get("resources.workers", "")
    if not rows or not all("device_gib" in row for row in rows):
        return None
    # an elastic run says it row by row, and older versions not at all
    counts = [row.get("workers", float(configured) if configured.isdigit() else 0.0) for row in rows]
    return counts if all(counts) else None


def _milestones(rows: Sequence[Mapping[str, float]]) -> dict[str, list[tuple[float, float]]]:
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for name in MILESTONES:
            if f"milestone_{name}" in row:
                found.setdefault(name, []).append((row["milestone_images"], row[f"milestone_{name}"]))
    return found


def panels_of(loaded: Sequence[LoadedRun]) -> tuple[list[Panel], list[str]]:
    """Return the reconstructions, and a note where they are not of the same images."""
    found = []
    for run in loaded:
        if run.pretrained and run.pretrained.files.exists(RECONSTRUCTIONS):
            with np.load(io.BytesIO(run.pretrained.files.read(RECONSTRUCTIONS)), allow_pickle=False) as kept:
                ids = tuple(kept["sample_ids"].tolist()) if "sample_ids" in kept else ()
                digest = str(run.pretrained.receipt.facts["dataset_digest"])
                found.append(Panel(run=run.row.name, ids=ids, pictures=kept["images"], digest=digest))
    return found, [note for other in found[1:] if (note := _unlike(found[0], other))]


def _unlike(one: Panel, other: Panel) -> str:
    names_of = f"reconstructions of {one.run} and {other.run}"
    if not one.ids or not other.ids:
        same = one.pictures.shape[2:] == other.pictures.shape[2:] and np.array_equal(
            one.pictures[:, 0], other.pictures[:, 0]
        )
        return (
            "" if same else f"{names_of}: a run of an earlier version kept no sample ids, and the images look different"
        )
    if one.digest != other.digest:
        return f"{names_of} are of other data, so of other images"
    return (
        ""
        if one.ids == other.ids
        else f"{names_of} are of other images (samples {one.ids[:3]} and {other.ids[:3]} ...)"
    )
