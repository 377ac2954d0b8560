"""Training curves and score bars as PNG bytes, in one style for light and dark backgrounds.

Backgrounds are transparent and all text is mid-grey, so that one picture serves the light page, the
dark page and MLflow. The colours are those of Okabe and Ito (2008), which can be told apart with any
colour vision. Figures are built without pyplot, which keeps global state: any thread may draw.
Units: learning rate as given (absolute, not base); images/s over all workers; scores in [0, 1], drawn
as per cent."""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from numpy.typing import ArrayLike

from pipeline.reporting.summaries import Score

INK, FAINT = "#747b85", "#8b929c"
BLUE, GREEN, PURPLE, GREY = "#2b86c5", "#009e73", "#b8699a", "#a3aab4"
DOTS_PER_INCH = 160

STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 12,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 2.2,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
}


@dataclass(frozen=True, kw_only=True)
class Curves:
    """What a training run measured; all sequences but `milestones` have the same length."""

    steps: Sequence[int]
    """`global_step` of each point, increasing."""
    images_seen: Sequence[float]
    loss: Sequence[float]
    learning_rate: Sequence[float]
    images_per_s: Sequence[float]
    milestones: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)
    """Accuracy in [0, 1] of checkpoints along the way, by protocol: (global step, accuracy)."""


def curve_png(curves: Curves, *, loss_name: str = "Loss on hidden patches") -> bytes:
    """Return loss, learning rate and speed, one below the other: global steps along the bottom, images seen along the top."""
    with rc_context(STYLE):
        heights = [2.4, 1, 1, *([1.4] if curves.milestones else [])]
        figure = Figure(figsize=(10, 8.2 * sum(heights) / 4.4), layout="constrained")
        panels: Sequence[Axes] = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
        steps = np.asarray(curves.steps, dtype=float)
        rows = [
            (loss_name, curves.loss, BLUE),
            ("Learning rate", curves.learning_rate, PURPLE),
            ("Images per second", curves.images_per_s, GREEN),
        ]
        for panel, (name, values, colour) in zip(panels, rows, strict=False):
            _draw_line(panel, steps, np.asarray(values, dtype=float), colour)
            panel.set_title(name, pad=8)
            panel.yaxis.set_major_locator(MaxNLocator(5, min_n_ticks=3))
            panel.margins(x=0.01)
        panels[1].ticklabel_format(axis="y", style="sci", scilimits=(-3, 3), useMathText=True)
        panels[1].set_ylim(bottom=0)
        panels[2].set_ylim(bottom=0)
        panels[2].yaxis.set_major_formatter(EngFormatter(sep=""))
        if curves.milestones:
            _draw_milestones(panels[3], curves.milestones)
        panels[-1].set_xlabel("global step")
        panels[-1].xaxis.set_major_locator(MaxNLocator(7, integer=True))
        _mark_last(panels[0], steps, np.asarray(curves.loss, dtype=float))
        _images_seen_on_top(panels[0], steps, np.asarray(curves.images_seen, dtype=float))
        return as_png(figure)


def scores_png(scores: Sequence[Score]) -> bytes:
    """Return bars of the accuracies of pretrained beside random for every protocol, one panel per dataset.

    Whiskers are one standard deviation over the seeds."""
    scores = [score for score in scores if not score.measure]
    datasets = list(dict.fromkeys(score.dataset for score in scores))
    protocols = list(dict.fromkeys(score.protocol for score in scores))
    encoders = list(dict.fromkeys(score.encoder for score in scores))
    top = max((100 * (score.mean + (score.sd or 0)) for score in scores), default=100)
    with rc_context(STYLE):
        figure = Figure(figsize=(10, 0.7 + 3.1 * len(datasets)), layout="constrained")
        panels: list[Axes] = list(figure.subplots(len(datasets), 1, squeeze=False)[:, 0]) if datasets else []
        for panel, dataset in zip(panels, datasets, strict=True):
            shown = [score for score in scores if score.dataset == dataset]
            _draw_groups(panel, shown, protocols=protocols, encoders=encoders)
            panel.set_ylim(0, min(top * 1.12 + 2, 112))
            # the axis goes beyond 100 to leave room for the numbers on the bars
            panel.set_yticks([tick for tick in panel.get_yticks() if tick <= 100])
            seeds = max(len(score.values) for score in shown)
            spread = f", mean ± sd of {seeds} seeds" if seeds > 1 else ""
            panel.set_title(f"{dataset}: top-1 accuracy, %{spread}", pad=10)
        if panels:
            handles, labels = panels[0].get_legend_handles_labels()
            figure.legend(
                handles, labels, loc="outside upper left", ncols=len(labels), handlelength=1, columnspacing=1.4
            )
        return as_png(figure)


def _draw_groups(axes: Axes, scores: Sequence[Score], *, protocols: Sequence[str], encoders: Sequence[str]) -> None:
    width = min(0.76 / len(encoders), 0.26)
    for index, encoder in enumerate(encoders):
        offset = (index - (len(encoders) - 1) / 2) * width
        found = [(protocols.index(s.protocol) + offset, s) for s in scores if s.encoder == encoder]
        _draw_bars(axes, found, width=width, colour=_encoder_colour(encoder, index), label=encoder)
    axes.set_xticks(range(len(protocols)), protocols)
    axes.set_xlim(-0.6, len(protocols) - 0.4)
    axes.grid(visible=False, axis="x")
    axes.spines["left"].set_visible(False)


def _encoder_colour(encoder: str, index: int) -> str:
    known = {"pretrained": BLUE, "random": GREY}
    return known.get(encoder, [GREEN, PURPLE, BLUE, GREY][index % 4])


def _draw_bars(axes: Axes, found: Sequence[tuple[float, Score]], *, width: float, colour: str, label: str) -> None:
    heights = [100 * score.mean for _, score in found]
    axes.bar([x for x, _ in found], heights, width=width * 0.94, color=colour, label=label)
    for (x, score), height in zip(found, heights, strict=True):
        spread = 100 * (score.sd or 0.0)
        if spread:
            axes.errorbar(x, height, yerr=spread, color=INK, capsize=4, linewidth=1.4)
        axes.annotate(
            f"{height:.1f}", (x, height + spread), (0, 4), textcoords="offset points", ha="center", fontsize=11
        )


def _draw_line(axes: Axes, steps: np.ndarray, values: np.ndarray, colour: str) -> None:
    """Draw a series; a long one is drawn faint, with its running median in full colour, since losses are noisy."""
    window = len(values) // 60
    if window >= 3:
        axes.plot(steps, values, color=colour, alpha=0.28, linewidth=1)
        values = _running_median(values, window)
    axes.plot(steps, values, color=colour, marker="o" if len(values) == 1 else "")


def _draw_milestones(axes: Axes, milestones: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """Draw the accuracy of checkpoints that were scored while training went on."""
    for (name, points), colour in zip(milestones.items(), (BLUE, GREEN, PURPLE), strict=False):
        steps, accuracies = zip(*points, strict=True)
        axes.plot(steps, 100 * np.asarray(accuracies), color=colour, marker="o", markersize=4, label=name)
    axes.set_title("Held-out accuracy along the way, per cent", pad=8)
    axes.legend(loc="lower right", fontsize=11)


def _running_median(values: np.ndarray, window: int) -> np.ndarray:
    """Return the median around each point; windows are cut short at the ends."""
    half = window // 2
    return np.array([np.nanmedian(values[max(0, i - half) : i + half + 1]) for i in range(len(values))])


def _mark_last(axes: Axes, steps: np.ndarray, values: np.ndarray) -> None:
    if len(values):
        # the median of the last sixtieth: a single last value says little about a noisy loss
        tail = float(np.nanmedian(values[-max(1, len(values) // 60) :]))
        axes.annotate(f"{tail:.4g}", (steps[-1], tail), (8, 0), textcoords="offset points", va="center", weight="bold")


def _images_seen_on_top(axes: Axes, steps: np.ndarray, images: np.ndarray) -> None:
    """Add a second scale. All global batches have the same size, so it is the first one times a constant."""
    per_step = float(images[-1] / steps[-1]) if len(steps) and steps[-1] else 1.0
    top = axes.secondary_xaxis("top", functions=(_times(per_step), _times(1 / per_step)))
    top.set_xlabel("images seen", labelpad=6)
    top.xaxis.set_major_locator(MaxNLocator(7))
    top.xaxis.set_major_formatter(EngFormatter(sep=""))
    top.spines["top"].set_visible(False)


def _times(factor: float) -> Callable[[ArrayLike], ArrayLike]:
    return lambda values: np.asarray(values) * factor


def as_png(figure: Figure) -> bytes:
    """Return a figure as PNG bytes with a transparent background."""
    FigureCanvasAgg(figure)  # becomes the figure's canvas, which pyplot would otherwise provide
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=DOTS_PER_INCH, transparent=True)
    return out.getvalue()
