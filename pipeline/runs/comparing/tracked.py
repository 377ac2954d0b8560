"""A run's row of the table as MLflow's tags and metrics tell it. Nothing here needs torch: a thousand rows take no second."""

from collections.abc import Mapping

from pipeline.reporting.comparison.values import RunRow, Spread
from pipeline.tracking import TrackedRun, names


def tracked_row(run: TrackedRun) -> RunRow:
    """Return the row of a parent run in MLflow."""
    tags, metrics = run.tags, run.metrics
    return RunRow(
        name=tags.get(names.RUN_TAG) or run.name,
        run_id=run.run_id,
        store=tags.get(names.STORE_TAG, ""),
        status=run.status.lower(),
        started=run.start_ms / 1000,
        data=tags.get(names.DATA_TAG, ""),
        size=tags.get(names.SIZE_TAG, ""),
        differs=tags.get(names.DIFFERS_TAG, ""),
        final_loss=metrics.get(names.FINAL_LOSS),
        best_loss=metrics.get(names.BEST_LOSS),
        scores=tracked_scores(metrics),
        images_per_s=metrics.get(names.IMAGES_PER_S),
        mfu=metrics.get(names.MFU),
        gpu_hours=metrics.get(names.GPU_HOURS),
        cpu_hours=metrics.get(names.CPU_HOURS),
        usd=metrics.get(names.COST_USD),
    )


def tracked_scores(metrics: Mapping[str, float]) -> dict[str, Spread]:
    """Return the scores among a parent's metrics, by `<protocol>/<dataset>/<encoder>`."""
    found = {}
    for key, mean in metrics.items():
        score = key.removeprefix(names.SCORE_PREFIX)
        if key != score and score.count("/") == 2:
            sd, seeds = (metrics.get(f"{prefix}{score}") for prefix in (names.SCORE_SD_PREFIX, names.SCORE_N_PREFIX))
            found[score] = Spread(mean=mean, sd=sd, n=int(seeds or 1))
    return found
