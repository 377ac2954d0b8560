"""Both stores keep one contract; errors are one clear line."""

import errno
import http.server
import os
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.errors import ConfigError, StorageError
from pipeline.storage import DeniedObject, FileStore, MissingObject, ObjectInfo, S3Store, open_store, probe


@pytest.fixture(params=["file", "s3"])
def store(request, tmp_path):
    if request.param == "file":
        return open_store(str(tmp_path / "a store"))
    return open_store(f"s3://{request.getfixturevalue('s3_bucket')}/some/prefix")


def test_what_is_written_is_read(store):
    store.write("a/b.bin", b"first")
    store.write("a/b.bin", b"0123456789")
    assert store.read("a/b.bin") == b"0123456789"
    assert store.read_range("a/b.bin", 3, 4) == b"3456"
    assert store.read_range("a/b.bin", 3, 0) == b""
    assert store.exists("a/b.bin")
    assert not store.exists("a")
    store.delete("a/b.bin")
    store.delete("a/b.bin")
    assert not store.exists("a/b.bin")


def test_a_range_past_the_end_is_an_error_not_fewer_bytes(store):
    store.write("a", b"0123456789")
    for start in (5, 50):
        with pytest.raises(StorageError, match="ends"):
            store.read_range("a", start, 6)


def test_create_is_once_only(store):
    assert store.create("gen/0001.json", b"mine") is True
    assert store.create("gen/0001.json", b"other") is False
    assert store.read("gen/0001.json") == b"mine"


def test_of_racing_creates_exactly_one_wins(store):
    barrier = threading.Barrier(8)

    def claim(number):
        barrier.wait()
        return store.create("gen/0001.json", b"%d" % number)

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(claim, range(8)))
    assert sum(won) == 1
    assert store.read("gen/0001.json") == b"%d" % won.index(True)


def test_listing_is_in_key_order_on_both_stores(store):
    keys = ["a.txt", "a/x", "a-b/y", "a/b/z", "shards/ab/1", "shards/b", "é"]
    for key in keys:
        store.write(key, key.encode())
    expected = [ObjectInfo(key, len(key.encode())) for key in sorted(keys)]  # code points order as UTF-8 bytes do
    assert list(store.list()) == expected
    assert list(store.list("shards/")) == [item for item in expected if item.key.startswith("shards/")]
    assert list(store.list("a/b")) == [ObjectInfo("a/b/z", 5)]
    assert list(store.list("s")) == [item for item in expected if item.key.startswith("s")]
    assert list(store.list("none/")) == []


def test_upload_and_download_move_files(store, tmp_path):
    source, target = tmp_path / "source", tmp_path / "new folder" / "target"
    source.write_bytes(os.urandom(9 * 2**20))  # above boto3's 8 MiB: several parts
    store.upload("big", source)
    store.download("big", target)
    assert target.read_bytes() == source.read_bytes()
    assert [path.name for path in target.parent.iterdir()] == ["target"]
    local = store.local_path("big")
    assert local is None or local.read_bytes() == source.read_bytes()


def test_at_goes_down_and_an_address_or_pickle_reopens(store):
    below = store.at("step-1/g0001")
    below.write("x", b"1")
    assert store.read("step-1/g0001/x") == b"1"
    assert open_store(below.uri).read("x") == b"1"
    assert pickle.loads(pickle.dumps(below)) == below


def test_a_missing_object_names_place_key_and_way_out(store, tmp_path):
    for act in (store.read, lambda key: store.read_range(key, 0, 1), lambda key: store.download(key, tmp_path / "x")):
        with pytest.raises(MissingObject, match=r"no/such\.json.*Check") as caught:
            act("no/such.json")
        assert store.uri in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["", "/abs", "a/../b", "..", "a//b", "a/", "./a", "a\0b"])
def test_keys_cannot_leave_the_store(store, key):
    for act in (store.read, store.exists, lambda key: store.write(key, b""), store.delete):
        with pytest.raises(StorageError, match="is no key"):
            act(key)


def test_probe_accepts_good_stores_and_leaves_nothing(store):
    probe(store)
    assert list(store.list()) == []


class _Overwriting(FileStore):
    """A real folder whose create behaves like a store without conditional writes."""

    def create(self, key, data):
        self.write(key, data)
        return True


def test_probe_refuses_a_store_that_overwrites(tmp_path):
    with pytest.raises(StorageError, match="If-None-Match"):
        probe(_Overwriting(tmp_path))


def test_probe_refuses_a_store_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="failed for"):
        probe(open_store(str(tmp_path / "file" / "store")))


def test_addresses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert open_store("runs") == open_store(str(tmp_path / "runs")) == open_store(f"file://{tmp_path}/runs")
    assert open_store("file:///a%20b") == FileStore(Path("/a b"))
    assert open_store("s3://bucket") == S3Store("bucket")
    assert open_store("s3://bucket/a/b/") == S3Store("bucket", "a/b")


@pytest.mark.parametrize("uri", ["", "gs://bucket/x", "https://host/x", "file://host/x", "s3://", "s3:///x"])
def test_other_addresses_are_refused_with_the_choices(uri):
    with pytest.raises(ConfigError, match=r"file:///absolute/folder.*s3://bucket/prefix"):
        open_store(uri)


def test_unfinished_files_are_not_listed_and_failed_writes_leave_none(tmp_path):
    store = open_store(str(tmp_path))
    (tmp_path / ".tmp-dead").write_bytes(b"half")
    with pytest.raises(MissingObject):
        store.upload("key", tmp_path / "absent")
    assert list(store.list()) == []
    assert [path.name for path in tmp_path.iterdir()] == [".tmp-dead"]


def test_a_reader_never_sees_half_a_write(tmp_path):
    store = open_store(str(tmp_path))
    values = [bytes([number]) * 300_000 for number in range(2)]
    store.write("x", values[0])
    stop = threading.Event()

    def rewrite():
        turn = 0
        while not stop.is_set():
            turn += 1
            store.write("x", values[turn % 2])

    writer = threading.Thread(target=rewrite)
    writer.start()
    seen = {store.read("x") for _ in range(300)}
    stop.set()
    writer.join()
    assert seen <= set(values)


def test_links_are_followed_and_loops_refused(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "x").write_bytes(b"12")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "store" / "dangling").symlink_to(tmp_path / "nowhere")
    store = open_store(str(tmp_path / "store"))
    assert list(store.list()) == [ObjectInfo("dangling", 0), ObjectInfo("linked/x", 2)]
    (tmp_path / "real" / "back").symlink_to(tmp_path / "store")
    with pytest.raises(StorageError, match="leads back"):
        list(store.list())


def test_no_space_left_says_so(tmp_path):
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")
    with pytest.raises(OSError, match="No space") as caught, full.open("wb", buffering=0) as file:
        file.write(b"x")
    assert caught.value.errno == errno.ENOSPC
    # the errno of a real full device, through the way every store reports
    from pipeline.storage import _explained

    with pytest.raises(StorageError, match=r"no space left.*choose another store"), _explained("here", "key", "write"):
        full.write_bytes(b"x")


def test_a_missing_bucket_is_named(s3_endpoint):
    store = open_store("s3://no-such-bucket-anywhere/x")
    for act in (
        lambda: store.read("a"),
        lambda: store.write("a", b""),
        lambda: store.create("a", b""),
        lambda: list(store.list()),
    ):
        with pytest.raises(StorageError, match=r"s3://no-such-bucket-anywhere/x.*no such bucket"):
            act()


def test_an_endpoint_that_is_down_is_named(monkeypatch, s3_endpoint):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(StorageError, match=r"does not answer.*AWS_ENDPOINT_URL"):
        open_store("s3://bucket").read("a")


class _Scripted(http.server.BaseHTTPRequestHandler):
    """An S3 endpoint that answers from `answers`, then keeps to the last: (status, code, headers, body)."""

    answers = ()
    protocol_version = "HTTP/1.1"  # with 1.0 boto3 waits a second for "100 Continue"

    def _answer(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        status, code, headers, body = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        body = body if code is None else f"<Error><Code>{code}</Code><Message>m</Message></Error>".encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True

    do_GET = do_PUT = do_HEAD = _answer

    def log_message(self, *arguments):
        pass


@pytest.fixture
def scripted(s3_endpoint, monkeypatch):
    """Starts an endpoint with the given answers; the store on it."""
    servers = []

    def start(*answers):
        handler = type("Handler", (_Scripted,), {"answers": list(answers)})
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        return open_store("s3://bucket")

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_conflicts_of_create_are_tried_again(scripted):
    conflict = (409, "ConditionalRequestConflict", {}, b"")
    assert scripted(conflict, conflict, (200, None, {}, b"")).create("a", b"x") is True
    assert scripted(conflict, (412, "PreconditionFailed", {}, b"")).create("a", b"x") is False
    with pytest.raises(StorageError, match="ConditionalRequestConflict"):
        scripted(conflict).create("a", b"x")


def test_a_body_that_breaks_off_is_read_again(scripted):
    cut = (200, None, {"Content-Length": "10"}, b"01234")
    assert scripted(cut, cut, (200, None, {}, b"0123456789")).read("a") == b"0123456789"


@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        ((403, "AccessDenied", {}, b""), DeniedObject, "access denied.*s3:GetObject"),
        ((403, "InvalidAccessKeyId", {}, b""), StorageError, "credentials are refused.*InvalidAccessKeyId"),
    ],
)
def test_refusals_are_named(scripted, answer, kind, words):
    with pytest.raises(StorageError, match=words) as caught:
        scripted(answer).read("a")
    assert type(caught.value) is kind


def test_missing_credentials_are_named(s3_endpoint, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    # a client is kept per endpoint: another name of the same server makes a new one
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint.replace("127.0.0.1", "localhost"))
    started = time.monotonic()
    with pytest.raises(StorageError, match="no AWS credentials"):
        open_store("s3://bucket").read("a")
    assert time.monotonic() - started < 20
