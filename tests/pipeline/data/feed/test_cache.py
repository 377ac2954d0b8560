"""Real files and processes: a shard is fetched once per node, whole, and never beyond the size limit."""

import errno
import hashlib
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.feed.cache import CacheCounts, CachedShard, ShardCache, least_recent
from pipeline.errors import DataError, StorageError
from pipeline.storage import FileStore


@dataclass(frozen=True)
class DistantStore(FileStore):
    """A folder that acts as a slow bucket and logs its downloads."""

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


def test_a_local_shard_is_used_in_place(tmp_path):
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
def test_wrong_content_is_refused_and_not_kept(tmp_path, stored):
    store = DistantStore(tmp_path / "store")
    shard = put(store, "shards/a.tar", b"abc")
    store.write("shards/a.tar", stored)
    cache = ShardCache(store, tmp_path / "cache", max_bytes=100)
    with pytest.raises(DataError, match=r"shards/a\.tar: \d bytes with sha256 .* manifest says 3 bytes"):
        cache.path(**shard)
    assert held(tmp_path / "cache") == []
    store.write("shards/a.tar", b"abc")
    assert cache.path(**shard).read_bytes() == b"abc"


def test_the_least_recently_used_goes_first_and_the_limit_holds(tmp_path):
    store = DistantStore(tmp_path / "store")
    a, b, c, d = (put(store, f"{name}.tar", name.encode() * 10) for name in "abcd")
    cache = ShardCache(store, tmp_path / "cache", max_bytes=35)
    for shard in (a, b, c, a, d):  # b is the oldest when d comes
        cache.path(**shard)
        time.sleep(0.01)
        assert sum(held(tmp_path / "cache")) <= 35
    for shard in (a, c, d):
        cache.path(**shard)
    assert cache.counts.downloads == 4
    cache.path(**b)
    assert store.log() == ["a.tar", "b.tar", "c.tar", "d.tar", "b.tar"]


def test_a_shard_larger_than_the_cache_is_refused(tmp_path):
    store = DistantStore(tmp_path / "store")
    shard = put(store, "a.tar", b"abc")
    with pytest.raises(DataError, match=r"a\.tar: 3 bytes do not fit into a shard cache of 2"):
        ShardCache(store, tmp_path / "cache", max_bytes=2).path(**shard)


def test_concurrent_downloads_share_the_limit(tmp_path):
    """There is room for one of three: the others wait for it and then replace it."""
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


def test_cache_counts(tmp_path):
    store = DistantStore(tmp_path / "store")
    a, b = put(store, "a.tar", b"a" * 10), put(store, "b.tar", b"b" * 10)
    cache = ShardCache(store, tmp_path / "cache", max_bytes=15)
    for shard in (a, a, b, a):
        os.close(cache.open(**shard))
    assert cache.counts == CacheCounts(hits=1, misses=3, downloads=3, bytes=30, evictions=2, repairs=0)
    assert cache.touch(a["key"], sha256=a["sha256"])
    assert not cache.touch(b["key"], sha256=b["sha256"])
    assert cache.counts.downloads == 3  # a touch fetches nothing


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), max_size=8), st.integers(-5, 60))
def test_eviction_takes_the_longest_unused_and_no_more_than_it_must(shards, excess):
    held = [CachedShard(used, size, Path(str(index))) for index, (used, size) in enumerate(shards)]
    gone = least_recent(held, excess=excess)
    assert gone == sorted(held)[: len(gone)]
    freed = sum(shard.bytes for shard in gone)
    assert freed >= excess or gone == sorted(held)
    assert not gone or freed - gone[-1].bytes < excess


# A full disk


@dataclass(frozen=True)
class Crowded(DistantStore):
    """A store whose cache disk has a limited size; a download fills it completely before it fails."""

    directory: Path = Path()
    room: int = 0

    def download(self, key, path):
        data = self.read(key)
        free = self.room - sum(file.stat().st_size for file in self.directory.rglob("*") if file.is_file())
        if free < len(data):
            path.with_name(".tmp-half").write_bytes(data[:free])
            try:
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            except OSError as full:
                raise StorageError(f"{key}: no space left") from full
            finally:
                path.with_name(".tmp-half").unlink()
        super().download(key, path)


def test_a_disk_that_fills_before_the_limit_gives_up_old_shards(tmp_path):
    store = Crowded(tmp_path / "store", directory=tmp_path / "cache", room=25)
    a, b, c = (put(store, f"{name}.tar", name.encode() * 10) for name in "abc")
    cache = ShardCache(store, tmp_path / "cache", max_bytes=10**6)
    for shard in (a, b, c):
        cache.path(**shard)
        time.sleep(0.01)
    assert held(tmp_path / "cache") == [10, 10]
    assert not cache.touch(a["key"], sha256=a["sha256"])
    assert cache.counts.evictions == 1


def test_a_full_disk_is_named_with_what_is_needed_and_what_to_set(tmp_path):
    store = Crowded(tmp_path / "store", directory=tmp_path / "cache", room=5)
    shard = put(store, "a.tar", b"a" * 10)
    cache = ShardCache(store, tmp_path / "cache", max_bytes=10**6)
    with pytest.raises(StorageError) as caught:
        cache.path(**shard)
    for part in (str(tmp_path / "cache"), "disk is full", "10 bytes", "resources.cache_directory"):
        assert part in str(caught.value)
    assert held(tmp_path / "cache") == []
    assert not list((tmp_path / "cache").glob("*.part"))
    roomier = Crowded(tmp_path / "store", directory=tmp_path / "cache", room=50)  # once there is room, it continues
    assert ShardCache(roomier, tmp_path / "cache", max_bytes=10**6).path(**shard).read_bytes() == b"a" * 10


SMALL_DISK = """
set -e
mount -t tmpfs -o size=3m tmpfs "$1/disk"
exec "$2" - "$1" <<'PYTHON'
import hashlib, os, sys
sys.path[:0] = [{root!r}, {here!r}]
from pathlib import Path
from test_cache import DistantStore
from pipeline.data.feed.cache import ShardCache
from pipeline.errors import StorageError
folder = Path(sys.argv[1])
store = DistantStore(folder / "store")
cache = ShardCache(store, folder / "disk" / "cache", max_bytes=10**9)
for name, size in (("a", 10**6), ("b", 10**6), ("c", 15 * 10**5), ("d", 5 * 10**6)):
    data = name.encode() * size
    store.write(f"{{name}}.tar", data)
    try:
        path = cache.path(f"{{name}}.tar", sha256=hashlib.sha256(data).hexdigest(), bytes=size)
        print(name, path.read_bytes() == data, cache.counts.evictions)
    except StorageError as error:
        print(name, error)
PYTHON
"""


def test_a_real_disk_of_3_megabytes(tmp_path):
    """Mount a tmpfs in a mount namespace of its own; skip if this user may not."""
    (tmp_path / "disk").mkdir()
    script = SMALL_DISK.format(root=str(Path(__file__).parents[4]), here=str(Path(__file__).parent))
    call = [
        "unshare",
        "--user",
        "--map-root-user",
        "--mount",
        "bash",
        "-c",
        script,
        "bash",
        str(tmp_path),
        sys.executable,
    ]
    try:
        done = subprocess.run(call, capture_output=True, text=True, check=False, timeout=120)
    except FileNotFoundError:
        pytest.skip("no unshare")
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip(f"no mount namespace: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    first, second, third, fourth = done.stdout.splitlines()
    assert (first, second, third) == ("a True 0", "b True 0", "c True 2")
    assert "disk is full. The next shard needs 5000000 bytes" in fourth
    assert "resources.cache_directory" in fourth


def test_a_directory_that_cannot_be_used_is_named(tmp_path):
    store = DistantStore(tmp_path / "store")
    shard = put(store, "a.tar", b"a")
    (tmp_path / "cache").write_text("a file in the way")
    with pytest.raises(StorageError, match=rf"shard cache {tmp_path}/cache: .*resources\.cache_directory"):
        ShardCache(store, tmp_path / "cache", max_bytes=10).path(**shard)


# Damage and death


def test_wrong_bytes_are_downloaded_once_more(tmp_path):
    """Bytes that the network garbled are not the bytes in the store."""

    @dataclass(frozen=True)
    class Garbling(DistantStore):
        def download(self, key, path):
            first = not self.log()
            super().download(key, path)
            if first:
                path.write_bytes(b"abd")

    store = Garbling(tmp_path / "store")
    shard = put(store, "a.tar", b"abc")
    assert ShardCache(store, tmp_path / "cache", max_bytes=10).path(**shard).read_bytes() == b"abc"
    assert store.log() == ["a.tar", "a.tar"]


def test_only_a_damaged_copy_is_dropped(tmp_path):
    store = DistantStore(tmp_path / "store")
    shard = put(store, "a.tar", b"a" * 10)
    key, sha256 = shard["key"], shard["sha256"]
    cache = ShardCache(store, tmp_path / "cache", max_bytes=100)

    first = cache.open(**shard)
    assert not cache.discard_if_damaged(key, sha256=sha256, descriptor=first)
    cache.path(**shard).write_bytes(b"b" * 10)
    second = cache.open(**shard)
    assert cache.discard_if_damaged(key, sha256=sha256, descriptor=second)
    assert not cache.touch(key, sha256=sha256)
    cache.path(**shard)
    assert cache.discard_if_damaged(
        key, sha256=sha256, descriptor=second
    )  # a late reader that still holds the old copy
    assert cache.touch(key, sha256=sha256)  # does not drop the new one
    assert (cache.counts.downloads, cache.counts.repairs) == (2, 1)
    os.close(first)
    os.close(second)


def fetch_slowly(store, directory, shard):
    """Write half of the shard under its temporary name, and then hang."""

    class Slow(DistantStore):
        def download(self, key, path):
            path.with_name(".tmp-half").write_bytes(self.read(key)[:5])
            path.write_bytes(self.read(key)[:5])
            time.sleep(600)

    ShardCache(Slow(store.root), directory, max_bytes=10).path(**shard)


def test_a_downloader_killed_with_sigkill_leaves_nothing_that_is_trusted(tmp_path):
    store = DistantStore(tmp_path / "store")
    shard = put(store, "a.tar", b"a" * 10)
    process = multiprocessing.get_context("spawn").Process(
        target=fetch_slowly, args=(store, tmp_path / "cache", shard), daemon=True
    )
    process.start()
    deadline = time.monotonic() + 60
    while 5 not in held(tmp_path / "cache"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    waiting = threading.Thread(
        target=ShardCache(store, tmp_path / "cache", max_bytes=10).path, kwargs=shard, daemon=True
    )
    waiting.start()  # another reader on the node waits for the dead one's lock
    time.sleep(0.1)
    assert waiting.is_alive()
    process.kill()
    process.join(60)
    waiting.join(20)
    assert not waiting.is_alive()
    assert held(tmp_path / "cache") == [10]
    assert (tmp_path / "cache" / f"{shard['sha256']}.tar").read_bytes() == b"a" * 10


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
    thread.join(20)  # it would wait for ever for space that nobody frees
    assert not thread.is_alive()
    assert held(tmp_path / "cache") == [10]
