"""What a sweep varies: grids, draws out of them, and files."""

import random

import pytest
import yaml

from pipeline.config.sweeps import Range, described, is_sweep, parse_grid, points, read_sweep, short_names
from pipeline.errors import ConfigError

GRID = {"model.mask_ratio": [0.4, 0.75], "pretrain.epochs": [1, 2, 3]}


def write(tmp_path, text):
    path = tmp_path / "my_sweep.yaml"
    path.write_text(text)
    return path


def test_a_grid_option_holds_yaml_values():
    assert parse_grid(["model.mask_ratio=0.4,0.75", "pretrain.augment={kind: center, flip: false},{kind: shift}"]) == {
        "model.mask_ratio": (0.4, 0.75),
        "pretrain.augment": ({"kind": "center", "flip": False}, {"kind": "shift"}),
    }


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["model.mask_ratio"], "write KEY=V1,V2"),
        (["=0.4"], "write KEY=V1,V2"),
        (["a=[1"], "is not a YAML value"),
        (["a=1", "a=2"], "a has a grid already"),
    ],
)
def test_a_malformed_grid_is_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        parse_grid(options)


def test_every_combination_is_a_point_once():
    found = points(GRID)
    assert len(found) == 6
    assert all(found.count(point) == 1 for point in found)
    assert found[0] == {"model.mask_ratio": 0.4, "pretrain.epochs": 1}


def test_draws_are_different_points_of_the_grid_and_more_of_them_begin_alike():
    few, many = points(GRID, draws=3, seed=5), points(GRID, draws=6, seed=5)
    assert many[:3] == few
    assert sorted(map(str, many)) == sorted(map(str, points(GRID)))
    assert points(GRID, draws=6, seed=6) != many


def test_ranges_are_drawn_from_within_and_logarithmic_ones_fill_every_decade():
    grid = {"lr": ["log:1e-5..1e-2"], "ratio": ["0.1..0.9"], "depth": ["1..4"]}
    found = points(grid, draws=300)
    rates, depths = [point["lr"] for point in found], {point["depth"] for point in found}
    assert all(1e-5 <= rate <= 1e-2 for rate in rates)
    assert depths == {1, 2, 3, 4}
    # a third in each decade; the standard deviation of the count is 8
    assert all(60 < sum(low <= rate < 10 * low for rate in rates) < 140 for low in (1e-5, 1e-4, 1e-3))
    assert all(0.1 <= point["ratio"] <= 0.9 for point in found)
    assert Range(1, 4, logarithmic=False).draw(random.Random(0)) in {1, 2, 3, 4}


@pytest.mark.parametrize(
    ("grid", "draws", "words"),
    [
        ({}, None, "nothing varies"),
        ({"a": []}, None, "the grid of a is empty"),
        ({"a": [1, 2]}, 3, "the grid has only 2 points"),
        ({"a": ["1..3"]}, 4, "only about 3 different points"),
        ({"a": ["0.1..0.9"]}, None, "add --random N"),
        ({"a": ["0.9..0.1"]}, 2, "low < high"),
        ({"a": ["log:0..1"]}, 2, "0 < low < high"),
        ({"a": list(range(40)), "b": list(range(40))}, None, "1000 at most"),
    ],
)
def test_what_gives_no_points_is_refused(grid, draws, words):
    with pytest.raises(ConfigError, match=words):
        points(grid, draws=draws)


def test_fields_are_named_by_their_shortest_ending_that_is_unambiguous():
    keys = ["model.mask_ratio", "pretrain.epochs", "evaluation.linear.epochs"]
    assert list(short_names(keys).values()) == ["mask_ratio", "pretrain.epochs", "linear.epochs"]
    assert described({"model.mask_ratio": 0.4, "pretrain.augment": {"kind": "center", "flip": False}}) == (
        "mask_ratio=0.4 augment=kind:center,flip:false"
    )
    assert described({}) == "as configured"


def test_a_file_says_what_varies_and_what_is_published(tmp_path):
    path = write(
        tmp_path,
        """
        config: ../base.yaml
        grid: {model.mask_ratio: [0.4, 0.75]}
        paper: {source: figure 5, rows: [{at: {model.mask_ratio: 0.75}, scores: {linear: 73.5}}]}
        """,
    )
    read = read_sweep(path)
    assert read.name == "my_sweep"
    assert read.config == str(tmp_path / "../base.yaml")
    assert read.paper.rows[0].scores == {"linear": 73.5}
    assert is_sweep(path)
    run = tmp_path / "run.yaml"
    run.write_text(yaml.safe_dump({"data": {"source": "x"}}))
    assert not is_sweep(run)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{config: a.yaml, grid: {a: [1]}, members: [{set: {a: 1}}]}", "write either grid or members"),
        ("{config: a.yaml, grid: {a: [1]}, zzz: 1}", "zzz is not a field of a sweep"),
        ("{grid: {a: [1]}}", "config is missing"),
        ("{config: a.yaml, grid: {a: 1}}", "grid.a = 1"),
        (
            "{config: a.yaml, grid: {a: [1]}, paper: {source: x, rows: [{at: {a: 2}, scores: {linear: 1}}]}}",
            "no member sets a=2",
        ),
    ],
)
def test_a_wrong_file_is_refused_with_its_name(tmp_path, text, words):
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=words) as refused:
        read_sweep(path)
    assert str(refused.value).startswith(str(path))
