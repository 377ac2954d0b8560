"""Presets are the documented recipes: the table in docs/evaluation.md says the same, value by value."""

import re
from collections.abc import Iterator, Mapping
from typing import Any, get_args

import pytest
import yaml
from run_kit import ROOT, document

from pipeline.config import RunConfig
from pipeline.evaluation.presets import PRESETS, PresetName
from pipeline.runs.workflow import build

SIZES = ("base", "large", "huge")


def leaves(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(item, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, value


def parsed(cell: str) -> Any:
    values = [yaml.safe_load(part) for part in cell.split(",")]
    return values if len(values) > 1 else values[0]


def documented() -> dict[tuple[str, str], dict[str, Any]]:
    """Return the table as (preset, size) -> field -> value."""
    text = (ROOT / "docs/evaluation.md").read_text()
    table = re.search(r"\n(\| Field .*?)\n\n", text, re.DOTALL)[1]
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for column, title in enumerate(header[1:], 1):
        name, _, size = title.replace("`", "").partition(", ")
        cells = {row[0].strip("`"): parsed(row[column]) for row in rows if row[column]}
        found |= {(name, one): cells for one in ([size] if size else SIZES)}
    return found


def test_the_documentation_has_every_preset():
    assert {name for name, _ in documented()} == set(get_args(PresetName)) - {"none"} == set(PRESETS) - {"none"}


@pytest.mark.parametrize(("name", "size"), documented())
def test_no_preset_drifts_from_the_documented_recipe(name, size):
    sections = dict(PRESETS[name](size))
    assert sections.pop("partial") == sections["finetune"]
    assert dict(leaves(sections, "")) == documented()[name, size]


def read(size: str = "base", **evaluation: Any) -> Any:
    content = document("/data/store", "/data/images")
    return RunConfig.model_validate({**content, "model": {"size": size}, "evaluation": evaluation})


@pytest.mark.parametrize(("name", "size"), documented())
def test_a_configuration_takes_every_value(name, size):
    config = read(size, preset=name)
    for field, value in documented()[name, size].items():
        found: Any = config.evaluation
        for part in field.split("."):
            found = getattr(found, part)
        assert (list(found) if isinstance(found, tuple) else found) == value, field


def test_what_is_written_wins():
    config = read(preset="mae-official-base", finetune={"base_lr": 1e-4, "augment": {"flip": False}})
    recipe = config.evaluation.finetune
    assert (recipe.base_lr, recipe.layer_decay) == (1e-4, 0.65)
    assert (recipe.augment.flip, recipe.augment.erasing) == (False, 0.25)


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "none"])
@pytest.mark.parametrize("protocol", ["linear", "linear_online", "attentive", "finetune", "partial", "scratch"])
def test_a_short_run_is_not_refused_for_its_warmup(name, protocol):
    short = read(preset=name, **{protocol: {"epochs": 1}}).evaluation.settings(protocol)
    assert 0 < short.warmup_epochs < 1


def test_no_preset_is_the_default_and_changes_no_fingerprint():
    plain, none = read(), read(preset="none")
    assert [step.fingerprint for step in build(plain)] == [step.fingerprint for step in build(none)]
    assert read().evaluation.finetune.base_lr == 1e-3


def test_an_unknown_preset_is_answered():
    with pytest.raises(ValueError, match="mae-official-base"):
        read(preset="mae-offical-base")
