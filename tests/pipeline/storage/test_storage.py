"""All stores keep one contract, and each error is one clear line. Buckets are moto's and those of a real server (Swift)."""

import errno
import hashlib
import logging
import os
import pickle
import socket
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from s3_kit import Answer, Request, faulty_proxy, is_method

from infra.local.s3 import serving
from infra.local.swift_filters import GUEST_KEY
from pipeline.errors import ConfigError, StorageError, WrongStoreAddress
from pipeline.storage import (
    DeniedObject,
    FileStore,
    MissingObject,
    ObjectInfo,
    Traffic,
    connection,
    expand_address,
    open_store,
    probe,
)
from pipeline.storage.s3 import S3Store


@pytest.fixture(params=["file", "moto", "swift"])
def store(request, tmp_path):
    if request.param == "file":
        return open_store(str(tmp_path / "a store"))
    bucket = request.getfixturevalue("s3_bucket" if request.param == "moto" else "swift_bucket")
    return open_store(f"s3://{bucket}/some/prefix")


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


def test_a_range_past_the_end_raises_instead_of_returning_fewer_bytes(store):
    store.write("a", b"0123456789")
    for start in (5, 50):
        with pytest.raises(StorageError, match="ends"):
            store.read_range("a", start, 6)


def test_create_is_once_only(store):
    assert store.create("gen/0001.json", b"mine") is True
    assert store.create("gen/0001.json", b"other") is False
    assert store.read("gen/0001.json") == b"mine"


def test_exactly_one_of_racing_creates_wins(store):
    barrier = threading.Barrier(20)

    def claim(number):
        barrier.wait()
        return store.create("gen/0001.json", b"%d" % number)

    with ThreadPoolExecutor(20) as pool:
        won = list(pool.map(claim, range(20)))
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


def test_a_memoryview_is_written_whole(store):
    """Above 16 MiB a bucket receives it in parts."""
    data = bytes(range(251)) * 150_000
    store.write("big", memoryview(data))
    assert store.read("big") == data
    store.write("small", memoryview(data)[5:12])
    assert store.read("small") == data[5:12]


def test_upload_and_download_move_files(store, tmp_path):
    source, target = tmp_path / "source", tmp_path / "new folder" / "target"
    source.write_bytes(os.urandom(35 * 2**20))  # three parts
    store.upload("big", source)
    store.download("big", target)
    assert hashlib.sha256(target.read_bytes()).digest() == hashlib.sha256(source.read_bytes()).digest()
    assert store.read_range("big", 20 * 2**20 - 3, 7) == source.read_bytes()[20 * 2**20 - 3 :][:7]
    assert [path.name for path in target.parent.iterdir()] == ["target"]
    local = store.local_path("big")
    assert local is None or local.read_bytes() == source.read_bytes()


def test_at_goes_down_and_an_address_or_pickle_reopens(store):
    below = store.at("step-1/g0001")
    below.write("x", b"1")
    assert store.read("step-1/g0001/x") == b"1"
    assert open_store(below.uri).read("x") == b"1"
    assert pickle.loads(pickle.dumps(below)) == below


def test_a_missing_object_names_store_key_and_way_out(store, tmp_path):
    for act in (store.read, lambda key: store.read_range(key, 0, 1), lambda key: store.download(key, tmp_path / "x")):
        with pytest.raises(MissingObject, match=r"no/such\.json.*Check") as caught:
            act("no/such.json")
        assert store.uri in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["", "/abs", "a/../b", "..", "a//b", "a/", "./a", "a\0b"])
def test_keys_cannot_leave_the_store(store, key):
    for act in (store.read, store.exists, lambda key: store.write(key, b""), store.delete):
        with pytest.raises(StorageError, match="is not a valid key"):
            act(key)


def test_probe_accepts_good_stores_and_leaves_nothing(store):
    probe(store)
    assert list(store.list()) == []


class _Overwriting(FileStore):
    """A real folder whose create behaves like that of a store without conditional writes."""

    def create(self, key, data):
        self.write(key, data)
        return True


def test_probe_refuses_a_store_that_overwrites(tmp_path):
    with pytest.raises(StorageError, match="If-None-Match"):
        probe(_Overwriting(tmp_path))


def test_probe_refuses_a_store_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="no store can be kept there"):
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
    # the errno of a real full device, translated as every store does it
    from pipeline.storage.error_messages import translate_errors

    with (
        pytest.raises(StorageError, match=r"no space left.*choose another store"),
        translate_errors("here", "key", "write"),
    ):
        full.write_bytes(b"x")


# --- failures of a bucket -------------------------------------------------------------------------------------------


ACTS = {
    "read": lambda store, path: store.read("a"),
    "read_range": lambda store, path: store.read_range("a", 0, 1),
    "write": lambda store, path: store.write("a", b""),
    "create": lambda store, path: store.create("a", b""),
    "list": lambda store, path: list(store.list()),
    "exists": lambda store, path: store.exists("a"),
    "delete": lambda store, path: store.delete("a"),
    "upload": lambda store, path: store.upload("a", path),
    "download": lambda store, path: store.download("a", path),
}


@pytest.fixture
def a_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x")
    return path


@pytest.mark.parametrize("act", ["read", "write", "create", "list", "upload", "delete"])
@pytest.mark.parametrize("endpoint", ["s3_endpoint", "swift_endpoint"])
def test_a_missing_bucket_is_named(endpoint, act, request, a_file):
    request.getfixturevalue(endpoint)
    with pytest.raises(StorageError, match=r"s3://no-such-bucket-anywhere/x.*no such bucket"):
        ACTS[act](open_store("s3://no-such-bucket-anywhere/x"), a_file)


def test_an_endpoint_that_is_down_is_named(monkeypatch, s3_endpoint):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(StorageError, match=r"does not answer.*AWS_ENDPOINT_URL"):
        open_store("s3://bucket").read("a")


def test_an_endpoint_that_is_not_a_url_is_named_without_its_password(monkeypatch, s3_endpoint):
    for address in ("127.0.0.1:9", "user:pa55word@host", "http//host"):
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        with pytest.raises(StorageError, match=r"is not a URL.*AWS_ENDPOINT_URL") as caught:
            open_store("s3://bucket").read("a")
        assert "pa55word" not in str(caught.value)


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"AWS_DEFAULT_REGION": "us_east"}, "region_name 'us_east' .*correct or unset AWS_DEFAULT_REGION='us_east'"),
        ({"AWS_DEFAULT_REGION": '"us-east-1"'}, "correct or unset AWS_DEFAULT_REGION='\"us-east-1\"'"),
        ({"AWS_DEFAULT_REGION": "", "AWS_ENDPOINT_URL": ""}, "AWS_DEFAULT_REGION='' or|AWS_ENDPOINT_URL=''"),
        ({"AWS_MAX_ATTEMPTS": "abc"}, "int.*correct or unset AWS_MAX_ATTEMPTS='abc'$"),
        ({"AWS_MAX_ATTEMPTS": "0"}, "correct or unset AWS_MAX_ATTEMPTS='0'$"),
        ({"AWS_RETRY_MODE": "fast"}, "correct or unset AWS_RETRY_MODE='fast'$"),
        ({"AWS_REQUEST_CHECKSUM_CALCULATION": "never"}, "unset AWS_REQUEST_CHECKSUM_CALCULATION='never'$"),
        ({"AWS_ENDPOINT_URL": "http://host:port"}, "`http://host:port`.*AWS_ENDPOINT_URL"),
        ({"AWS_ENDPOINT_URL": "http://host:99999"}, "`http://host:99999`.*AWS_ENDPOINT_URL"),
    ],
)
def test_a_setting_that_botocore_refuses_is_named_and_no_other(s3_endpoint, monkeypatch, variables, words):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(WrongStoreAddress, match=words) as caught:
        open_store("s3://bucket").read("a")
    others = {"AWS_DEFAULT_REGION", "AWS_MAX_ATTEMPTS", "AWS_RETRY_MODE", "AWS_ENDPOINT_URL"} - variables.keys()
    assert not [name for name in others if name in str(caught.value)]
    assert "\n" not in str(caught.value)


def test_a_setting_of_the_profile_is_named(s3_endpoint, tmp_path, monkeypatch):
    (tmp_path / "config").write_text("[default]\nregion = eu_west\n")
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    with pytest.raises(WrongStoreAddress, match="unset region in the AWS profile='eu_west'"):
        open_store("s3://bucket").read("a")
    (tmp_path / "config").write_text("region = eu-west-1\n")
    with pytest.raises(WrongStoreAddress, match=f"unset AWS_CONFIG_FILE='{tmp_path}/config'"):
        open_store("s3://bucket").read("a")


def test_settings_are_named_without_their_secrets():
    secrets = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "refused", "AWS_SESSION_TOKEN": "value"}
    line = connection.refusal_of_settings("a refused value", secrets, {"aws_secret_access_key": "refused"})
    assert line.endswith("check the AWS_* variables and the AWS configuration file")


@pytest.fixture
def silent_endpoint(s3_endpoint, monkeypatch):
    """It accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{address}")
        yield address


def test_a_store_that_has_never_answered_is_given_up_in_time(silent_endpoint, monkeypatch):
    """A minute at most, with the limits as they are: 10 s to connect and 45 s to read, once."""
    assert connection._CONNECT_S + connection._READ_S < 60
    assert connection._FIRST_ANSWER_S + connection._CONNECT_S + 16 < 60  # refused or lost: nothing is read
    monkeypatch.setattr(connection, "_READ_S", 1)
    monkeypatch.setattr(connection, "_FIRST_ANSWER_S", 1.2)
    began = time.monotonic()
    with pytest.raises(StorageError, match=rf"does not answer.*{silent_endpoint}.*AWS_ENDPOINT_URL"):
        open_store("s3://bucket").read("a")
    assert 1 <= time.monotonic() - began < 10


def test_a_store_that_has_answered_is_given_more_time():
    backoff = connection._Backoff(8)
    failure = connection.EndpointConnectionError(endpoint_url="http://store")
    late = {"context": {connection._BEGAN: time.monotonic() - 100}}
    with pytest.raises(connection.EndpointConnectionError):
        backoff.delay_s(response=None, attempts=2, caught_exception=failure, request_dict=late)

    class Answer:
        status_code = 404

    assert backoff.delay_s(response=(Answer(), {}), attempts=1, caught_exception=None, request_dict=late) is None
    assert backoff.delay_s(response=None, attempts=2, caught_exception=failure, request_dict=late) > 0


def test_an_endpoint_without_tls_is_told_apart(s3_endpoint, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint.replace("http:", "https:"))
    with pytest.raises(StorageError, match=r"TLS failed.*Check http:// or https://"):
        open_store("s3://bucket").read("a")


@pytest.mark.parametrize("act", ACTS)
def test_a_permission_that_is_missing_is_named(swift_bucket, monkeypatch, a_file, act):
    open_store(f"s3://{swift_bucket}").write("a", b"x")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", GUEST_KEY)
    wanted = {"write": "Put", "create": "Put", "upload": "Put", "delete": "Delete"}.get(act, "Get") + "Object"
    message = "Grant s3:ListBucket on the bucket" if act == "list" else f"Grant s3:{wanted} on the object"
    with pytest.raises(DeniedObject, match=rf"s3://{swift_bucket}: .*access denied.*{message}") as caught:
        ACTS[act](open_store(f"s3://{swift_bucket}"), a_file)
    assert ("s3:ListBucket" in str(caught.value)) == (act == "list" or wanted == "GetObject")


SECRET = "wJalrXUtnFEMI-not-to-be-seen"
TOKEN = "FwoGZXIvYXdzE-not-to-be-seen"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"AWS_SECRET_ACCESS_KEY": SECRET}, r"credentials are refused \(SignatureDoesNotMatch\)"),
        ({"AWS_ACCESS_KEY_ID": "nobody:" + SECRET}, r"credentials are refused"),
        ({"AWS_SESSION_TOKEN": TOKEN, "AWS_SECRET_ACCESS_KEY": SECRET}, r"credentials are refused"),
        ({"AWS_SECRET_ACCESS_KEY": SECRET, "AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "does not answer"),
        ({"AWS_PROFILE": "nobody"}, "no usable AWS credentials.*nobody.*AWS_PROFILE"),
    ],
)
def test_refused_credentials_are_named_and_shown_nowhere(swift_bucket, monkeypatch, variables, message, caplog, a_file):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    caplog.set_level(logging.INFO)
    for name, act in ACTS.items():
        with pytest.raises(StorageError) as caught:
            act(open_store(f"s3://{swift_bucket}"), a_file)
        shown = "".join(traceback.format_exception(caught.value)) + caplog.text + repr(caught.value)
        for secret in (SECRET, TOKEN, os.environ["AWS_SECRET_ACCESS_KEY"]):
            assert secret not in shown, name
        assert "\n" not in str(caught.value)
    with pytest.raises(StorageError, match=message):
        open_store(f"s3://{swift_bucket}").read("a")


def test_another_region_is_followed_where_the_store_names_it(swift_bucket, monkeypatch):
    # the server is in us-east-1 and rejects signatures for other regions
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    store = open_store(f"s3://{swift_bucket}")
    store.write("a", b"x")
    assert store.read("a") == b"x"


def test_missing_credentials_are_named(s3_endpoint, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    started = time.monotonic()
    with pytest.raises(StorageError, match="no AWS credentials"):
        open_store("s3://bucket").read("a")
    assert time.monotonic() - started < 20


# --- a proxy that loses answers, cuts them short and refuses --------------------------------------------------------


@pytest.fixture(scope="module")
def module_proxy(swift_server):
    with faulty_proxy(swift_server.endpoint) as proxy:
        yield proxy


@pytest.fixture
def proxy(module_proxy, swift_bucket, monkeypatch):
    """A proxy to the real server, without faults yet, which the environment points to."""
    module_proxy.faults.clear()
    monkeypatch.setenv("AWS_ENDPOINT_URL", module_proxy.address)
    return module_proxy


@pytest.fixture
def proxied(proxy, swift_bucket):
    """The store behind the proxy."""
    return open_store(f"s3://{swift_bucket}/runs")


def test_a_create_whose_answer_was_lost_knows_its_own_object(proxy, proxied):
    before = proxied.traffic
    proxy.lose(is_method("PUT"))
    assert proxied.create("a", b"same") is True
    assert proxied.traffic.retries - before.retries == 1
    assert proxied.create("a", b"same") is False
    # another call's object with the same bytes, and the first answer that said so is lost
    proxy.lose(is_method("PUT"))
    assert proxied.create("a", b"same") is False
    assert proxied.read("a") == b"same"


def test_a_create_whose_object_was_deleted_meanwhile_did_not_create_it(proxy, proxied):
    proxy.lose(is_method("PUT"))
    proxy.answer(is_method("PUT"), Answer(412, "PreconditionFailed"))
    proxy.answer(is_method("GET"), Answer(404, "NoSuchKey"))
    assert proxied.create("a", b"x") is False


@pytest.mark.parametrize("found", [b"mine", b"else"])
def test_without_metadata_create_compares_the_bytes(proxy, proxied, found):
    proxy.lose(is_method("PUT"))
    proxy.answer(is_method("PUT"), Answer(412, "PreconditionFailed"))
    proxy.answer(is_method("GET"), Answer(200, body=found))
    assert proxied.create("a", b"mine") is (found == b"mine")


def test_conflicts_of_create_are_retried(proxy, proxied, monkeypatch):
    conflict = Answer(409, "ConditionalRequestConflict")
    proxy.answer(is_method("PUT"), conflict, times=2)
    assert proxied.create("a", b"x") is True
    proxy.answer(is_method("PUT"), conflict)
    assert proxied.create("a", b"y") is False
    proxy.answer(is_method("PUT"), conflict, times=20)
    with pytest.raises(StorageError, match="ConditionalRequestConflict"):
        proxied.create("b", b"x")


@pytest.mark.parametrize("size", [10, 35 * 2**20])
def test_a_body_that_breaks_off_is_refetched(proxy, proxied, tmp_path, size):
    data = os.urandom(size)
    proxied.write("a", data)
    before = proxied.traffic
    proxy.cut(is_method("GET"), at=size // 7, times=2)
    assert proxied.read("a") == data
    assert proxied.traffic.retries - before.retries == 2
    proxy.cut(is_method("GET"), at=1)
    assert proxied.read_range("a", 3, 5) == data[3:8]
    proxy.cut(is_method("GET"), at=5, times=2)
    proxied.download("a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == data
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_body_that_always_breaks_off_is_named(proxy, proxied, tmp_path):
    proxied.write("a", bytes(100))
    for act in (proxied.read, lambda key: proxied.download(key, tmp_path / "a")):
        proxy.cut(is_method("GET"), at=7, times=20)
        with pytest.raises(StorageError, match=r"failed for a: .*does not answer|IncompleteRead|ended prematurely"):
            act("a")
    assert list(tmp_path.iterdir()) == []


def completes(request: Request) -> bool:
    return request.method == "POST" and "uploadId=" in request.path


IN_PARTS = {
    "upload": lambda store, path: store.upload("big", path),
    "write": lambda store, path: store.write("big", memoryview(path.read_bytes())),
}


@pytest.mark.parametrize("act", IN_PARTS.values(), ids=IN_PARTS)
@pytest.mark.parametrize("forgotten", [False, True])
def test_an_upload_whose_completion_was_lost_ends_whole(proxy, proxied, tmp_path, act, forgotten):
    (tmp_path / "source").write_bytes(os.urandom(35 * 2**20))
    proxy.lose(completes)
    if forgotten:  # when asked again, the store no longer knows the upload
        proxy.answer(completes, Answer(404, "NoSuchUpload"))
    act(proxied, tmp_path / "source")
    proxied.download("big", tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == (tmp_path / "source").read_bytes()
    assert [info.key for info in proxied.list()] == ["big"]


@pytest.mark.parametrize("act", IN_PARTS.values(), ids=IN_PARTS)
def test_an_upload_that_keeps_vanishing_is_not_a_missing_object(proxy, proxied, tmp_path, act):
    (tmp_path / "source").write_bytes(bytes(35 * 2**20))
    proxy.answer(completes, Answer(404, "NoSuchUpload"), times=4)
    with pytest.raises(StorageError, match=r"(upload of .*source|write) failed for big: NoSuchUpload") as caught:
        act(proxied, tmp_path / "source")
    assert type(caught.value) is StorageError


def test_an_overloaded_store_is_retried_then_named(proxy, proxied, monkeypatch):
    proxy.answer(is_method("GET"), Answer(503, "SlowDown"))
    proxied.write("a", b"x")
    before = proxied.traffic
    assert proxied.read("a") == b"x"
    assert (proxied.traffic.requests - before.requests, proxied.traffic.retries - before.retries) == (2, 1)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    for answer, word in ((Answer(503, "SlowDown"), "SlowDown"), (Answer(500), "500")):
        proxy.answer(is_method("GET"), answer, times=2)
        with pytest.raises(StorageError, match=rf"overloaded.*\({word}\) after 2 attempts.*AWS_MAX_ATTEMPTS"):
            proxied.read("a")


@pytest.mark.parametrize(
    ("act", "answer", "kind", "message"),
    [
        ("read", Answer(403, "AccessDenied"), DeniedObject, "access denied.*s3:GetObject"),
        ("read", Answer(403, "InvalidAccessKeyId"), StorageError, "credentials are refused.*InvalidAccessKeyId"),
        ("read", Answer(400, "ExpiredToken"), StorageError, "credentials are refused.*ExpiredToken.*Renew"),
        ("read", Answer(412, "PreconditionFailed"), StorageError, "replaced while it was being read"),
        ("create", Answer(501, "NotImplemented"), StorageError, "must support `If-None-Match"),
        ("exists", Answer(403), DeniedObject, r"access denied \(HeadObject\).*s3:GetObject"),
        ("read", Answer(400, "Strange"), StorageError, "Strange"),
        (
            "write",
            Answer(301, "PermanentRedirect", headers={"x-amz-bucket-region": "eu-west-9"}),
            StorageError,
            r"in another region .*\(PermanentRedirect\)\. Set AWS_DEFAULT_REGION=eu-west-9",
        ),
    ],
)
def test_refusals_are_named(proxy, proxied, a_file, act, answer, kind, message):
    proxy.answer(lambda request: True, answer, times=9)
    with pytest.raises(StorageError, match=message) as caught:
        ACTS[act](proxied, a_file)
    assert type(caught.value) is kind


def test_a_download_of_an_object_that_changes_is_refused_whole(proxy, proxied, tmp_path):
    proxied.write("a", bytes(35 * 2**20))
    proxy.answer(is_method("GET"), Answer(412, "PreconditionFailed"), times=9)
    with pytest.raises(StorageError, match="replaced while it was being read"):
        proxied.download("a", tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


# --- traffic counts and settings of botocore ------------------------------------------------------------------------


def test_traffic_counts_requests_and_the_bytes_of_objects(swift_bucket, tmp_path):
    store = open_store(f"s3://{swift_bucket}")
    (tmp_path / "source").write_bytes(bytes(2**20))

    def counted(act):
        before = store.traffic
        act()
        return Traffic(*(after - old for after, old in zip(store.traffic, before, strict=True)))

    assert counted(lambda: store.upload("a", tmp_path / "source")) == (1, 0, 0)
    assert counted(lambda: store.read("a")) == (1, 2**20, 0)
    assert counted(lambda: store.at("x").exists("y")) == (1, 0, 0)
    assert counted(lambda: store.read_range("a", 5, 100)) == (1, 100, 0)
    assert counted(lambda: store.download("a", tmp_path / "target")) == (1, 2**20, 0)
    assert counted(lambda: list(store.list())) == (1, 0, 0)
    assert open_store(str(tmp_path)).traffic == (0, 0, 0)


def test_threads_lose_no_counts(swift_bucket):
    store = open_store(f"s3://{swift_bucket}")
    store.write("a", b"0123456789")
    before = store.traffic
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: store.read("a"), range(64)))
    after = store.traffic
    assert (after.requests - before.requests, after.bytes_received - before.bytes_received) == (64, 640)


def test_backoff_grows_and_lasts_for_the_restart_of_a_store():
    for jitter, total in ((0.0, 23.75), (1.0, 47.5)):
        pauses = [connection.backoff_s(attempt, 8, jitter) for attempt in range(1, 9)]
        assert pauses[-1] is None
        assert sum(pauses[:-1]) == pytest.approx(total)
        assert pauses[:-1] == sorted(pauses[:-1])
    assert connection.backoff_s(1, 1, 0.5) is None


def test_a_store_that_is_waited_for_is_logged_once(proxy, proxied, monkeypatch, caplog):
    monkeypatch.setattr(
        connection, "backoff_s", lambda attempt, max_attempts, jitter: 0.01 if attempt < max_attempts else None
    )
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "5")
    proxy.answer(is_method("GET"), Answer(503, "SlowDown"), times=8)
    with ThreadPoolExecutor(2) as pool:
        assert not [future for future in [pool.submit(proxied.exists, "a") for _ in range(2)] if future.result()]
        for future in [pool.submit(proxied.read, "a") for _ in range(2)]:
            with pytest.raises(StorageError):
                future.result()
    assert [record.getMessage() for record in caplog.records if record.name == "pipeline.storage.connection"] == [
        f"object store {proxy.address} answered 503; retrying (attempt 4 of 5)"
    ]


@pytest.mark.parametrize(
    ("environment", "profile", "services", "endpoint"),
    [
        ({}, {}, {}, None),
        ({"AWS_ENDPOINT_URL": "http://a"}, {"endpoint_url": "http://b"}, {}, "http://a"),
        ({"AWS_ENDPOINT_URL": "http://a", "AWS_ENDPOINT_URL_S3": "http://c"}, {}, {}, "http://c"),
        ({}, {"endpoint_url": "http://b"}, {}, "http://b"),
        ({}, {"endpoint_url": "http://b"}, {"s3": {"endpoint_url": "http://d"}}, "http://d"),
        ({"AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "true", "AWS_ENDPOINT_URL": "http://a"}, {}, {}, None),
    ],
)
def test_the_endpoint_is_found_where_aws_says(environment, profile, services, endpoint):
    assert connection.endpoint_of(environment, profile, services) == endpoint


def test_what_the_user_configured_is_not_overridden():
    on_aws = connection.client_options({}, {}, own_endpoint=False)
    assert on_aws["retries"] == {"mode": "standard", "total_max_attempts": 8}
    assert not {"s3", "request_checksum_calculation"} & on_aws.keys()
    elsewhere = connection.client_options({}, {}, own_endpoint=True)
    assert elsewhere["s3"] == {"addressing_style": "path"}
    assert elsewhere["request_checksum_calculation"] == "when_required"
    environment = {
        "AWS_MAX_ATTEMPTS": "3",
        "AWS_RETRY_MODE": "adaptive",
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_supported",
    }
    profile = {"s3": {"addressing_style": "virtual"}, "response_checksum_validation": "when_supported"}
    options = connection.client_options(environment, profile, own_endpoint=True)
    assert options["retries"] == {}
    assert not {"s3", "request_checksum_calculation", "response_checksum_validation"} & options.keys()


@pytest.mark.parametrize(
    ("profile", "address"),
    [
        ("[default]\nendpoint_url = http://store.example:9000\n", "http://store.example:9000/bucket/key"),
        (
            "[default]\nendpoint_url = http://store.example:9000\ns3 =\n    addressing_style = virtual\n",
            "http://bucket.store.example:9000/key",
        ),
        (
            "[default]\nservices = mine\n[services mine]\ns3 =\n    endpoint_url = https://own.example\n",
            "https://own.example/bucket/key",
        ),
        ("[default]\nregion = eu-west-1\n", "https://bucket.s3.amazonaws.com/key"),
        ("[default]\nregion = eu-west-1\ns3 =\n    addressing_style = path\n", "https://s3.amazonaws.com/bucket/key"),
    ],
)
def test_a_profile_sets_endpoint_and_addressing_style(s3_endpoint, tmp_path, monkeypatch, profile, address):
    (tmp_path / "config").write_text(profile)
    for name in ("AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    url = connection.client().generate_presigned_url("get_object", Params={"Bucket": "bucket", "Key": "key"})
    assert url.partition("?")[0].replace("s3.eu-west-1.", "s3.") == address


# --- addresses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a?b", "feature%2Fvit", "c#d", "e f+g", "$HOME", "~"])
def test_a_folder_of_any_name_is_reopened_from_its_address(tmp_path, name):
    store = open_store(str(tmp_path / name))
    store.write("a", b"x")
    assert (tmp_path / name / "a").read_bytes() == b"x"
    assert open_store(store.uri) == store


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("file:///a?b", "%3F"),
        ("file:///a#b", "%23"),
        ("file://host/a", "file:///absolute/folder"),
        ("s3://My Bucket/x", "'My Bucket' is not the name of a bucket"),
        ("s3:///x", "s3://bucket/prefix"),
        ("S3://bucket", "s3://bucket/prefix"),
        ("~nobody-of-this-name/x", "home directory"),
        ("/a\nb", "control character"),
        ("/a\0b", "control character"),
    ],
)
def test_an_address_that_cannot_be_right_is_refused(address, words):
    with pytest.raises(ConfigError, match=words):
        open_store(address)


def test_variables_and_the_home_folder_are_expanded(monkeypatch):
    monkeypatch.setenv("SCRATCH", "/scratch/me?")
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("NOWHERE", raising=False)
    for written, meant in {
        "$SCRATCH/mae": "/scratch/me?/mae",
        "${SCRATCH}/mae": "/scratch/me?/mae",
        "file://$SCRATCH/mae": "file:///scratch/me%3F/mae",
        "s3://bucket/$SCRATCH": "s3://bucket//scratch/me?",
        "~/mae": "/home/me/mae",
        "~": "/home/me",
        "sqlite:///~/runs.db": "sqlite:////home/me/runs.db",
        "/a/~/b$": "/a/~/b$",
        "s3://bucket/x/": "s3://bucket/x/",
        "http://host:5000": "http://host:5000",
    }.items():
        assert expand_address(written) == meant
    for written, words in {
        "$NOWHERE/mae": "NOWHERE, which is not set",
        "${EMPTY}/mae": "EMPTY, which is empty",
    }.items():
        with pytest.raises(ConfigError, match=words):
            expand_address(written)


@pytest.mark.parametrize("inside", ["a file", "a file/store", "a" * 300])
def test_probe_names_a_path_that_cannot_be_a_folder(tmp_path, inside):
    (tmp_path / "a file").write_text("")
    with pytest.raises(WrongStoreAddress, match=r"no store can be kept there: .*Write the path of a folder"):
        probe(open_store(str(tmp_path / inside)))


def probe_often(store):
    for _ in range(20):  # it is a race, which a single probe may miss
        probe(store)


def test_probe_refuses_a_store_whose_create_is_not_atomic(tmp_path, monkeypatch):
    with serving(tmp_path / "plain", atomic=False) as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        connection.client().create_bucket(Bucket="plain")
        with pytest.raises(StorageError, match=r"s3://plain: [2-8] of 8 simultaneous creates .* is not atomic"):
            probe_often(open_store("s3://plain"))
        assert list(open_store("s3://plain").list()) == []
