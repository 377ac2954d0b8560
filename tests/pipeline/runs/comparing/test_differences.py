"""What differs between runs, on plain values."""

import pytest

from pipeline.reporting.comparison.values import Difference, RunRow, Spread, score_columns
from pipeline.runs.comparing.differences import Scored, differences, short_differences, why_not_comparable


def test_only_keys_that_differ_are_left_and_equal_numbers_are_equal_however_written():
    runs = [{"a": "1", "b": "1.0", "c": "x", "d": "[1, 2]"}, {"a": "1.0", "b": "2", "c": "x", "d": "[1, 3]"}]
    assert differences(runs) == [Difference("b", ("1.0", "2")), Difference("d", ("[1, 2]", "[1, 3]"))]
    assert differences([{"only": "1"}, {}]) == [Difference("only", ("1", "–"))]
    assert differences(runs[:1]) == []


def test_a_run_is_set_apart_by_the_last_word_of_each_key_unless_that_repeats():
    found = [
        Difference("model.mask_ratio", ("0.75", "0.5")),
        Difference("pretrain.epochs", ("10", "20")),
        Difference("evaluation.linear.epochs", ("1", "2")),
    ]
    assert short_differences(found, 1) == "mask_ratio=0.5 pretrain.epochs=20 linear.epochs=2"


def scored(**changed):
    values = {"digest": "a" * 64, "images": 100, "version": 1, "settings": {"split": "test", "train_labels": 100}}
    return {"knn/toy": Scored(**values | changed)}


def test_reasons_against_a_comparison_are_named_and_equal_scores_have_none():
    assert why_not_comparable(scored(), scored()) == []
    other = scored(settings={"split": "val", "train_labels": None})
    assert why_not_comparable(scored(), other) == ["knn/toy: split test and val", "knn/toy: train_labels 100 and all"]
    assert why_not_comparable(scored(), scored(version=2)) == ["knn/toy: version 1 and 2 of the protocol"]
    assert why_not_comparable(scored(), scored(images=90)) == ["knn/toy: 100 and 90 test images"]
    assert why_not_comparable(scored(), scored(digest="b" * 64, images=90)) == [
        f"knn/toy: other evaluation data (digest {'a' * 12} and {'b' * 12}, 100 and 90 images)"
    ]


def test_one_reason_names_all_scores_that_it_holds_for():
    ours = scored() | {"linear/toy": scored()["knn/toy"]}
    theirs = {name: scored(version=3)["knn/toy"] for name in ours}
    assert why_not_comparable(ours, theirs) == ["knn/toy, linear/toy: version 1 and 3 of the protocol"]


def row(**values):
    scores = {"knn/toy/pretrained": Spread(mean=0.6), "knn/toy/random": Spread(mean=0.4)}
    return RunRow(name="one", scores=scores, **values)


def test_a_point_costs_dollars_where_a_price_is_known_and_hours_elsewhere():
    assert row(usd=10.0, gpu_hours=4.0).per_point("knn/toy") == (pytest.approx(0.5), "USD")
    assert row(gpu_hours=4.0, hours=2.0).per_point("knn/toy") == (pytest.approx(0.2), "GPU-h")
    assert row(cpu_hours=4.0).per_point("knn/toy") == (pytest.approx(0.2), "CPU-h")
    assert row().per_point("knn/toy") is None
    assert row(usd=10.0).per_point("linear/toy") is None


def test_a_run_that_is_no_better_than_random_has_no_cost_per_point():
    worse = {"knn/toy/pretrained": Spread(mean=0.3), "knn/toy/random": Spread(mean=0.4)}
    assert RunRow(name="one", scores=worse, usd=1.0).per_point("knn/toy") is None


def test_columns_that_most_runs_have_come_first():
    other = RunRow(name="two", scores={"knn/toy/pretrained": Spread(mean=0.5), "a/toy/pretrained": Spread(mean=0.5)})
    assert score_columns([row(), other]) == ["knn/toy", "a/toy"]


def test_a_spread_in_words():
    assert Spread(mean=0.971, sd=0.003, n=5).text == "97.1 ± 0.3 (5)"
    assert Spread(mean=0.5).text == "50.0"
    assert Spread(mean=12.34, sd=1.0, n=2).text == "12.3 ± 1.0 (2)"  # an effective rank
