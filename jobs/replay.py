"""mae replay: a bad step once more, in this process, sample by sample."""

import json
import math
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import asdict

import typer

from pipeline.errors import DataError
from pipeline.storage import Store, open_store
from pipeline.training.health.incidents import FOLDER, Bundle, read_bundle
from pipeline.training.health.replay import Replayed, SampleLoss, replay
from pipeline.training.spec.spec_json import from_json

_SHOWN = 5
"""Samples that are finite, of the largest losses."""


def replay_command(address: str, *, step: int | None, most_steps: int, as_json: bool) -> int:
    """Finds the bundle, replays it and prints what came; 0 when it is as it was."""
    bundle = read_bundle(_bundle_store(open_store(address), step))
    root = open_store(bundle.root_uri)
    spec = from_json(bundle.note["specification"], root)
    with redirect_stdout(sys.stderr):  # standard output belongs to results: DeepSpeed prints there
        replayed = replay(bundle, root, spec, most_steps=most_steps, tell=print)
    if as_json:
        print(json.dumps({"bundle": bundle.uri, **asdict(replayed), "reproduced": not replayed.differences}))
    else:
        for line in _lines(bundle, replayed):
            typer.echo(line)
    return 1 if replayed.differences else 0


def _bundle_store(store: Store, step: int | None) -> Store:
    """The folder of a bundle at or below an address: the one asked for, else that of the last step."""
    found = sorted(
        info.key.removesuffix("/rank-0000.json") for info in store.list() if info.key.endswith("rank-0000.json")
    )
    if found == ["rank-0000.json"] and step is None:
        return store
    bundles = [key for key in found if f"/{FOLDER}" in f"/{key}"]
    if not bundles:
        raise DataError(
            f"{store.uri}: no bundle of a bad step. Give a run's store, a training step's directory, or a bundle"
        )
    chosen = [key for key in bundles if step is None or _step(key) == step]
    if not chosen:
        steps = sorted({_step(key) for key in bundles})
        raise DataError(f"{store.uri}: no bundle of step {step}; there are some of steps {', '.join(map(str, steps))}")
    return store.at(max(chosen, key=lambda key: (_step(key), key)))


def _step(key: str) -> int:
    return int(key.rpartition("-")[2])


def _lines(bundle: Bundle, replayed: Replayed) -> Iterator[str]:
    """For a person."""
    note = bundle.note
    wrong = [one for one in replayed.samples if not one.finite]
    yield f"step {replayed.step}, learning rate {note['lr']:.3g}, {note['verdict']}: {note['reason']}"
    yield f"  then: loss {float(note['loss']):.6g}, gradient norm {float(note['grad_norm']):.6g}, {note['world_size']} workers"
    yield f"  now:  loss {replayed.loss:.6g}, gradient norm {replayed.grad_norm:.6g}, {replayed.step - replayed.began_at} steps on"
    yield f"{len(wrong)} of {len(replayed.samples)} samples are not finite"
    for one in [*wrong[:20], *[one for one in replayed.samples if one.finite][:_SHOWN]]:
        yield _line(one)
    yield "reproduced" if not replayed.differences else f"NOT reproduced: {'; '.join(replayed.differences)}"


def _line(one: SampleLoss) -> str:
    mark = "" if math.isfinite(one.now) else "  <- not finite"
    return f"  sample {one.sample_id}, epoch {one.epoch}: loss {one.now:.6g}, then {one.then:.6g}{mark}"
