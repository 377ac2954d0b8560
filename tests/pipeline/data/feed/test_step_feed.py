"""Batches by step number, prepared one ahead on a thread."""

import threading
import time
from contextlib import closing

import pytest
import torch
from feed_kit import assert_equal_batches, loader, make_dataset

from pipeline.data.feed.loader import Batch
from pipeline.data.feed.step_feed import Feed
from pipeline.errors import DataError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("dataset"))


def feeding():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(("feed", "decode"))]


def test_steps_in_turn_and_after_jumps_are_the_loader_s(manifest):
    expected = list(loader(manifest).from_step(0, 8))
    with closing(Feed(loader(manifest), 8, lambda batch: batch.sample_ids.sum(), device=CPU)) as feed:
        for step in (0, 1, 2, 6, 7, 3, 4, 0):
            batch, prepared = feed.batch(step)
            assert_equal_batches([batch], expected[step : step + 1])
            assert prepared == batch.sample_ids.sum()
    assert feed.wait_seconds > 0
    assert feeding() == []


def test_the_next_batch_is_prepared_by_another_thread_while_one_is_used(manifest):
    prepared = []

    def prepare(batch: Batch) -> str:
        prepared.append(batch)
        return threading.current_thread().name

    with closing(Feed(loader(manifest), 8, prepare, device=CPU)) as feed:
        assert feed.batch(0)[1].startswith("feed")
        for _ in range(500):
            if len(prepared) == 2:
                break
            time.sleep(0.01)
        time.sleep(0.05)
        assert len(prepared) == 2  # one ahead, and no more


def test_what_goes_wrong_on_the_thread_is_raised_where_its_batch_is_asked_for(tmp_path):
    made = make_dataset(tmp_path)

    def refuse(batch: Batch) -> None:
        if len(seen) == 2:
            raise DataError("the third batch")
        seen.append(batch)

    seen: list[Batch] = []
    with closing(Feed(loader(made), 8, refuse, device=CPU)) as feed:
        feed.batch(0)
        feed.batch(1)
        with pytest.raises(DataError, match="the third batch"):
            feed.batch(2)
    assert feeding() == []
