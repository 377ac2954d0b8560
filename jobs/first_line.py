"""The line with which `mae run` begins, before anything heavy is imported.

The configuration's checks need torch, which takes seconds to import, so this reads only the few values that it shows and
checks nothing: whatever is wrong is reported by those checks, right afterwards."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

PROTOCOLS = ("linear", "finetune")
"""Those of a dataset that names none, as in `pipeline.config.fields.DatasetConfig`, which imports torch."""
MEANINGS = {
    "snapshot": "lists the source",
    "shard": "packs the images",
    "linear": "probes the frozen encoder",
    "finetune": "trains it on the labels",
    "knn": "lets the neighbours vote",
    "ridge": "fits a few labels per class",
    "rankme": "measures the features' rank",
    "partial": "trains its last blocks",
    "scratch": "trains an untrained one",
    "linear_online": "probes it under crops",
    "attentive": "probes its patch tokens",
    "own_head": "scores its own head",
}
"""What steps do whose names are words of the field."""


def first_line(path: Path, overrides: Sequence[str] = ()) -> str | None:
    """Return a run's name, model, store and steps in one line, or None for a file that is no configuration."""
    try:
        document = yaml.safe_load(path.read_text())
        for override in overrides:
            dotted, _, text = override.partition("=")
            _set(document, dotted.strip().split("."), yaml.safe_load(text))
        model, datasets = document["model"], document.get("evaluation", {}).get("datasets", [{}])
        protocols = dict.fromkeys(name for one in datasets for name in one.get("protocols", PROTOCOLS))
        steps = ["snapshot", "shard", "pretrain", *protocols, "report"]
        told = (f"{step} ({MEANINGS[step]})" if step in MEANINGS else step for step in steps)
        return (
            f"run {document.get('name', 'mae')}  model {model.get('size', 'base')}  "
            f"store {document.get('store', '.mae/store')}  steps {', '.join(told)}"
        )
    except (OSError, ValueError, yaml.YAMLError, LookupError, TypeError, AttributeError):
        return None


def _set(section: Any, names: Sequence[str], value: Any) -> None:
    """Write a value into nested mappings and lists."""
    name: Any = int(names[0]) if isinstance(section, list) else names[0]
    if len(names) == 1:
        section[name] = value
        return
    if isinstance(section, dict) and section.get(name) is None:
        section[name] = {}
    _set(section[name], names[1:], value)
