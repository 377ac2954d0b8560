"""Forks: a new pretraining that continues from a checkpoint of another one under a different recipe.

It takes over weights, AdamW's moments and the position in the data. The child's configuration names the checkpoint and its digest
(`fork`), so that it has a fingerprint of its own and runs in the same store. The parent's checkpoint is pinned, which keeps
retention and `gc` from deleting it. Data, seed and global batch must stay, because the position counts in them; so must the
model's shape.
Errors: ConfigError for a change that a fork cannot make; CheckpointError if there is no such checkpoint."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from pipeline.config import RunConfig, load_config, read_document
from pipeline.errors import ConfigError
from pipeline.graph.plan import dotted_fields
from pipeline.runs.finished.pretrainings import checkpoint_at, pretraining_of
from pipeline.runs.sources.state import settled
from pipeline.storage import Store
from pipeline.training.checkpoints.format import MANIFEST, open_checkpoint
from pipeline.training.checkpoints.resume import StartPoint
from pipeline.training.checkpoints.retention import PINS

MAY_CHANGE = ("name", "tracking", "evaluation", "resources", "pretrain", "model.mask_ratio", "fork")
"""Sections and fields that a fork may change, except for those in MUST_STAY."""
MUST_STAY = ("pretrain.global_batch",)


def fork(path: Path, overrides: Sequence[str], *, at: int, out: Path) -> StartPoint:
    """Write to `out` the configuration of a run that continues from training step `at` of the run in `path`."""
    set_fields = {override.partition("=")[0].strip() for override in overrides}
    if wrong := next((name for name in set_fields if name.startswith("pretrain.start")), None):
        raise ConfigError(
            f"--set {wrong}: a fork takes its weights from the checkpoint, not from elsewhere: leave it out"
        )
    parent = settled(load_config(path))
    root = pretraining_of(parent).root
    key = checkpoint_at(root, at)
    document = read_document(path, overrides)
    # the weights that the parent started from are in the checkpoint
    for name in ("start", "start_decoder"):
        (document.get("pretrain") or {}).pop(name, None)
    if "name" not in set_fields:
        document["name"] = f"{parent.name[:48]}-from-{at}"  # a name has 64 characters at most
    document["data"].setdefault(
        "snapshot", parent.model_dump(mode="json")["data"]["snapshot"]
    )  # a position is in a dataset
    start = _pinned(root, key)
    document |= {"store": parent.store, "fork": asdict(start)}
    if out.exists():
        raise ConfigError(f"--out {out} exists: name a new file")
    text = f"# Continues from step {at} of {path}.\n{yaml.safe_dump(document, sort_keys=False, allow_unicode=True)}"
    out.write_text(text)
    try:  # checked as written, so that what the user gets is what was checked
        child = settled(load_config(out))
        check_child(parent, child)
        _check_epochs_left(root, key, child)
    except BaseException:
        out.unlink()
        raise
    return start


def check_child(parent: RunConfig, child: RunConfig) -> None:
    """Raise ConfigError for the first field in which the child differs but must not."""
    for field in _differing(parent.model_dump(mode="json"), child.model_dump(mode="json")):
        if _within(field, MUST_STAY) or not _within(field, MAY_CHANGE):
            raise ConfigError(
                f"--set {field}: a fork continues with the weights and at the position of its parent, so this must stay as it is. "
                f"A fork may change {', '.join(MAY_CHANGE[:-1])}, except {', '.join(MUST_STAY)}. Start a new run instead"
            )


def _differing(before: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    old, new = dotted_fields(before), dotted_fields(after)
    return (field for field in sorted({*old, *new}) if old.get(field) != new.get(field))


def _within(field: str, sections: Sequence[str]) -> bool:
    return any(f"{field}.".startswith(f"{section}.") for section in sections)


def _pinned(root: Store, key: str) -> StartPoint:
    """Pin a checkpoint, so that nothing deletes it, and return it as the starting point of another run."""
    digest = hashlib.sha256(root.read(f"{key}/{MANIFEST}")).hexdigest()
    # by digest: a second fork of one checkpoint finds its pin in place
    root.create(f"{PINS}{digest[:12]}.json", json.dumps({"checkpoint": key, "why": "forked"}).encode())
    return StartPoint(checkpoint=f"{root.uri.rpartition('/')[2]}/{key}", manifest_sha256=digest)


def _check_epochs_left(root: Store, key: str, child: RunConfig) -> None:
    with open_checkpoint(root, key) as checkpoint:  # also verifies that its files are complete
        history = checkpoint.history()
    if history and history[-1]["epoch"] >= child.pretrain.epochs:
        raise ConfigError(
            f"--set pretrain.epochs={child.pretrain.epochs}: the checkpoint is at epoch {history[-1]['epoch']:.2f} already, "
            "so nothing would be trained. Write more epochs or an earlier --at"
        )
