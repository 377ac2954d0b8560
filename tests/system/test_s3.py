"""Our store against a real S3 server that is killed (`kill -9` of all its processes) and started again, and a run through it."""

import hashlib
import os
import random
import shutil
import threading
import time
import uuid
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from run_kit import document, migrated_database, store, write_config, write_images

from infra.local.s3 import S3Server, serving
from pipeline.config import load_config
from pipeline.errors import StorageError
from pipeline.graph.receipts import read_receipt
from pipeline.runs.run import run_pipeline
from pipeline.runs.summary import RunSummary
from pipeline.storage import MissingObject, Store, connection, open_store, probe

__all__ = ["migrated_database", "store"]
pytestmark = pytest.mark.system
MIB = 2**20


@pytest.fixture(scope="module")
def mortal(tmp_path_factory) -> Iterator[S3Server]:
    """A server of this file's own: it gets killed."""
    with serving(tmp_path_factory.mktemp("mortal")) as server:
        yield server


@pytest.fixture
def bucket(mortal, monkeypatch) -> Store:
    """An empty bucket on it."""
    for name, value in mortal.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    name = f"bucket-{uuid.uuid4().hex}"
    connection.client().create_bucket(Bucket=name)
    return open_store(f"s3://{name}/runs")


def power_cut(server: S3Server, *, down_s: float) -> None:
    server.kill()
    time.sleep(down_s)
    server.start()


def content(number: int, size: int) -> bytes:
    return random.Random(number).randbytes(size)


# --- undisturbed ------------------------------------------------------------------------------------------------------------


def test_of_many_simultaneous_creates_exactly_one_wins_every_time(bucket):
    with ThreadPoolExecutor(20) as pool:
        for round_ in range(12):
            together = threading.Barrier(20)

            def claim(number: int, key: str = f"gen/{round_:04d}.json", together: Any = together) -> bool:
                together.wait()
                return bucket.create(key, b'{"generation": 1}')  # the very same bytes from each

            assert sum(pool.map(claim, range(20))) == 1


def test_a_listing_of_more_than_a_page_is_whole_and_in_order(bucket):
    keys = [f"shards/{number:04x}/{number:04d}" for number in range(1100)]  # the server's pages hold 1000
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: bucket.write(key, key.encode()), keys))
    before = bucket.traffic
    assert [info.key for info in bucket.list("shards/")] == keys
    assert bucket.traffic.requests - before.requests == 2


def test_a_large_file_goes_up_and_comes_down_in_parts(bucket, tmp_path):
    data = content(1, 100 * MIB + 12345)
    (tmp_path / "source").write_bytes(data)
    before = bucket.traffic
    bucket.upload("big", tmp_path / "source")
    up = bucket.traffic.requests - before.requests
    bucket.download("big", tmp_path / "target")
    assert hashlib.sha256((tmp_path / "target").read_bytes()).digest() == hashlib.sha256(data).digest()
    assert (up, bucket.traffic.requests - before.requests - up) == (9, 7)  # 7 parts, their beginning and completion
    assert bucket.traffic.bytes_received - before.bytes_received == len(data)
    with ThreadPoolExecutor(4) as pool:
        for at, part in pool.map(lambda at: (at, bucket.read_range("big", at, 3 * MIB)), range(0, 99 * MIB, 9 * MIB)):
            assert part == data[at : at + 3 * MIB]
    assert [(info.key, info.size) for info in bucket.list()] == [("big", len(data))]


# --- killed -------------------------------------------------------------------------------------------------------------------


def test_uploads_and_reads_outlive_a_killed_server(bucket, mortal, tmp_path):
    """Each operation under way is finished by retries when the server is back; every object is one of those written, whole."""
    whole = content(0, 40 * MIB)
    (tmp_path / "whole").write_bytes(whole)
    bucket.upload("whole", tmp_path / "whole")
    files = []
    for number in range(4):
        files.append(tmp_path / f"{number}")
        files[-1].write_bytes(content(number, 20 * MIB))
    stop, before = threading.Event(), bucket.traffic

    def go_on(act: Callable[[int], None]) -> int:
        turn = 0
        while not stop.is_set():
            act(turn)
            turn += 1
        return turn

    def upload(turn: int) -> None:
        bucket.upload(f"up/{turn % 7}", files[turn % 4])

    def write(turn: int) -> None:
        bucket.write(f"small/{turn % 50}", content(turn % 50, 1000))

    def read(turn: int) -> None:
        assert bucket.read_range("whole", turn % 5 * MIB, MIB) == whole[turn % 5 * MIB :][:MIB]

    def download(turn: int) -> None:
        target = tmp_path / "down" / f"{turn % 2}"
        bucket.download("whole", target)
        assert target.read_bytes() == whole

    pause = random.Random(7)
    with ThreadPoolExecutor(4) as pool:
        busy: list[Future[int]] = [pool.submit(go_on, act) for act in (upload, write, read, download)]
        try:
            for _ in range(2):
                time.sleep(pause.uniform(1, 2))
                power_cut(mortal, down_s=pause.uniform(0, 1))
            time.sleep(2)
        finally:
            stop.set()
        turns = [future.result() for future in busy]
    assert min(turns) >= 2
    assert bucket.traffic.retries > before.retries
    known = {hashlib.sha256(content(number, 20 * MIB)).digest() for number in range(4)}
    listed = {info.key: info.size for info in bucket.list()}
    for key, size in listed.items():
        data = bucket.read(key)
        assert len(data) == size
        if key.startswith("up/"):
            assert hashlib.sha256(data).digest() in known
        elif key.startswith("small/"):
            assert data == content(int(key.rpartition("/")[2]), 1000)
    assert {path.name for path in (tmp_path / "down").iterdir()} == {"0", "1"}
    probe(bucket)


def test_without_retries_a_kill_is_one_clear_error_and_no_half_object(bucket, mortal, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    old, new = content(1, 60 * MIB), content(2, 60 * MIB)
    (tmp_path / "new").write_bytes(new)
    bucket.write("replaced", old)
    acts: dict[str, Callable[[], Any]] = {
        "upload": lambda: bucket.upload("uploaded", tmp_path / "new"),
        "replace": lambda: bucket.write("replaced", new),
        "download": lambda: bucket.download("replaced", tmp_path / "target"),
    }
    failed: dict[str, str] = {}

    def attempt(name: str) -> None:
        try:
            for _ in range(100):
                acts[name]()
        except StorageError as error:
            failed[name] = str(error)

    threads = [threading.Thread(target=attempt, args=(name,)) for name in acts]
    for thread in threads:
        thread.start()
    time.sleep(0.25)
    mortal.kill()
    for thread in threads:
        thread.join()
    mortal.start()
    assert failed.keys() == acts.keys()
    for words in failed.values():
        assert "does not answer" in words or "broken" in words.lower() or "Response" in words, words
        assert "\n" not in words
    assert bucket.read("replaced") in (old, new)
    for info in bucket.list():
        assert bucket.read(info.key) in (old, new)
    with pytest.raises(MissingObject):
        bucket.read("absent")
    assert not [path for path in tmp_path.iterdir() if path.name not in {"new", "target"}]
    if (tmp_path / "target").exists():
        assert (tmp_path / "target").read_bytes() in (old, new)


@pytest.mark.parametrize("attempts", ["1", "8"])
def test_a_create_that_a_kill_interrupts_is_there_whole_or_not_at_all(bucket, mortal, monkeypatch, attempts):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", attempts)
    stop, pause = threading.Event(), random.Random(int(attempts))
    said: dict[str, bool | None] = {}

    def claim(worker: int) -> None:
        turn = 0
        while not stop.is_set():
            key = f"gen/{worker}-{turn}.json"
            try:
                said[key] = bucket.create(key, body(key))
            except StorageError:
                said[key] = None  # nobody knows
                time.sleep(0.05)
            turn += 1

    def body(key: str) -> bytes:
        return content(zlib.crc32(key.encode()), 30_000)

    threads = [threading.Thread(target=claim, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(3):
        time.sleep(pause.uniform(0.3, 0.8))
        power_cut(mortal, down_s=0)
    stop.set()
    for thread in threads:
        thread.join()
    listed = {info.key for info in bucket.list("gen/")}
    assert False not in said.values()  # nobody else wrote: with retries, a lost answer is known for our own object
    assert (None in said.values()) == (attempts == "1")
    for key, made in said.items():
        try:
            assert bucket.read(key) == body(key)
            assert key in listed
        except MissingObject:
            assert made is None
            assert key not in listed


# --- a run ---------------------------------------------------------------------------------------------------------------------


class Saboteur:
    """A display that cuts the server's power when a step says that it is at work, once a step, and starts it again."""

    def __init__(self, server: S3Server, steps: tuple[str, ...]) -> None:
        self.server, self.due = server, list(steps)
        self.restarts: list[threading.Thread] = []

    def update(self, step_name: str, *_: object) -> None:
        if step_name in self.due and not any(thread.is_alive() for thread in self.restarts):
            self.due.remove(step_name)
            self.server.kill()
            restart = threading.Thread(target=self._start_again)
            restart.start()
            self.restarts.append(restart)

    def step_state(self, step_name: str, state: str, *, detail: str = "") -> None:
        if state == "running":
            self.update(step_name)

    def show(self, *_: object) -> None: ...

    def _start_again(self) -> None:
        time.sleep(1)
        self.server.start()


class Calm:
    """A display that shows nothing."""

    def update(self, *_: object) -> None: ...

    def step_state(self, *_: object, **__: object) -> None: ...

    def show(self, *_: object) -> None: ...


def receipts(root: str, summary: RunSummary) -> dict[str, Any]:
    """What each step vouches for, apart from who made it and when."""
    found = {}
    for outcome in summary.outcomes:
        receipt = read_receipt(open_store(root).at(outcome.uri.rpartition("/")[2]))
        assert receipt is not None, outcome.error
        found[outcome.step.name] = (receipt.fingerprint, receipt.identity, receipt.facts, receipt.files)
    return found


def test_a_run_through_a_server_that_is_killed_ends_as_one_in_a_folder(
    tmp_path, bucket, mortal, store, migrated_database, monkeypatch
):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    images = write_images(tmp_path / "images", 200)

    def go(root: str, name: str, display: Any) -> RunSummary:
        database = tmp_path / f"{name}.db"
        shutil.copy(migrated_database, database)
        content = document(root, images)
        content["tracking"] = {"uri": f"sqlite:///{database}"}
        content["evaluation"]["datasets"] = [{"name": "toy", "protocols": ["linear"]}]
        content["resources"] |= {"cache_directory": str(tmp_path / f"cache-{name}"), "checkpoint_every_steps": 10}
        config = load_config(write_config(tmp_path / f"{name}.yaml", content))
        return run_pipeline(config, executor="in_process", display=display)

    calm = go(str(store), "folder", Calm())
    saboteur = Saboteur(mortal, ("shard", "pretrain", "linear-toy-pretrained-s0", "report"))
    try:
        disturbed = go(bucket.uri, "bucket", saboteur)
    finally:
        for restart in saboteur.restarts:
            restart.join()
    assert [outcome.error for outcome in disturbed.outcomes if outcome.error] == []
    assert (calm.exit_code, disturbed.exit_code) == (0, 0)
    assert len(saboteur.restarts) >= 3, saboteur.due
    assert receipts(bucket.uri, disturbed) == receipts(str(store), calm)
    assert {outcome.state for outcome in go(bucket.uri, "bucket", Calm()).outcomes} == {"cached"}
    assert os.listdir(tmp_path / "cache-bucket")  # noqa: PTH208 - shards came over the network
