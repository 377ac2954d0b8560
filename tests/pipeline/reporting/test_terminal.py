"""Tables for a terminal, as text."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from pipeline.reporting.format import clock
from pipeline.reporting.summaries import PlanRow, Score, StepRow, as_metrics, remarks_on_scores
from pipeline.reporting.terminal import closing_table, plan_table


def shown(renderable, width=120) -> str:
    console = Console(file=io.StringIO(), width=width, record=True)
    console.print(renderable)
    return console.export_text()


def test_the_closing_table_has_steps_scores_and_addresses():
    steps = [
        StepRow(name="pretrain", state="done", fingerprint="1c22a0b3d4e5ffff", seconds=7421),
        StepRow(name="linear", state="failed", detail="[red]out of memory[/red]"),
    ]
    scores = [
        Score(protocol="linear", dataset="digits", encoder="pretrained", values=(0.97, 0.98)),
        Score(protocol="linear", dataset="digits", encoder="random", values=(0.84,)),
    ]
    text = shown(
        closing_table(steps, scores=scores, addresses={"store": "s3://b/runs", "report": "/tmp/[x]/page.html"})
    )
    for part in ["✓ done", "2:03:41", "1c22a0b3d4e5", "97.5 ± 0.7 %", "84.0 %", "+13.5", "s3://b/runs"]:
        assert part in text
    assert "ffff" not in text
    assert "[red]out of memory[/red]" in text  # names and errors are text, never markup
    assert "/tmp/[x]/page.html" in text


def test_scores_stand_beside_the_numbers_of_images_and_labels_behind_them():
    scores = [
        Score(protocol="linear", dataset="pets", encoder="pretrained", values=(1.0,), images=1, labels=3),
        Score(protocol="finetune", dataset="pets", encoder="pretrained", values=(0.5,), images=1, labels=3),
        Score(protocol="linear", dataset="digits", encoder="pretrained", values=(0.9,), images=400, labels=1320),
        Score(protocol="linear", dataset="older", encoder="pretrained", values=(0.9,)),
    ]
    lines = shown(closing_table([], scores=scores, addresses={})).splitlines()
    rows = {line.split()[0]: line.split() for line in lines if "linear" in line}
    assert rows["pets"][-2:] == ["1", "3"]
    assert rows["digits"][-3:] == ["400", "1", "320"]
    assert rows["older"][-2:] == ["–", "–"]
    (remark,) = [line for line in lines if "test image" in line]
    assert remark.startswith("pets  only 1 test image: one of them more or less is 100 percentage points")
    assert remarks_on_scores([replace(scores[0], images=60)]) == {
        "pets": "only 60 test images: one of them more or less is 1.67 percentage points"
    }


def test_the_plan_says_what_runs_and_which_field_made_it_differ():
    rows = [
        PlanRow(name="shard", state="cached", fingerprint="ab" * 32),
        PlanRow(
            name="pretrain",
            state="to_run",
            differs="mask_ratio 0.75 -> 0.6",
            memory_gib=9.81,
            seconds=151_200,
            cost="$12",
        ),
        PlanRow(name="linear", state="blocked"),
    ]
    text = shown(plan_table(rows))
    for part in ["≡ cached", "▸ to run", "9.8 GiB", "1 d 18:00", "$12", "mask_ratio 0.75 -> 0.6"]:
        assert part in text
    assert "1 of 3 steps to run, about 1 d 18:00" in text


def test_80_columns_hold_a_plan_with_its_cost():
    name = "finetune-imagenet-pretrained-s0"
    row = PlanRow(
        name=name, state="to_run", fingerprint="ab" * 32, memory_gib=31.8, seconds=317_820, cost="$2 119 to $3 532"
    )
    console = Console(file=io.StringIO(), width=80, record=True)
    console.print(plan_table([row]), soft_wrap=True)
    assert console.export_text().splitlines()[1].split("  ") == [
        name, "▸ to run", "31.8 GiB", "3 d 16:17", "$2 119 to $3 532",
    ]  # fmt: skip


def test_on_80_columns_tables_stay_tables_and_addresses_can_be_copied():
    name, address = "finetune-imagenet-1k-pretrained-s0", "file:///data/" + "deep/" * 30 + "index.html"
    detail = f"{address}: no space left. Free some, or choose another store"
    closing = closing_table(
        [StepRow(name=name, state="stopped", fingerprint="1c22a0b3d4e5ffff", seconds=353_000, detail=detail)],
        addresses={"report": address},
    )
    foreseen = plan_table(
        [PlanRow(name=name, state="to_run", fingerprint="1c22a0b3d4e5ffff", differs=f"config.x: {detail}")]
    )
    for renderable, whole in (
        (closing, (f"{name}  {detail}", f"report  {address}")),
        (foreseen, (f"{name}  config.x: {detail}",)),
    ):
        console = Console(file=io.StringIO(), width=80, record=True)
        console.print(renderable, soft_wrap=True)
        lines = [line.rstrip() for line in console.export_text().splitlines()]
        assert lines[1].split()[-1] == "1c22a0b3d4e5"
        assert len(lines[1]) <= 80
        assert set(whole) <= set(lines)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "–"),
        (4.21, "4.2 s"),
        (59.4, "59 s"),
        (59.6, "1:00"),
        (187, "3:07"),
        (7387, "2:03:07"),
        (353_000, "4 d 02:03"),
    ],
)
def test_durations_read_like_a_clock(seconds, text):
    assert clock(seconds) == text


def test_a_measure_is_shown_without_per_cent_and_other_settings_beside_the_score():
    ranks = [
        Score(protocol="rankme", dataset="toy", encoder=encoder, values=values, images=60, measure="effective rank")
        for encoder, values in (("pretrained", (12.0, 13.0)), ("random", (9.25, 9.25)))
    ]
    others = {"k10": (0.6, 0.8), "k100": (0.2, 0.4)}
    near = Score(
        protocol="knn", dataset="toy", encoder="pretrained", values=(0.5, 0.7), images=500, setting="k20", others=others
    )
    console = Console(file=io.StringIO(), width=120, record=True)
    console.print(closing_table([], scores=[*ranks, near], addresses={}), soft_wrap=True)
    lines = [" ".join(line.split()) for line in console.export_text().splitlines()]
    assert "toy rankme 12.5 ± 0.7 9.2 ± 0.0 +3.2 2 – –" in lines
    assert "rankme toy effective rank of the features of 60 images, no accuracy" in lines
    assert "knn toy pretrained the score is k20; beside it k10 70.0 %, k100 30.0 %" in lines
    assert remarks_on_scores(ranks) == {}  # one image more or less is no percentage point of a rank
    metrics = as_metrics([near])
    assert metrics["score/knn/toy/pretrained/k10"] == pytest.approx(0.7)
    assert metrics["score/knn/toy/pretrained"] == pytest.approx(0.6)


def test_scores_have_names_under_which_mlflow_compares_them():
    rows = [Score(protocol="linear", dataset="digits", encoder="pretrained", values=(0.5, 0.7))]
    metrics = as_metrics(rows)
    assert metrics["score/linear/digits/pretrained"] == pytest.approx(0.6)
    assert metrics["score_sd/linear/digits/pretrained"] == pytest.approx(0.02**0.5)
    assert metrics["score_n/linear/digits/pretrained"] == 2
