"""Decode workers in processes: equal batches, whatever happens to a worker, and none left behind."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from feed_kit import DistantStore, assert_equal_batches, damage, flip_bit, loader, make_dataset

from pipeline.data.feed import decoders
from pipeline.data.feed.selection import Selection
from pipeline.data.images.pictures import AugmentConfig
from pipeline.errors import DataError, PipelineError


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("dataset"))


def noise(epochs, sample_ids):
    """Return [b, 2, 3] numbers that tell epochs and samples apart."""
    rows = np.stack([epochs, sample_ids], axis=1)
    return np.repeat(rows[:, :, None], 3, axis=2).astype(np.float32)


def workers():
    """Return the decode workers of this process, which may have other children too: the teams of other tests."""
    children = multiprocessing.active_children()
    return [child.pid for child in children if isinstance(child, multiprocessing.context.ForkServerProcess)]


def stat(pid):
    """Return the fields of a process after its name, or none if it is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return []


def running(pids):
    return [pid for pid in pids if stat(pid)[:1] not in ([], ["Z"])]


def open_batches():
    """Return the number of descriptors of shared memory."""
    count = 0
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself
            count += "mae-batch" in str(path.readlink())
    return count


@pytest.fixture(scope="module")
def expected(manifest):
    return list(loader(manifest, noise=noise).from_step(0, 8))


def test_augmentations_are_equal_in_threads_and_processes_and_on_any_number_of_workers(manifest):
    strong = AugmentConfig(rand_augment="rand-m9-mstd0.5-inc1", erasing=0.5)
    whole = list(loader(manifest, augment=strong, decode_threads=3).from_step(0, 3))
    assert_equal_batches(loader(manifest, augment=strong, decode_workers=2).from_step(0, 3), whole)
    ranks = [loader(manifest, augment=strong, rank=rank, world_size=2).from_step(0, 3) for rank in range(2)]
    for batch, *parts in zip(whole, *ranks, strict=True):
        assert torch.equal(batch.images, torch.cat([part.images for part in parts]))
    plain = next(loader(manifest).from_step(0, 1))
    assert 3 <= (whole[0].images != plain.images).flatten(1).any(dim=1).sum() <= len(plain.images)


def test_processes_make_the_batches_that_threads_make(manifest, expected):
    """From any step, with the last batch and the noise; closing leaves no process and no open memory."""
    made = loader(manifest, decode_workers=2, noise=noise)
    found = list(made.from_step(0, 8))
    assert_equal_batches(found, expected)
    for batch, same in zip(found, expected, strict=True):
        assert torch.equal(batch.noise, same.noise)
        assert torch.equal(batch.noise[:, 1, 0].long(), batch.sample_ids)
    jumped = made.from_step(5, 10**6)
    assert_equal_batches([next(jumped)], expected[5:6])
    jumped.close()
    assert workers() == []
    del found, batch, same  # their memory lives as long as they do
    assert open_batches() == 0
    test = Selection.all(manifest, "test")
    of_threads = loader(manifest, test, rank=1, world_size=2).evaluation_batches(3)
    assert_equal_batches(
        loader(manifest, test, rank=1, world_size=2, decode_workers=1).evaluation_batches(3), of_threads
    )
    assert made.restarts == 0


def test_more_ranks_than_samples(manifest):
    batches = loader(manifest, rank=0, world_size=20, decode_workers=1).from_step(0, 2)
    assert [len(batch.images) for batch in batches] == [0, 0]


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_worker_costs_nothing(manifest, expected, caplog, signal_number):
    made = loader(manifest, decode_workers=2, noise=noise)
    batches = made.from_step(0, 8)
    found = [next(batches)]
    victim = workers()[0]
    os.kill(victim, signal_number)
    while running([victim]):
        time.sleep(0.01)
    time.sleep(0.2)  # until this process knows
    found += batches
    assert_equal_batches(found, expected)
    assert made.restarts == 1
    (warning,) = [record.getMessage() for record in caplog.records if record.name == decoders.__name__]
    assert f"pid {victim} {signal_number.name}" in warning


def test_a_hung_worker_costs_nothing(manifest, expected, caplog):
    made = loader(manifest, decode_workers=2, noise=noise, answer_s=5.0)
    batches = made.from_step(0, 8)
    found = [next(batches)]
    for pid in workers():
        os.kill(pid, signal.SIGSTOP)
    found += batches
    assert_equal_batches(found, expected)
    assert made.restarts == 1
    assert "no answer within 5 s" in caplog.text
    assert workers() == []


def test_pinned_batches_are_copies(manifest, expected, monkeypatch):
    """Without a GPU nothing can be pinned, so here the copy is a plain one."""

    def unpinned(tensor, *, pin_memory):
        assert pin_memory
        return torch.empty(tensor.shape, dtype=tensor.dtype)

    monkeypatch.setattr(torch, "empty_like", unpinned)
    made = loader(manifest, decode_workers=2, noise=noise, pin_memory=True)
    assert_equal_batches(made.from_step(0, 8), expected)


def die(epochs, sample_ids):
    """Noise that the kernel does not let happen."""
    if len(sample_ids):
        os.kill(os.getpid(), signal.SIGKILL)
    return np.empty((0, 1), np.float32)


def test_workers_that_always_die_end_the_run(manifest):
    with pytest.raises(
        PipelineError, match=r"ended 4 times in a row \(pid \d+ SIGKILL.*lower resources\.decode_workers"
    ):
        next(loader(manifest, decode_workers=1, noise=die).from_step(0, 8))
    assert workers() == []


def test_a_substitution_is_that_of_a_thread(tmp_path, caplog):
    damaged = make_dataset(tmp_path)
    damage(damaged, flip_bit)
    of_threads = list(loader(damaged, noise=noise).from_step(0, 8))
    assert sum(len(batch.substitutions) for batch in of_threads) >= 2
    caplog.clear()
    found = list(loader(damaged, noise=noise, decode_workers=2).from_step(0, 8))
    assert_equal_batches(found, of_threads)
    for batch, same in zip(found, of_threads, strict=True):
        assert torch.equal(batch.noise, same.noise)
    assert len([record for record in caplog.records if "is used instead" in record.getMessage()]) == 1
    with pytest.raises(DataError) as of_thread:
        list(loader(damaged).evaluation_batches(8))
    with pytest.raises(DataError) as of_process:
        list(loader(damaged, decode_workers=1).evaluation_batches(8))
    assert str(of_process.value) == str(of_thread.value)


def test_an_error_of_a_worker_arrives_as_itself(manifest, tmp_path):
    """A shard larger than the cache, which only the worker that opens it reports."""
    distant = loader(manifest, store=DistantStore(manifest.root.root), directory=tmp_path, decode_workers=1)
    distant.cache.max_bytes = 100
    with pytest.raises(DataError, match="do not fit into a shard cache of 100 bytes"):
        list(distant.from_step(0, 2))


def test_what_workers_fetch_is_counted(manifest, expected, tmp_path):
    distant = loader(
        manifest, store=DistantStore(manifest.root.root), directory=tmp_path, decode_workers=2, noise=noise
    )
    assert_equal_batches(distant.from_step(0, 8), expected)
    counts = distant.cache.counts
    assert counts.hits + counts.misses == 8 * 12
    assert counts.downloads == 5


TRAIN_FOR_EVER = """
import multiprocessing, signal, sys, time
from pathlib import Path
from feed_kit import loader
from pipeline.data.dataset.manifest import Manifest
from pipeline.storage import FileStore
if __name__ == "__main__":
    signal.signal(signal.SIGHUP, lambda *_: None)
    root = FileStore(Path(sys.argv[1]))
    batches = loader(Manifest.open(root.at("g0001"), root), decode_workers=2).from_step(0, 10**6)
    next(batches)
    print(*(process.pid for process in multiprocessing.active_children()), flush=True)
    for batch in batches:
        time.sleep(0.1)
"""


def test_workers_end_with_a_killed_parent_and_ignore_signals_to_its_group(manifest, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(TRAIN_FOR_EVER)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parents[3])])}
    command = [sys.executable, script, manifest.root.root]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True)
    try:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        os.killpg(parent.pid, signal.SIGHUP)  # the parent goes on
        time.sleep(0.5)
        assert running(pids) == pids
    finally:
        servers = {int(stat(pid)[1]) for pid in running(pids)}
        parent.kill()
        parent.communicate()
    deadline = time.monotonic() + 10
    while running([*pids, *servers]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert running([*pids, *servers]) == []
