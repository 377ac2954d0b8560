"""The progress display as text, with a clock of our own: on a terminal and in a log."""

import io

import pytest
from rich.console import Console

from pipeline.reporting.format import clock
from pipeline.reporting.progress import ProgressDisplay


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def shown(renderable, width=120) -> str:
    console = Console(file=io.StringIO(), width=width, record=True)
    console.print(renderable)
    return console.export_text()


def run_a_step(console: Console, clock_: Clock, **fields: float) -> ProgressDisplay:
    """Resumed at 4000 of 10 000 steps, then 2 steps a second for 60 s."""
    display = ProgressDisplay(console=console, now=clock_)
    display.step_state("pretrain", "running")
    for second in range(61):
        clock_.now = float(second)
        display.for_step("pretrain").update(4000 + 2 * second, 10_000, unit="steps", **fields)
    return display


def test_rate_and_time_to_go_come_from_the_updates_and_a_resume_does_not_spoil_them():
    console = Console(file=io.StringIO(), width=120, force_terminal=True, record=True)
    line = shown(run_a_step(console, Clock(), loss=0.4123)._lines()).replace("\u202f", " ")
    assert "4 120/10 000 steps" in line
    assert "2.0 steps/s" in line
    assert f"ETA {clock((10_000 - 4120) / 2)}" in line
    assert "loss 0.4123" in line
    assert "1:00" in line


def test_what_the_stage_gives_is_believed():
    console = Console(file=io.StringIO(), width=120, force_terminal=True, record=True)
    line = shown(run_a_step(console, Clock(), images_per_s=512.0, eta_s=90.0)._lines())
    assert "512 images/s" in line
    assert "ETA 1:30" in line


def test_a_narrow_terminal_keeps_the_numbers_whole():
    console = Console(file=io.StringIO(), width=80, force_terminal=True, record=True)
    fields = {"images_per_s": 12_400.0, "loss": 0.4123, "substituted": 3, "wait": 0.02}
    line = shown(run_a_step(console, Clock(), **fields)._lines(), width=80)
    assert "41% " in line
    assert "12\u202f400 images/s loss 0.4123  substituted 3 ETA 49:00" in line  # two fields have room
    assert len(line.splitlines()) == 1


def test_a_log_gets_a_plain_line_every_ten_seconds():
    console = Console(file=io.StringIO(), width=120, force_terminal=False, record=True)
    with run_a_step(console, Clock(), loss=0.4) as display:
        display.step_state("pretrain", "failed", detail="out of memory")
    lines = console.export_text().replace("\u202f", " ").splitlines()
    assert lines[0] == "pretrain: running"
    assert lines[1] == "pretrain: 40%, 4 020/10 000 steps, 2.0 steps/s, loss 0.4, ETA 49:50, elapsed 10 s"
    assert len(lines) == 8
    assert lines[-1] == "pretrain: failed  1:00  out of memory"


def test_a_listing_of_unknown_length_shows_how_many_it_has():
    clock_, console = Clock(), Console(file=io.StringIO(), width=120, record=True)
    display = ProgressDisplay(console=console, now=clock_)
    display.step_state("snapshot", "running", detail="listing /images")
    clock_.now = 11.0
    display.for_step("snapshot").update(50_000, 0, unit="files listed")
    assert "snapshot: 50\u202f000 files listed, elapsed 11 s" in console.export_text()


def test_on_a_terminal_a_finished_step_stays_as_a_line():
    console = Console(file=io.StringIO(), width=120, force_terminal=True, record=True)
    display = ProgressDisplay(console=console)
    with display:
        display.step_state("shard", "running")
        display.step_state("shard", "done")
        display.step_state("knn", "cached")
    text = console.export_text()
    assert "✓ shard" in text
    assert "≡ knn" in text


@pytest.mark.parametrize(
    ("every_s", "total"),
    [(60, 10_000), (1, None)],
    ids=["updates a minute apart", "a total that grows with the count"],
)
def test_slow_updates_and_growing_totals_have_a_rate(every_s, total):
    console = Console(file=io.StringIO(), width=120, force_terminal=True, record=True)
    clock_ = Clock()
    display = ProgressDisplay(console=console, now=clock_)
    for number in range(1, 4):
        clock_.now = float(every_s * number)
        display.update("snapshot", 600 * number, total or 600 * number, "files", {})
    line = shown(display._lines()).replace("\u202f", " ")
    assert f"{600 // every_s} files/s" in line


def test_the_time_foreseen_is_shown_before_the_first_update_and_does_not_spoil_the_rate():
    clock_ = Clock()
    console = Console(file=io.StringIO(), width=120, force_terminal=True, record=True)
    display = ProgressDisplay(console=console, now=clock_)
    display.step_state("pretrain", "running", detail="resuming from step 4")
    display.update("pretrain", 0, 1000, "images", {"eta_s": 90.0})
    assert "ETA 1:30" in shown(display._lines())
    for second, done in ((60.0, 100), (70.0, 200)):  # a minute passes until the workers have started
        clock_.now = second
        display.update("pretrain", done, 1000, "images", {})
    assert "10 images/s" in shown(display._lines()).replace("10.0", "10")
