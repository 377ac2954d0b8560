"""The page of a comparison, from plain values."""

import json

import numpy as np

from pipeline.reporting.comparison.charts import AXES, charts
from pipeline.reporting.comparison.page import reconstructions, render_page
from pipeline.reporting.comparison.values import Comparison, Curve, Difference, PairedResult, Panel, RunRow, Spread

SCORES = {
    "knn/toy/pretrained": Spread(mean=0.6, sd=0.1, n=2, values=(0.5, 0.7)),
    "rankme/toy/pretrained": Spread(mean=12.0, n=1, values=(12.0,)),
}


def curve(run: str, points: int = 3) -> Curve:
    steps = list(range(1, points + 1))
    return Curve(
        run=run,
        images=[10.0 * step for step in steps],
        steps=steps,
        hours=[0.1 * step for step in steps],
        loss=[1.0 / step for step in steps],
        milestones={"knn": [(12.0, 0.4), (29.0, 0.5)]},
    )


def comparison(**changed) -> Comparison:
    names = ("<b>one</b>", "two")
    values = {
        "rows": [RunRow(name=name, scores=SCORES) for name in names],
        "curves": [curve(name) for name in names],
        "config": [Difference("data.source", ("s3://key:secret@host/a", "b"))],
        "tests": [
            PairedResult(
                run="two",
                against=names[0],
                score="knn/toy",
                images=10,
                seeds=1,
                difference=1.0,
                low=-1.0,
                high=3.0,
                only_run=2,
                only_against=1,
                p=0.5,
                p_holm=0.5,
                test="McNemar, mid-p",
            )
        ],
    }
    return Comparison(**values | changed)


def values_of(spec: dict) -> list[dict]:
    """Return the data of a chart, wherever in the specification Altair has put them."""
    found = json.dumps(spec).partition('"values": [')[2]
    return json.JSONDecoder().raw_decode("[" + found)[0]


def test_every_chart_is_there_and_what_has_no_data_is_not():
    assert set(charts(comparison())) == {"loss", "milestone_knn", "scores", "tests"}
    assert set(charts(comparison(curves=[], tests=[]))) == {"scores"}


def test_a_curve_can_be_drawn_over_images_steps_and_hours():
    specs = charts(comparison())
    points = [one for one in values_of(specs["loss"]) if one["run"] == "two"]
    assert [[one[axis] for axis in AXES] for one in points] == [[10, 1, 0.1], [20, 2, 0.2], [30, 3, 0.1 * 3]]
    # a milestone has the images that it was scored at, and step and hours of the nearest row
    scored = [one for one in values_of(specs["milestone_knn"]) if one["run"] == "two"]
    assert [(one["images seen"], one["steps"]) for one in scored] == [(12, 1), (29, 3)]


def test_a_long_curve_is_thinned():
    points = values_of(charts(comparison(curves=[curve("two", points=9000)]))["loss"])
    assert 1000 < len(points) <= 2000


def test_names_are_escaped_and_secrets_hidden():
    html = render_page(comparison()).partition("<script>")[0]
    assert "<b>one</b>" not in html
    assert "secret" not in html


def panel(run: str, ids: tuple[int, ...], *, digest: str = "a", value: int = 0) -> Panel:
    pictures = np.full((max(len(ids), 2), 4, 4, 4, 3), value, np.uint8)
    pictures[:, 0] = np.arange(len(pictures), dtype=np.uint8)[:, None, None, None]
    return Panel(run=run, ids=ids, pictures=pictures, digest=digest)


def test_only_images_that_all_runs_have_stand_side_by_side():
    shown = reconstructions([panel("one", (5, 6, 7)), panel("two", (7, 5))])
    assert [one["id"] for one in shown] == [5, 7]
    assert list(shown[0]["runs"]) == ["one", "two"]
    assert reconstructions([panel("one", (5, 6)), panel("two", (5, 6), digest="b")]) == []


def test_runs_without_ids_are_matched_by_equal_originals():
    assert len(reconstructions([panel("one", ()), panel("two", (), value=9)])) == 2
