"""Real files, real processes: a shard is fetched once a node, whole, and never beyond the cap."""

import hashlib
import multiprocessing
import os
import threading
import time
from dataclasses import dataclass

import pytest

from pipeline.data.cache import ShardCache
from pipeline.errors import DataError
from pipeline.storage import FileStore


@dataclass(frozen=True)
class DistantStore(FileStore):
    """A folder that is used as if it were a bucket: slow, and with a log of its downloads."""

    seconds: float = 0.0

    def local_path(self, key):
        return None

    def download(self, key, path):
        with (self.root / "log").open("a") as log:
            log.write(f"{key}\n")
        time.sleep(self.seconds)
        super().download(key, path)

    def log(self):
        path = self.root / "log"
        return path.read_text().split() if path.exists() else []


def put(store, key, data):
    store.write(key, data)
    return {"key": key, "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


def held(directory):
    return sorted(path.stat().st_size for path in directory.rglob("*") if path.is_file() and path.stat().st_size)


def fetch(store, directory, shard, count):
    cache = ShardCache(store, directory, max_bytes=10**6)
    for _ in range(count):
        assert cache.path(**shard).read_bytes() == b"abc" * 1000


def test_a_local_shard_is_used_where_it_lies(tmp_path):
    store = FileStore(tmp_path / "store")
    shard = put(store, "shards/a.tar", b"abc")
    assert ShardCache(store, tmp_path / "cache", max_bytes=1).path(**shard) == tmp_path / "store/shards/a.tar"
    assert not (tmp_path / "cache").exists()


def test_two_processes_and_their_threads_download_once(tmp_path):
    store = DistantStore(tmp_path / "store", seconds=0.3)
    shard = put(store, "shards/a.tar", b"abc" * 1000)
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=fetch, args=(store, tmp_path / "cache", shard, 3)) for _ in range(2)]
    threads = [threading.Thread(target=fetch, args=(store, tmp_path / "cache", shard, 3)) for _ in range(3)]
    for runner in [*processes, *threads]:
        runner.start()
    for runner in [*processes, *threads]:
        runner.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert store.log() == ["shards/a.tar"]
    assert held(tmp_path / "cache") == [3000]


@pytest.mark.parametrize("stored", [b"abd", b"ab", b"abcd"])
def test_another_content_than_promised_is_refused_and_not_kept(tmp_path, stored):
    store = DistantStore(tmp_path / "store")
    shard = put(store, "shards/a.tar", b"abc")
    store.write("shards/a.tar", stored)
    cache = ShardCache(store, tmp_path / "cache", max_bytes=100)
    with pytest.raises(DataError, match=r"shards/a\.tar: \d bytes with sha256 .* manifest says 3 bytes"):
        cache.path(**shard)
    assert held(tmp_path / "cache") == []
    store.write("shards/a.tar", b"abc")
    assert cache.path(**shard).read_bytes() == b"abc"


def test_the_least_recently_used_goes_first_and_the_cap_holds(tmp_path):
    store = DistantStore(tmp_path / "store")
    a, b, c, d = (put(store, f"{name}.tar", name.encode() * 10) for name in "abcd")
    cache = ShardCache(store, tmp_path / "cache", max_bytes=35)
    for shard in (a, b, c, a, d):  # b is the oldest when d comes
        cache.path(**shard)
        time.sleep(0.01)
        assert sum(held(tmp_path / "cache")) <= 35
    for shard in (a, c, d):
        cache.path(**shard)
    assert cache.downloads == 4
    cache.path(**b)
    assert store.log() == ["a.tar", "b.tar", "c.tar", "d.tar", "b.tar"]


def test_a_shard_larger_than_the_cap_is_answered(tmp_path):
    store = DistantStore(tmp_path / "store")
    shard = put(store, "a.tar", b"abc")
    with pytest.raises(DataError, match=r"a\.tar: 3 bytes do not fit in a shard cache of 2"):
        ShardCache(store, tmp_path / "cache", max_bytes=2).path(**shard)


def test_downloads_at_once_share_the_cap(tmp_path):
    """Room for one of three: the others wait for it, and then take its place."""
    store = DistantStore(tmp_path / "store", seconds=0.1)
    shards = [put(store, f"{name}.tar", name.encode() * 10) for name in "abc"]
    cache = ShardCache(store, tmp_path / "cache", max_bytes=15)
    threads = [threading.Thread(target=cache.path, kwargs=shard) for shard in shards]
    most = 0
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        parts = list((tmp_path / "cache").glob("*.part"))
        most = max(most, len(parts))
        time.sleep(0.005)
    assert most == 1
    assert sorted(store.log()) == ["a.tar", "b.tar", "c.tar"]
    assert held(tmp_path / "cache") == [10]


def die_while_fetching(store, directory, shard):
    class Dying(DistantStore):
        def download(self, key, path):
            path.with_name(".tmp-half").write_bytes(b"a")
            os._exit(1)

    ShardCache(Dying(store.root), directory, max_bytes=10).path(**shard)


@pytest.mark.parametrize("then", ["the same shard", "another shard"])
def test_what_a_killed_process_left_is_cleared(tmp_path, then):
    store = DistantStore(tmp_path / "store")
    a, b = put(store, "a.tar", b"a" * 10), put(store, "b.tar", b"b" * 10)
    process = multiprocessing.get_context("spawn").Process(
        target=die_while_fetching, args=(store, tmp_path / "cache", a)
    )
    process.start()
    process.join(60)
    assert process.exitcode == 1
    assert held(tmp_path / "cache") == [1]
    cache = ShardCache(store, tmp_path / "cache", max_bytes=10)
    thread = threading.Thread(target=cache.path, kwargs=a if then == "the same shard" else b, daemon=True)
    thread.start()
    thread.join(20)  # space that nobody frees would be waited for without end
    assert not thread.is_alive()
    assert held(tmp_path / "cache") == [10]
