"""The fingerprint covers what a step computes, and nothing about where it runs."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import graph_stages
import pytest
from graph_stages import Work, write
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from mae_core.errors import ConfigError
from pipeline.cluster.resources import Resources
from pipeline.graph.step import ADDED_LATER, Step, canonical


@dataclass(frozen=True)
class Config:
    ratio: object = 0.75
    sizes: object = (1, 2)


class Model(BaseModel):
    ratio: float = 0.75
    sizes: tuple[int, ...] = (1, 2)


LISTING = Step(kind="shard", name="listing", function=write, config=Work(1))
STEP = Step(
    kind="shard",
    name="shard",
    function=write,
    config=Config(),
    inputs={"listing": LISTING},
    resources=Resources(workers=1),
)


def test_the_fingerprint_of_a_fixed_step_stays(monkeypatch):
    # An upgrade must never restart a ten-day run: if this fails, correct the change, not the number.
    monkeypatch.setattr(graph_stages, "VERSION", 1)
    assert STEP.fingerprint == "aee9adedd4b15ca2b2ecb925ef63c1ed808775f144123e0abeccbcf05497d283"
    assert STEP.directory == f"shard-{STEP.fingerprint[:12]}"


@pytest.mark.parametrize(
    "change",
    [
        {"name": "shards"},
        {"config": Config(ratio=0.8)},
        {"inputs": {}},
        {"inputs": {"snapshot": LISTING}},
        {"inputs": {"listing": dataclasses.replace(LISTING, config=Work(2))}},
    ],
    ids=["name", "config", "no input", "input's name", "input's config"],
)
def test_what_is_computed_changes_the_fingerprint(change):
    assert dataclasses.replace(STEP, **change).fingerprint != STEP.fingerprint


def test_a_field_added_later_stays_out_at_its_default_and_enters_otherwise():
    @dataclass(frozen=True)
    class Grown(Config):
        colour: str | None = dataclasses.field(default=None, metadata=ADDED_LATER)

    assert dataclasses.replace(STEP, config=Grown()).fingerprint == STEP.fingerprint
    assert dataclasses.replace(STEP, config=Grown(colour="red")).fingerprint != STEP.fingerprint


def test_version_changes_the_fingerprint_of_the_step_and_of_what_reads_it(monkeypatch):
    before = STEP.fingerprint, LISTING.fingerprint
    monkeypatch.setattr(graph_stages, "VERSION", 2)
    assert STEP.fingerprint != before[0]
    assert LISTING.fingerprint != before[1]


@pytest.mark.parametrize(
    "change",
    [
        {"resources": Resources(workers=64)},
        {"options": {"limit": 1}},
        {"kind": "report"},
        {"resume_point": lambda root: ""},
    ],
)
def test_where_and_how_it_runs_does_not(change):
    source = dataclasses.replace(LISTING, **change)
    assert dataclasses.replace(STEP, inputs={"listing": source}, **change).fingerprint == STEP.fingerprint


@pytest.mark.parametrize(
    "config",
    [
        Config(sizes=[1, 2]),
        Config(sizes=(1.0, 2)),
        Model(),
        {"ratio": 0.75, "sizes": [1, 2]},
        {"sizes": [1, 2], "ratio": 0.75},
    ],
    ids=["list for tuple", "1.0 for 1", "pydantic", "mapping", "other key order"],
)
def test_equal_values_have_one_form(config):
    assert dataclasses.replace(STEP, config=config).fingerprint == STEP.fingerprint


@pytest.mark.parametrize(("one", "other"), [(True, 1), ("1", 1), (None, 0), (0.1, 0.2), ([[1], 2], [1, [2]])])
def test_different_values_have_different_forms(one, other):
    fingerprints = {dataclasses.replace(STEP, config=Config(value)).fingerprint for value in (one, other)}
    assert len(fingerprints) == 2


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(deadline=None)
@given(plain)
def test_the_canonical_form_is_a_fixed_point(value):
    # a receipt holds the canonical form of an earlier config; it must compare equal to that of today's
    assert canonical(canonical(value)) == canonical(value)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({1, 2}, r"ratio=\{1, 2\} \(set\) has no stable form"),
        (float("nan"), "ratio=nan .* write a finite number"),
        (float("inf"), "ratio=inf .* write a finite number"),
        ([0, {"deep": Path("x")}], r"ratio\[1\]\.deep=PosixPath\('x'\) \(PosixPath\) has no stable form"),
        ({1: "a"}, "ratio=.* needs text keys"),
        (Work, "ratio=.* has no stable form"),
    ],
    ids=["set", "nan", "inf", "object", "keys", "class"],
)
def test_values_without_a_stable_form_are_refused_by_name(value, words):
    with pytest.raises(ConfigError, match=f"^step shard: config.{words}"):
        dataclasses.replace(STEP, config=Config(value)).identity()


@pytest.mark.parametrize("version", [None, "1", 1.0])
def test_a_module_without_a_whole_number_version_is_refused(version, monkeypatch):
    module = ModuleType("stage_of_somebody")
    module.VERSION = version
    monkeypatch.setitem(__import__("sys").modules, module.__name__, module)

    def stage(config, inputs, attempt):
        raise NotImplementedError

    stage.__module__ = module.__name__
    with pytest.raises(ConfigError, match="step shard: module stage_of_somebody needs a whole number VERSION"):
        _ = dataclasses.replace(STEP, function=stage).fingerprint
