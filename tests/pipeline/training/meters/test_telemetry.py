"""Where the time of a training goes: what rows say about speed, waits, memory and the slowest worker; the profiler's window."""

import gzip
import json
import time
from typing import Any

import pytest
import torch
from torch import nn
from training_kit import Napping, attempt_at, mae_config, mae_spec, napping, same_attempt

from mae_core import training_flops
from pipeline.graph.step import Attempt
from pipeline.storage import FileStore
from pipeline.training.checkpoints.saver import Saver
from pipeline.training.loop.loop import train
from pipeline.training.meters import profiler as profiling
from pipeline.training.meters.matmul_peak import matmul_peak
from pipeline.training.meters.profiler import Profiler
from pipeline.training.meters.step_clocks import GpuTimes
from pipeline.training.meters.telemetry import (
    ForwardClock,
    WorkerReading,
    as_metrics,
    as_points,
    over_workers,
    progress_fields,
    time_shares,
)
from pipeline.training.spec.train_spec import TrainSpec
from pipeline.training.world import enter_world

NAP_S = 0.03
ROW = {
    "step": 4,
    "images": 40,
    "loss": 0.5,
    "decode_restarts": 0,
    "substitutions": 0,
    "skipped_steps": 0,
    "stepped_over": 0,
    "data_wait": 0.123,
    "mfu": 0.4567,
    "checkpoint_wait": 0.0,
}
ROW |= {"process_gib": 2.04, "images_per_s": 9.0}


class Watching:
    """A tracker that records what it gets."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []
        self.kept: list[tuple[int, str]] = []
        self.resumed: list[int] = []

    def resume(self, points, *, rollbacks=0):
        self.resumed = [point.step for point in points]

    def log(self, step, metrics):
        self.metrics.append({"step": step, **metrics})

    def keep(self, step, key):
        self.kept.append((step, key))


class Never:
    """A stop signal that never asks for a stop."""

    def stop_reason(self):
        return ""


def watched(spec: TrainSpec, attempt: Attempt) -> Any:
    """Return what the loop sends to its tracker; every save takes a while."""
    plain, tracker = Saver.save, Watching()

    def slow(*arguments):
        time.sleep(10 * NAP_S)
        return plain(*arguments)

    Saver.save = slow
    try:
        train(spec, attempt, world=enter_world(), tracker=tracker, stop_signal=Never())
    finally:
        Saver.save = plain
    return tracker.metrics, tracker.kept, tracker.resumed


def test_the_slow_worker_is_named_and_waits_are_shares_of_the_time(teams, shards, tmp_path):
    attempt = attempt_at(tmp_path / "step", log_every_steps=2, checkpoint_every_steps=4)
    spec = napping(mae_spec(shards, attempt), 0.0, NAP_S)
    (metrics, _, _), (others, _, _) = teams(2).run(watched, spec, attempt)
    assert others == []
    assert [row["step"] for row in metrics] == [2, 4, 6, 8, 10]
    for row in metrics:
        assert row["throughput/slowest_rank"] == 1
        assert row["throughput/slowest_rank_excess"] > 0.3
        assert row["memory/process_gib"] > 0.1
        assert "memory/device_gib" not in row  # no GPU is in use
        assert 0 < row["throughput/mfu"] < 1
        assert "throughput/gpu_busy_share" not in row  # never 0 where there is no GPU
        assert "throughput/copy_wait_share" not in row
        assert 0 <= row["throughput/host_bound_share"] < 0.5
        assert 0 < row["throughput/agree_wait_share"] < 1
        assert 0 <= row["throughput/exchange_share"] < 1
        assert "throughput/compile_share" not in row
    # the checkpoint at 4 is waited for between the rows at 4 and 6
    waits = {row["step"]: row["throughput/checkpoint_wait_share"] for row in metrics}
    assert waits[4] == 0.0
    assert 0.2 < waits[6] < 1


def test_mfu_is_what_the_model_needs_over_what_the_workers_could_do(teams, shards, tmp_path):
    attempt = attempt_at(tmp_path / "step")
    rows, peaks = zip(*teams(2).run(watched_with_peaks, mae_spec(shards, attempt), attempt), strict=True)
    for row in rows[0]:
        done = row["throughput/images_per_s"] * training_flops(mae_config())
        assert row["throughput/mfu"] == pytest.approx(done / (2 * min(peaks)))


def watched_with_peaks(spec: TrainSpec, attempt: Attempt) -> Any:
    from pipeline.training.meters.telemetry import _peak

    return watched(spec, attempt)[0], _peak(torch.device("cpu"), "fp32")


@pytest.mark.parametrize("faster", [torch.bfloat16, torch.float32])
def test_a_cpu_s_peak_in_bfloat16_is_that_of_what_it_computes_with(monkeypatch, faster):
    """A product takes a second by the fake clock, and half a second in the faster precision."""
    matmul, clock = torch.matmul, [0.0]

    def timed(left, right, *, out):
        clock[0] += 0.5 if left.dtype == faster else 1.0
        return matmul(left, right, out=out)

    monkeypatch.setattr(torch, "matmul", timed)
    monkeypatch.setattr("pipeline.training.meters.matmul_peak.time.perf_counter", lambda: clock[0])
    peaks = {
        dtype: matmul_peak(torch.device("cpu"), dtype, sides=(64,), times=2)
        for dtype in (torch.bfloat16, torch.float32)
    }
    assert peaks[torch.bfloat16] == 2 * 64**3 / 0.5
    assert peaks[torch.float32] == peaks[torch.bfloat16] / (1 if faster == torch.float32 else 2)


def compiled(spec: TrainSpec, attempt: Attempt) -> Any:
    """Return what the loop sends to its tracker when blocks are compiled, without generated code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.training.engine.blocks.BACKEND", "aot_eager")
        return watched(spec, attempt)[0]


def test_rows_name_the_time_to_compile_and_the_loop_compiles_once(teams, shards, tmp_path):
    attempt = attempt_at(tmp_path / "step", log_every_steps=2, checkpoint_every_steps=100, compile="on")
    metrics, _ = teams(2).run(compiled, mae_spec(shards, attempt), attempt)
    assert [row["step"] for row in metrics if "throughput/compile_share" in row] == [2]
    assert 0 < metrics[0]["throughput/compile_share"] < 1


def test_numbers_of_all_workers_together():
    row = over_workers(
        [WorkerReading(2.0, 1.0, 2**30, 0.0), WorkerReading(3.0, 0.0, 2**31, 0.0), WorkerReading(2.0, 0.5, 1.0, 0.0)],
        elapsed=2.0,
    )
    assert row == {"checkpoint_wait": 0.25, "process_gib": 2.0, "slowest_rank": 1, "slowest_excess": 0.5}
    alone = over_workers([WorkerReading(2.0, 0.0, 2**30, 2**32)], elapsed=1.0)
    assert alone == {"checkpoint_wait": 0.0, "process_gib": 1.0, "device_gib": 4.0}


def test_the_progress_line_shows_trouble_only_when_there_is_any():
    quiet = progress_fields(ROW)
    assert list(quiet) == ["loss", "wait", "mfu", "GiB", "images_per_s"]
    assert (quiet["wait"], quiet["mfu"], quiet["GiB"]) == (0.12, 0.457, 2.0)
    loud = progress_fields(
        ROW
        | {
            "substitutions": 2,
            "decode_restarts": 1,
            "skipped_steps": 1,
            "stepped_over": 3,
            "checkpoint_wait": 0.1,
            "compiling": 0.4,
            "slowest_rank": 7,
            "slowest_excess": 0.25,
        }
    )
    assert {key: loud[key] for key in loud.keys() - quiet.keys()} == {
        "substituted": 2,
        "decoders restarted": 1,
        "lost steps": 4,
        "saving": 0.1,
        "compiling": 0.4,
        "slow rank": 7,
        "by": 0.25,
    }


def test_the_progress_line_of_a_gpu_always_says_how_busy_it_is():
    line = progress_fields(ROW | {"gpu_busy": 0.913, "host_bound": 0.05, "copy_wait": 0.12, "agree_wait": 0.0})
    assert (line["gpu busy"], line["copies"]) == (0.91, 0.12)
    assert not {"host", "agree", "compiling"} & line.keys()


def test_shares_of_time_are_means_over_workers_and_hold_only_what_was_measured():
    phases = {"agree": 0.5, "forward": 1.0, "backward": 4.0, "data": 2.5}
    alone = [WorkerReading(1.0, 0.0, 1.0, 0.0, phases)]
    assert time_shares(alone, elapsed=10.0, passes=3) == {"agree_wait": 0.05, "host_bound": pytest.approx(0.2)}
    # backward takes 4 s, of which a forward pass of 1 s explains 2
    pair = time_shares([*alone, WorkerReading(1.0, 0.0, 1.0, 0.0, {"agree": 1.5}, 2.0)], elapsed=10.0, passes=3)
    assert pair == pytest.approx(
        {"agree_wait": 0.1, "host_bound": 0.5 * (0.2 + 0.85), "compiling": 0.1, "exchange": 0.1}
    )
    recomputed = time_shares([*alone, *alone], elapsed=10.0, passes=4)
    assert recomputed["exchange"] == pytest.approx(0.1)
    gpu = GpuTimes(passes_s=6.0, copies_s=1.0, optimizer_s=1.0, idle_s=2.0, starved_s=3.0)
    (row,) = [time_shares([alone[0]._replace(gpu=gpu, forward_s=2.0)], elapsed=10.0, passes=3)]
    assert row == pytest.approx({"agree_wait": 0.05, "gpu_busy": 0.7, "copy_wait": 0.1, "host_bound": 0.5})


def test_a_history_becomes_points_with_their_own_times():
    new, old = as_points([ROW | {"time": 1.5}, ROW])
    assert (new.step, new.time_ms, new.metrics) == (4, 1500, as_metrics(ROW))
    assert new.metrics["throughput/mfu"] == 0.4567
    assert abs(old.time_ms / 1000 - time.time()) < 60  # written before rows had a time


def test_the_clock_counts_forward_passes_and_nothing_else():
    module = Napping(nn.Identity(), NAP_S)
    clock = ForwardClock(module, torch.device("cpu"))
    for _ in range(3):
        module(torch.ones(1))
        time.sleep(NAP_S)
    assert 3 * NAP_S <= clock.take() < 5 * NAP_S
    assert clock.take() == 0.0
    with clock.paused():  # a pass that compiles
        module(torch.ones(1))
    assert clock.take() == 0.0
    clock.close()
    module(torch.ones(1))
    assert clock.take() == 0.0


# --- the profiler ------------------------------------------------------------------------------------------------------------


def test_a_window_of_steps_is_profiled_and_kept(teams, shards, tmp_path):
    attempt = attempt_at(tmp_path / "step", profile_steps=(4, 2))
    (_, kept, _), (_, kept_elsewhere, _) = teams(2).run(watched, mae_spec(shards, attempt), attempt)
    assert kept == [(5, f"profile/steps-00000004-00000005.{kind}") for kind in ("txt", "json.gz")]
    assert kept_elsewhere == []
    assert [info.key for info in attempt.store.list("profile/")] == sorted(key for _, key in kept)
    table = attempt.store.read(kept[0][1]).decode()
    assert "aten::" in table
    assert len(table.splitlines()) < 50
    trace = json.loads(gzip.decompress(attempt.store.read(kept[1][1])))
    names = {event.get("name") for event in trace["traceEvents"]}
    assert names & {
        "aten::addmm",
        "aten::matmul",
    }  # in a process that ran ZeRO-3 before, DeepSpeed's linear replaces torch's


def test_a_resumed_training_profiles_what_is_left_of_the_window_and_resends_its_history(teams, shards, tmp_path):
    attempt = attempt_at(tmp_path / "step", profile_steps=(6, 20))
    spec = mae_spec(shards, attempt)
    teams(2).run(watched, spec, attempt)
    again = same_attempt(attempt)
    for key in [info.key for info in attempt.store.list("profile/")]:
        attempt.store.delete(key)
    for info in list(attempt.store.list("checkpoints/step-00000009")) + list(
        attempt.store.list("checkpoints/step-00000010")
    ):
        attempt.store.delete(info.key)
    _, kept, resumed = teams(2).run(watched, spec, again)[0]
    assert resumed == list(range(1, 7))
    assert [key for _, key in kept] == [f"profile/steps-00000007-00000010.{kind}" for kind in ("txt", "json.gz")]


def test_a_trace_that_is_too_large_and_a_store_that_refuses_are_warnings(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(profiling, "TRACE_MAX_BYTES", 10)
    tracker = Watching()
    profiler = Profiler((1, 1), FileStore(tmp_path / "g"), tracker, device=torch.device("cpu"))
    profiler.before_step(0)
    torch.ones(8, 8) @ torch.ones(8, 8)
    profiler.before_step(1)
    assert tracker.kept == [(1, "profile/steps-00000001-00000001.txt")]
    assert "profile fewer steps" in caplog.text
    (tmp_path / "full").write_text("no folder")
    profiler = Profiler((1, 1), FileStore(tmp_path / "full"), tracker, device=torch.device("cpu"))
    profiler.before_step(0)
    profiler.close()
    assert "the profile of steps 1 to 1 is lost" in caplog.text
