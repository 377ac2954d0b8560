"""What a comparison shows, as plain values. Nothing is read or drawn here.

Units: losses as trained; hours; USD; scores are fractions in [0, 1], unless a value above 1 shows that they are a measure such as
an effective rank. Lists with one entry per run are in the order of the runs."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

MOST_NAMED = 20
"""Runs of which curves, differences, tests and pictures are shown. More runs are a table."""
PRETRAINED, RANDOM = "pretrained", "random"


MILESTONES = {
    "held_out_loss": "loss of held-out images, fixed masks",
    "knn": "nearest neighbours, top-1",
    "ridge": "ridge classifier, top-1",
    "probe": "linear probe, top-1",
    "rankme": "effective rank of the features",
}
"""Scores of checkpoints while pretraining runs, as `history.jsonl` names them after `milestone_`."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A score over seeds."""

    mean: float
    sd: float | None = None
    """Sample standard deviation; None with a single seed, or where it was not recorded."""
    n: int = 1
    """Seeds."""
    values: tuple[float, ...] = ()
    """One per seed, where they are known."""

    @property
    def text(self) -> str:
        """`97.1 ± 0.3 (5)`: per cent, mean, spread, seeds."""
        scale = 1 if self.mean > 1 else 100
        spread = f" ± {scale * self.sd:.1f}" if self.sd is not None else ""
        return f"{scale * self.mean:.1f}{spread}" + (f" ({self.n})" if self.n > 1 else "")


@dataclass(frozen=True, kw_only=True)
class RunRow:
    """A run in the table. What is None is not known."""

    name: str
    run_id: str = ""
    """MLflow's; empty for a run that was found in its store alone."""
    store: str = ""
    status: str = ""
    started: float | None = None
    """Seconds since 1970."""
    data: str = ""
    size: str = ""
    differs: str = ""
    final_loss: float | None = None
    best_loss: float | None = None
    scores: Mapping[str, Spread] = field(default_factory=dict)
    """`<protocol>/<dataset>/<encoder>` -> score."""
    images_per_s: float | None = None
    mfu: float | None = None
    hours: float | None = None
    """Of pretraining, whatever it ran on."""
    gpu_hours: float | None = None
    """Of pretraining and evaluations."""
    cpu_hours: float | None = None
    """The same in hours of CPU cores."""
    usd: float | None = None

    @property
    def compute(self) -> tuple[float, str] | None:
        """What the run took and in which unit: GPU-hours, CPU-core hours, or hours of pretraining where devices are not known."""
        for value, unit in ((self.gpu_hours, "GPU-h"), (self.cpu_hours, "CPU-h"), (self.hours, "h")):
            if value is not None:
                return value, unit
        return None

    def per_point(self, protocol_and_dataset: str) -> tuple[float, str] | None:
        """Return what a percentage point above the random encoder has cost, in USD or else hours; None where there is none."""
        trained, untrained = (self.scores.get(f"{protocol_and_dataset}/{one}") for one in (PRETRAINED, RANDOM))
        cost = (self.usd, "USD") if self.usd is not None else self.compute
        if trained is None or untrained is None or cost is None or trained.mean > 1:
            return None
        points = 100 * (trained.mean - untrained.mean)
        return (cost[0] / points, cost[1]) if points > 0 else None


@dataclass(frozen=True)
class Difference:
    """A value that is not the same in all runs."""

    key: str
    values: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """What was logged while a run was pretrained; lists of one length."""

    run: str
    images: Sequence[float]
    """Images seen."""
    steps: Sequence[float]
    hours: Sequence[float]
    """Of training, or GPU-hours, as the comparison says."""
    loss: Sequence[float]
    milestones: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)
    """Score along the way -> (images seen, value)."""


@dataclass(frozen=True, kw_only=True)
class PairedResult:
    """Two runs on the same images. A difference is that of `run` less that of `against`, in percentage points."""

    run: str
    against: str
    score: str
    """`<protocol>/<dataset>`."""
    images: int
    seeds: int
    """Seeds that both runs have."""
    difference: float
    low: float
    high: float
    """The 95 % interval."""
    only_run: float
    """Images that only `run` gets right, mean over the seeds."""
    only_against: float
    p: float
    p_holm: float
    """Adjusted for all tests of the comparison."""
    test: str
    """What `p` was computed with."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Reconstructions of a run. Shapes: ids [n]; pictures uint8 [n, 4, H, W, 3], as in reconstructions.npz."""

    run: str
    ids: tuple[int, ...]
    """Sample ids; empty for runs of earlier versions, which did not keep them."""
    pictures: NDArray[np.uint8]
    digest: str
    """Of the data that the ids are of."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Everything that is shown of named runs."""

    rows: Sequence[RunRow]
    config: Sequence[Difference] = ()
    machine: Sequence[Difference] = ()
    """Settings of `resources`, which change no result."""
    data: Sequence[Difference] = ()
    code: Sequence[Difference] = ()
    warnings: Sequence[str] = ()
    """Why runs cannot be compared, or not in everything."""
    notes: Sequence[str] = ()
    """What could not be read, and what is not shown."""
    tests: Sequence[PairedResult] = ()
    curves: Sequence[Curve] = ()
    panels: Sequence[Panel] = ()
    hours_unit: str = "hours of training"


def score_columns(rows: Iterable[RunRow]) -> list[str]:
    """Return every `<protocol>/<dataset>` with a score, those that most runs have first."""
    counts: dict[str, int] = {}
    for row in rows:
        for name in dict.fromkeys(key.rpartition("/")[0] for key in row.scores):
            counts[name] = counts.get(name, 0) + 1
    return sorted(counts, key=lambda name: (-counts[name], name))
