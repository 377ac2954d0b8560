"""What a run is called in MLflow, and by what it is found again. Pure functions of the configuration.

The *identity* of a run is a digest of all that can change a result; `name`, `store`, `resources` and `tracking` are outside.
It covers only the fields that differ from the defaults, so that a field that is added later changes no run's identity."""

import hashlib
import json
import re
from typing import Any

from mae_core.config import size_name
from pipeline.config import RunConfig
from pipeline.evaluation.protocols import PROTOCOL_NAMES
from pipeline.runs.workflow import OUTSIDE, snapshot_names
from pipeline.stages.pretrain import MILESTONE_OPTIONS
from pipeline.tracking.mlflow_format import flatten_params, redact_text

TITLE_CHARS = 60
"""Room for differences in a run's name. Where there are more, the first digits of its digest tell the names apart."""
_SAYS_NOTHING = {
    "train",
    "training",
    "trainval",
    "data",
    "dataset",
    "datasets",
    "images",
    "imgs",
    "raw",
    "shards",
    "tars",
    "root",
}
_CHANGES_NO_RESULT = re.compile(
    rf"({'|'.join(OUTSIDE)})(\..*)?|data\.bad_share_(warn|stop)|evaluation\.({'|'.join(MILESTONE_OPTIONS)})|weights\.(file|assumed)"
)
_SHOWN_ELSEWHERE = re.compile(
    r"data\.(source|labels|\w+_column|split_from)|evaluation\.datasets\..*|weights(\..*)?"
    r"|model\.encoder\.(embed_dim|depth|num_heads|patch_size)"
)
"""The data and the size have tags of their own; weights from elsewhere give the run its name."""
_FIRST = ("mask_ratio", "masking", "target", "epochs", "base_lr", "global_batch", "seed")
"""Fields that are varied most often come first."""
_SIZE = ("embed_dim", "depth", "num_heads", "patch_size", "image_size")
_NEVER_IMPLIED = ("model.encoder.image_size", "model.mask_ratio", "model.mask_cell", "evaluation.preset")
_OWN_NAME = "data"
"""The evaluation dataset's default name."""


def data_name(config: RunConfig) -> str:
    """Return a short name of the data: that of the evaluation dataset with the same images, or one from the address."""
    for dataset in config.evaluation.datasets:
        if dataset.source is None and dataset.name != _OWN_NAME:
            return dataset.name
    words = [re.sub(r"[^A-Za-z0-9._-]+", "-", word).strip("-.") for word in re.split(r"[/?]", config.data.source)[1:]]
    telling = [word for word in words if word and word.lower() not in _SAYS_NOTHING]
    return telling[-1] if telling else _OWN_NAME


def data_label(config: RunConfig) -> str:
    """Return the data's name with the names of its snapshots, unless there is only the default one: `plankton@1+2`."""
    names = snapshot_names(config)
    return data_name(config) if names == ("1",) else f"{data_name(config)}@{'+'.join(names)}"


def experiment_name(config: RunConfig) -> str:
    """Return the MLflow experiment of a run: the one that the configuration names, or one for each data set."""
    return config.tracking.experiment or f"mae-{data_name(config)}"


def identity_digest(config: RunConfig) -> str:
    """Return 32 hex digits that are equal for runs that compute the same."""
    defaults = _flat(_defaults(config))
    inside = {
        key: value
        for key, value in _flat(config).items()
        if not _CHANGES_NO_RESULT.fullmatch(key) and (defaults.get(key) != value or key == "data.source")
    }
    return hashlib.sha256(json.dumps(inside, sort_keys=True).encode()).hexdigest()[:32]


def differences(config: RunConfig) -> dict[str, str]:
    """Return the fields that differ from the defaults, by short name, those that --set gave first, then those varied most often.

    What follows from another field is no difference: a warm-up that fits the epochs, what a preset gives the protocols."""
    expected = _expected(config)
    fields = _flat(config)
    found = {
        _short(key): _plain(fields[key])
        for key in sorted(fields, key=lambda key: key.startswith("data."))  # how images are stored tells least
        if expected.get(key) != fields[key]
        and not _CHANGES_NO_RESULT.fullmatch(key)
        and not _SHOWN_ELSEWHERE.fullmatch(key)
    }
    order = (*map(_short, config.overridden), *_FIRST)
    return {key: found[key] for key in sorted(found, key=lambda key: order.index(key) if key in order else len(order))}


def differs_label(config: RunConfig) -> str:
    """Return all differences in one line, or `defaults`."""
    return " ".join(f"{key}={value}" for key, value in differences(config).items()) or "defaults"


def run_title(config: RunConfig) -> str:
    """Return the name of a run: its own with what --set changed, then data, size, and what else differs, as far as there is room.

    MLflow's lists and legends show some twenty characters of it, so that what tells runs apart comes first."""
    words = {key: f"{key}={value}" for key, value in differences(config).items()}
    changed = [words.pop(key) for key in map(_short, config.overridden) if key in words]
    rest = list(words.values())
    shown = [word for end, word in enumerate(rest, 1) if len(" ".join([*changed, *rest[:end]])) <= TITLE_CHARS]
    left_out = [] if shown == rest else [f"… #{identity_digest(config)[:4]}"]
    data = data_label(config)
    parts = [" ".join([config.name, *changed]), "" if data in config.name else data, size_name(config.model.encoder)]
    return " · ".join(part for part in (*parts, " ".join([*shown, *left_out])) if part)


def _defaults(config: RunConfig, **sections: Any) -> RunConfig:
    return RunConfig.model_validate({"data": {"source": config.data.source}, "model": {}, **sections})


def _expected(config: RunConfig) -> dict[str, str]:
    """The defaults, given the size, the preset and the epochs of the configuration."""
    plain, preset = _flat(_defaults(config)), config.evaluation.preset
    encoder = {name: getattr(config.model.encoder, name) for name in _SIZE}
    # the mask's too, since the default one may not fit a grid of few patches
    model = {"encoder": encoder, "mask_ratio": config.model.mask_ratio, "mask_cell": config.model.mask_cell}
    sized: dict[str, Any] = {"model": model, "evaluation": {"preset": preset}}
    settings = {name: config.evaluation.settings(name) for name in PROTOCOL_NAMES}
    epochs: dict[str, Any] = {name: {"epochs": one.epochs} for name, one in settings.items() if hasattr(one, "epochs")}
    paced = {**sized, "pretrain": {"epochs": config.pretrain.epochs}, "evaluation": {"preset": preset, **epochs}}
    warmups = {key: value for key, value in _flat(_defaults(config, **paced)).items() if key.endswith(".warmup_epochs")}
    return {**_flat(_defaults(config, **sized)), **warmups, **{key: plain[key] for key in _NEVER_IMPLIED}}


def _short(key: str) -> str:
    """`model.mask_ratio` -> `mask_ratio`; `evaluation.linear.epochs` -> `linear.epochs`."""
    return re.sub(r"^(model\.encoder|model|pretrain|evaluation|data)\.", "", key)


def _plain(value: str) -> str:
    """`[16, 16]` -> `16`; spaces would end the word."""
    text = value.replace(" ", "").replace('"', "")
    square = re.fullmatch(r"\[(\d+),\1\]", text)
    return square[1] if square else text


def _flat(config: RunConfig) -> dict[str, str]:
    flat = flatten_params(config.model_dump(mode="json"))
    return {key: redact_text(value) for key, value in flat.items()}
