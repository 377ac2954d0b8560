"""What `mae replay` prints: a step's loss and gradient norm then and now, and its samples' losses."""

import math
from collections.abc import Iterator

from pipeline.training.health.incidents import Bundle
from pipeline.training.health.replay import Replayed, SampleLoss

NOT_FINITE_SHOWN = 20
FINITE_SHOWN = 5
"""Samples with a finite loss that are shown, those of the largest losses."""


def replay_lines(bundle: Bundle, replayed: Replayed) -> Iterator[str]:
    """Yield the report line by line."""
    note = bundle.note
    wrong = [one for one in replayed.samples if not one.finite]
    finite = [one for one in replayed.samples if one.finite]
    yield f"step {replayed.step}, learning rate {note['lr']:.3g}, {note['verdict']}: {note['reason']}"
    yield (
        f"  then: loss {float(note['loss']):.6g}, gradient norm {float(note['grad_norm']):.6g}, {note['world_size']} workers"
    )
    yield (
        f"  now:  loss {replayed.loss:.6g}, gradient norm {replayed.grad_norm:.6g}, "
        f"{replayed.step - replayed.began_at} steps after the checkpoint"
    )
    yield f"{len(wrong)} of {len(replayed.samples)} samples are not finite"
    for one in [*wrong[:NOT_FINITE_SHOWN], *finite[:FINITE_SHOWN]]:
        yield _sample(one)
    yield "reproduced" if not replayed.differences else f"NOT reproduced: {'; '.join(replayed.differences)}"


def _sample(one: SampleLoss) -> str:
    mark = "" if math.isfinite(one.now) else "  <- not finite"
    return f"  sample {one.sample_id}, epoch {one.epoch}: loss {one.now:.6g}, then {one.then:.6g}{mark}"
