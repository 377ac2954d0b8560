"""How a run ended: verdict and exit code, scores, and where the results are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.config import RunConfig
from pipeline.data.dataset.facts import DatasetFacts
from pipeline.graph.runner import Outcome
from pipeline.reporting.summaries import Score
from pipeline.stages.report import PAGE, ReportConfig, collect_scores
from pipeline.weights import ENCODER

EXIT_CODES: Mapping[str, int] = {"done": 0, "failed": 1, "stopped": 3, "warned": 4}


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """How a run ended."""

    run_id: str
    outcomes: Sequence[Outcome]
    scores: Sequence[Score]
    addresses: Mapping[str, str]
    """Of `store` and `tracking`, and of `report` and `encoder` if they were made."""
    bad_share: float
    """Share of unreadable images in the dataset that has most."""
    verdict: Literal["done", "failed", "stopped", "warned"]

    @property
    def exit_code(self) -> int:
        """0 done, 1 failed, 3 stopped and resumable, 4 done but with more unreadable images than data.bad_share_warn."""
        return EXIT_CODES[self.verdict]


def summarise(
    config: RunConfig, outcomes: Sequence[Outcome], *, run_id: str, addresses: Mapping[str, str]
) -> RunSummary:
    """Summarise the outcomes of a run. `addresses`: those of the store and of MLflow."""
    page = next(outcome for outcome in outcomes if outcome.step.kind == "report")
    scored = page.step.config.scored if isinstance(page.step.config, ReportConfig) else ()
    finished = {o.step.name: o.receipt.as_input(o.uri) for o in outcomes if o.receipt}
    made = [o.receipt for o in outcomes if o.receipt and o.receipt.kind in {"shard", "join"}]
    bad_share = max((DatasetFacts.read(receipt.facts).bad_share for receipt in made), default=0.0)
    states = {outcome.state for outcome in outcomes}
    verdict: Literal["done", "failed", "stopped", "warned"] = "done"
    # before "stopped": a failure needs the user, a stop only the same command
    if "failed" in states:
        verdict = "failed"
    elif "stopped" in states:
        verdict = "stopped"
    elif bad_share > config.data.bad_share_warn:
        verdict = "warned"
    where = dict(addresses)
    if page.receipt:
        files = page.receipt.as_input(page.uri).store
        where["report"] = str(files.local_path(PAGE) or f"{files.uri}/{PAGE}")
    pretrained = next((o for o in outcomes if o.step.kind in {"pretrain", "import"} and o.receipt), None)
    if pretrained:
        where["encoder"] = f"{finished[pretrained.step.name].store.uri}/{ENCODER}"
    return RunSummary(
        run_id=run_id,
        outcomes=outcomes,
        scores=collect_scores(tuple(one for one in scored if one.input in finished), finished),
        addresses=where,
        bad_share=bad_share,
        verdict=verdict,
    )


def verdict_line(config: RunConfig, summary: RunSummary) -> str:
    """Return what happened, and what to do about it."""
    if summary.verdict == "failed":
        return "failed: fix what the table names and run the same command again; finished steps stay finished"
    if summary.verdict == "stopped":
        return "stopped, nothing is lost: the same command goes on from here"
    if summary.verdict == "warned":
        return (
            f"done, but {summary.bad_share:.1%} of the images are unreadable, more than data.bad_share_warn="
            f"{config.data.bad_share_warn:.1%}: quarantine.parquet in the shard step's folder names them"
        )
    return "done"


def as_json(summary: RunSummary) -> dict[str, Any]:
    """Return the JSON line that ends `mae run --json`."""
    scores: dict[str, Any] = {}
    for score in summary.scores:
        entry: dict[str, Any] = {
            "mean": score.mean,
            "sd": score.sd,
            "n": len(score.values),
            "values": list(score.values),
        }
        entry |= {"images": score.images, "labels": score.labels}
        if score.measure:
            entry["measure"] = score.measure
        if score.others:
            entry |= {"setting": score.setting, "others": {key: list(values) for key, values in score.others.items()}}
        scores.setdefault(score.dataset, {}).setdefault(score.protocol, {})[score.encoder] = entry
    return {
        "run": summary.run_id,
        "verdict": summary.verdict,
        "steps": [
            {
                "name": outcome.step.name,
                "kind": outcome.step.kind,
                "fingerprint": outcome.step.fingerprint,
                "state": outcome.state,
                "uri": outcome.uri,
                "seconds": round(outcome.seconds, 3),
            }
            for outcome in summary.outcomes
        ],
        "scores": scores,
        "addresses": dict(summary.addresses),
    }
