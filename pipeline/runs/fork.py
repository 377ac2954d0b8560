"""A fork: another pretraining that goes on from a checkpoint of this one, weights, moments and position, under another recipe.

Its configuration names the checkpoint (`fork`), so its fingerprint holds the digest, and the run of it is a step of its own in the
same store. The parent's checkpoint is pinned: retention and gc leave it.
What the position counts in must stay: data, seed, global batch; and what the weights are: the model's shape.
Errors: ConfigError for a change that a fork cannot make; CheckpointError when there is no such checkpoint."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from pipeline.config import RunConfig, document_of, load_config
from pipeline.errors import ConfigError
from pipeline.graph.plan import dotted_fields
from pipeline.runs.pretrainings import checkpoint_at, pretraining_of
from pipeline.storage import Store
from pipeline.training.checkpoints.format import MANIFEST, open_checkpoint
from pipeline.training.checkpoints.resume import StartPoint
from pipeline.training.checkpoints.retention import PINS

FREE = ("name", "tracking", "evaluation", "resources", "pretrain", "model.mask_ratio", "fork")
"""What a fork may change, apart from BOUND."""
BOUND = ("pretrain.global_batch",)


def fork(path: Path, overrides: Sequence[str], *, at: int, out: Path) -> StartPoint:
    """Writes the configuration of a run that goes on from the checkpoint of step `at` of the run of `path`."""
    parent = load_config(path)
    root = pretraining_of(parent).root
    key = checkpoint_at(root, at)
    document = document_of(path, overrides)
    if "name" not in {override.partition("=")[0].strip() for override in overrides}:
        document["name"] = f"{parent.name[:48]}-from-{at}"
    start = _pinned(root, key)
    document |= {"store": parent.store, "fork": asdict(start)}
    if out.exists():
        raise ConfigError(f"--out {out} exists: name a new file")
    text = f"# Goes on from step {at} of {path}.\n{yaml.safe_dump(document, sort_keys=False, allow_unicode=True)}"
    out.write_text(text)
    try:
        child = load_config(out)
        refuse_unfit(parent, child)
        _refuse_finished(root, key, child)
    except BaseException:
        out.unlink()
        raise
    return start


def refuse_unfit(parent: RunConfig, child: RunConfig) -> None:
    """ConfigError for the first field in which the child may not differ."""
    for field in _differing(parent.model_dump(mode="json"), child.model_dump(mode="json")):
        if _within(field, BOUND) or not _within(field, FREE):
            raise ConfigError(
                f"--set {field}: a fork goes on with the weights and at the position of its parent, so this must stay as it is. "
                f"It may change {', '.join(FREE[:-1])}, but for {', '.join(BOUND)}. Start a run of its own instead"
            )


def _differing(before: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    old, new = dotted_fields(before), dotted_fields(after)
    return (field for field in sorted({*old, *new}) if old.get(field) != new.get(field))


def _within(field: str, sections: Sequence[str]) -> bool:
    return any(f"{field}.".startswith(f"{section}.") for section in sections)


def _pinned(root: Store, key: str) -> StartPoint:
    """The checkpoint as a start, kept from now on."""
    digest = hashlib.sha256(root.read(f"{key}/{MANIFEST}")).hexdigest()
    root.create(f"{PINS}{digest[:12]}.json", json.dumps({"checkpoint": key, "why": "forked"}).encode())
    return StartPoint(checkpoint=f"{root.uri.rpartition('/')[2]}/{key}", manifest_sha256=digest)


def _refuse_finished(root: Store, key: str, child: RunConfig) -> None:
    with open_checkpoint(root, key) as checkpoint:  # and its files are whole
        history = checkpoint.history()
    if history and history[-1]["epoch"] >= child.pretrain.epochs:
        raise ConfigError(
            f"--set pretrain.epochs={child.pretrain.epochs}: the checkpoint is at epoch {history[-1]['epoch']:.2f} already, "
            "so nothing would be trained. Write more epochs, or an earlier --at"
        )
