"""The note on a run's page in MLflow, in Markdown: what it is, what came out, how to go on. Pure."""

from collections.abc import Mapping, Sequence

from mae_core.config import size_name
from pipeline.config import RunConfig
from pipeline.reporting.format import clock
from pipeline.reporting.summaries import Score, pairs, settings_of_scores
from pipeline.runs.recording.naming import data_label, differs_label
from pipeline.tracking import names, redact_text

CONFIG_FILE = "config.yaml"
"""Artifact with the whole configuration."""
_STATES: Mapping[str, str] = {
    "running": "Running.",
    "done": "Done.",
    "warned": "Done, but many images are unreadable: the report says which.",
    "failed": "Failed: the table of steps says why. Fix it, then start the run again.",
    "stopped": "Stopped, nothing is lost.",
}


def note(
    config: RunConfig,
    *,
    verdict: str,
    steps: Sequence[tuple[str, str, float]] = (),
    scores: Sequence[Score] = (),
    metrics: Mapping[str, float],
    links: Mapping[str, str],
    addresses: Mapping[str, str],
) -> str:
    """Return the note. `steps`: name, state and seconds of each; `links`: step name -> address of its run's page."""
    # the scores first: MLflow shows the first lines, and the rest on request
    sections = [f"**{_STATES[verdict]}** {_what(config)}", _scores(scores), _numbers(metrics)]
    sections += [f"Differs from the defaults: `{differs_label(config)}`", "### To go on, or to run it again", _resume()]
    places = [f"- {name}: `{redact_text(where)}`" for name, where in addresses.items()]
    # last: a tag has its limit, and a run may have hundreds of steps
    sections += ["### Where", "\n".join(places), _steps(steps, links)]
    return "\n\n".join(section for section in sections if section)


def _what(config: RunConfig) -> str:
    if config.weights:
        return f"{size_name(config.model.encoder)} from `{redact_text(config.weights.file)}`, evaluated on {data_label(config)}."
    return (
        f"{size_name(config.model.encoder)} pretrained on {data_label(config)}, {config.pretrain.epochs} epochs at a batch of "
        f"{config.pretrain.global_batch}."
    )


def _scores(scores: Sequence[Score]) -> str:
    if not scores:
        return ""
    encoders = list(dict.fromkeys(score.encoder for score in scores))
    lines = [_row(["dataset", "protocol", *encoders, "difference", "seeds"]), "|---" * (len(encoders) + 4) + "|"]
    for (dataset, protocol), group in pairs(scores).items():
        cells = [group[encoder].text if encoder in group else "–" for encoder in encoders]
        both = {"pretrained", "random"} <= group.keys()
        difference = group["pretrained"].above(group["random"]) if both else ""
        seeds = max(len(score.values) for score in group.values())
        lines.append(_row([dataset, protocol, *cells, difference, str(seeds)]))
    remarks = [f"- {name}: {text}" for name, text in settings_of_scores(scores).items()]
    return "\n".join([*lines, *(["", *remarks] if remarks else [])])


def _numbers(metrics: Mapping[str, float]) -> str:
    words = {
        names.FINAL_LOSS: "final loss {:.4g}",
        names.BEST_LOSS: "best loss {:.4g}",
        names.IMAGES_PER_S: "{:,.0f} images/s",
        names.MFU: "MFU {:.1%}",
        names.GPU_HOURS: "{:.3g} GPU-hours",
        names.CPU_HOURS: "{:.3g} CPU core-hours",
        names.COST_USD: "{:.2f} USD",
    }
    found = [text.format(metrics[name]) for name, text in words.items() if name in metrics]
    return f"### Pretraining\n\n{', '.join(found)}" if found else ""


def _steps(steps: Sequence[tuple[str, str, float]], links: Mapping[str, str]) -> str:
    if not steps:
        return ""
    lines = [_row(["step", "state", "time"]), "|---" * 3 + "|"]
    for name, state, seconds in steps:
        shown = f"[{name}]({links[name]})" if name in links else name
        lines.append(_row([shown, state, clock(seconds or None)]))
    return "\n".join(["### Steps", "", *lines])


def _resume() -> str:
    return (
        f"Download `{CONFIG_FILE}` from the artifacts, then\n\n```\nmae run {CONFIG_FILE}\n```\n\nFinished steps are not "
        "repeated, a training goes on from its last checkpoint, and the results come here, to the same run."
    )


def _row(cells: Sequence[str]) -> str:
    # wide spaces as entities (the character is trimmed), since MLflow's tables have no padding
    return "".join(f"| {cell}&ensp;" for cell in cells) + "|"
