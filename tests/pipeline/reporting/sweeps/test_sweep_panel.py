"""The table, the panel and the page of a sweep, from plain rows."""

import io

import numpy as np
from PIL import Image
from rich.console import Console

from pipeline.reporting.summaries import Score
from pipeline.reporting.sweeps.panel import panel_png
from pipeline.reporting.sweeps.sweep_page import render_sweep_page
from pipeline.reporting.sweeps.table import PlannedMember, SweepRow, SweepTable, sweep_plan_table, sweep_table


def score(mean, encoder="pretrained", protocol="linear", **more) -> Score:
    return Score(protocol=protocol, dataset="toy", encoder=encoder, values=(mean - 0.01, mean + 0.01), **more)


def ratio(value, mean=None, paper=None, **more) -> SweepRow:
    scores = [] if mean is None else [score(mean), score(0.3, "random")]
    return SweepRow(
        label=f"mask_ratio={value}",
        state="configured only" if mean is None else "run",
        point={"model.mask_ratio": value},
        loss=None if mean is None else 0.5,
        scores=scores,
        paper={} if paper is None else {"linear": paper, "finetune": paper + 10},
        **more,
    )


SWEEP = SweepTable(
    name="mask_ratio",
    title="Mask ratio",
    rows=[ratio(0.4, paper=67.0), ratio(0.6, 0.612, 71.8), ratio(0.75, 0.634, 73.5)],
    source="figure 5",
    setting="ViT-L",
)
NOT_BUILT = SweepRow(label="dVAE tokens", state="not built", paper={"linear": 71.6}, remark="it needs <tokens>")


def printed(what) -> list[str]:
    console = Console(width=200, file=io.StringIO())
    console.print(what)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def test_the_table_has_ours_and_the_paper_s_beside_each_other():
    lines = printed(sweep_table(SWEEP))
    assert lines[0].split() == ["mask_ratio", "state", "loss", "linear", "paper", "paper:", "finetune"]
    assert lines[1].split() == ["0.4", "·", "configured", "only", "–", "–", "67.0", "77.0"]
    assert lines[2].split() == ["0.6", "✓", "run", "0.5000", "61.2", "±", "1.4", "%", "71.8", "81.8"]
    assert lines[4].split() == ["random", "30.0", "±", "1.4", "%"]
    assert lines[-1] == "paper: figure 5; ViT-L"


def test_random_scores_that_differ_are_no_common_baseline():
    other = SweepRow(label="b", state="run", point={"a": 2}, scores=[score(0.6), score(0.2, "random")])
    table = SweepTable(name="x", title="x", rows=[SWEEP.rows[1], other])
    assert table.random == {}
    assert table.varied == ""


def test_the_random_crop_probe_stands_beside_the_paper_s_linear_probe():
    rows = [SweepRow(label="a=1", state="run", scores=[score(0.5, protocol="linear_online")], paper={"linear": 70.0})]
    table = SweepTable(name="x", title="x", rows=rows)
    assert table.published(("toy", "linear_online")) == "linear"
    assert table.published_alone == []


def marked(png: bytes, colour: tuple[int, int, int]) -> np.ndarray:
    """Return where a picture has a colour, [H, W]."""
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGBA")).astype(int)
    return (np.abs(pixels[..., :3] - colour).max(-1) < 12) & (pixels[..., 3] > 200)


BLUE, ORANGE = (0x2B, 0x86, 0xC5), (0xD9, 0x73, 0x0D)


def test_the_panel_draws_ours_filled_and_published_points_hollow():
    ours, paper = (marked(panel_png(SWEEP), colour) for colour in (BLUE, ORANGE))
    assert ours.sum() > 500
    assert paper.sum() > 500
    bare = SweepTable(name="x", title="x", rows=SWEEP.rows[:1])
    assert marked(panel_png(bare), BLUE).sum() == 0  # nothing has run
    assert marked(panel_png(bare), ORANGE).sum() > 100


def test_a_panel_is_drawn_for_every_kind_of_sweep():
    rates = [
        SweepRow(label=f"base_lr={lr}", state="run", point={"pretrain.base_lr": lr}, scores=[score(0.5)])
        for lr in (1e-5, 1e-3)
    ]
    named = [SweepRow(label="raw pixels", state="run", point={"model.target": "raw"}, scores=[score(0.5)]), NOT_BUILT]
    failed = [SweepRow(label="a=1", state="failed", point={"a": 1}, remark="pretrain: out of memory")]
    measure = [
        SweepRow(label="a=1", state="run", point={"a": 1}, scores=[score(12.0, protocol="rankme", measure="rank")])
    ]
    for rows in (rates, named, failed, measure):
        assert panel_png(SweepTable(name="x", title="x", rows=rows)).startswith(b"\x89PNG")


def test_the_page_names_states_and_escapes_what_it_shows():
    table = SweepTable(name="target", title="Target", rows=[SWEEP.rows[1], NOT_BUILT], source="table 1d")
    page = render_sweep_page(table, panel=b"png", created="today", command="mae sweep x.yaml")
    assert "1 run, 1 not built" in page
    assert "it needs &lt;tokens&gt;" in page
    assert "61.2 ± 1.4 %" in page
    assert 'src="data:image/png;base64,' in page


def test_the_plan_counts_steps_that_members_share_once():
    members = [
        PlannedMember(label="a", states=[("s", "to_run"), ("p1", "to_run"), ("c", "cached")], seconds=60.0),
        PlannedMember(label="b", states=[("s", "to_run"), ("p2", "to_run"), ("c", "cached")], seconds=None),
    ]
    lines = printed(sweep_plan_table(members, seconds=None))
    assert lines[1].split() == ["a", "2", "1", "1", "0", "1:00"]
    assert lines[2].split() == ["b", "2", "1", "1", "0", "–"]
    assert lines[-1] == "2 members, 4 different steps, 3 of them to run"
