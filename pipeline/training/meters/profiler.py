"""Profile a window of steps with torch's profiler, on rank 0, to show where the time of a step goes.

    g0007/profile/steps-00000100-00000104.json.gz    trace for chrome://tracing or ui.perfetto.dev; omitted above TRACE_MAX_BYTES
                  steps-00000100-00000104.txt        the operations that took longest

The steps in the window are slower, and the step after it waits for the files. A resumed training profiles what is left of the
window. A profile that cannot be stored is only a warning."""

import logging
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from pipeline.errors import StorageError
from pipeline.storage import Store
from pipeline.tracking import Tracker

FOLDER = "profile"
TRACE_MAX_BYTES = 64 * 2**20
TABLE_ROWS = 30

log = logging.getLogger(__name__)


class Profiler:
    """Profiles the steps of a window: (first, count), steps counted from 1. None profiles nothing."""

    def __init__(self, window: tuple[int, int] | None, store: Store, tracker: Tracker, *, device: torch.device) -> None:
        """`store` is the generation's directory."""
        self.steps = range(window[0], sum(window)) if window else range(0)
        self.store, self.tracker, self._on_gpu = store, tracker, device.type == "cuda"
        self._profile: Any = None
        self._first = self._last = 0

    def before_step(self, global_step: int) -> None:
        """Start or end the window if that is due before the step that follows `global_step` finished ones."""
        step = global_step + 1
        if self._profile and step not in self.steps:  # past the window, or rolled back to before it
            self.close()
        if step in self.steps:
            self._last = step
            if not self._profile:
                self._first = step
                gpu = [ProfilerActivity.CUDA] if self._on_gpu else []
                self._profile = profile(activities=[ProfilerActivity.CPU, *gpu])
                self._profile.start()

    def close(self) -> None:
        """End the window, if one is open, and store its profile."""
        if not self._profile:
            return
        finished, self._profile = self._profile, None
        finished.stop()
        try:
            self._store_profile(finished, f"steps-{self._first:08d}-{self._last:08d}")
        except (StorageError, OSError) as error:
            log.warning("the profile of steps %d to %d is lost: %s", self._first, self._last, error)

    def _store_profile(self, finished: Any, name: str) -> None:
        order = "self_cuda_time_total" if self._on_gpu else "self_cpu_time_total"
        table = finished.key_averages().table(sort_by=order, row_limit=TABLE_ROWS, max_name_column_width=60)
        self.store.write(f"{FOLDER}/{name}.txt", table.encode())
        self.tracker.keep(self._last, f"{FOLDER}/{name}.txt")
        with tempfile.TemporaryDirectory(prefix="mae-profile-") as scratch:
            trace = Path(scratch) / f"{name}.json.gz"
            finished.export_chrome_trace(str(trace))  # to a path only, so it passes through a file
            if trace.stat().st_size > TRACE_MAX_BYTES:
                log.warning(
                    "the trace of steps %d to %d has %.0f MiB and is omitted: profile fewer steps, or raise micro_batch",
                    self._first,
                    self._last,
                    trace.stat().st_size / 2**20,
                )
                return
            self.store.upload(f"{FOLDER}/{name}.json.gz", trace)
        self.tracker.keep(self._last, f"{FOLDER}/{name}.json.gz")
