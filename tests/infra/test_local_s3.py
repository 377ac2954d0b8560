"""The local S3 server listens on loopback only, writes no secret to disk, leaves no process, and keeps its data through a kill."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import boto3
import psutil
import pytest

from infra.local.s3 import ROOT, S3Server, _runs, serving
from infra.local.swift_server import listing_update


def client(environment):
    names = {"aws_access_key_id": "AWS_ACCESS_KEY_ID", "aws_secret_access_key": "AWS_SECRET_ACCESS_KEY"}
    keys = {key: environment[name] for key, name in names.items()}
    endpoint, region = environment["AWS_ENDPOINT_URL"], environment["AWS_DEFAULT_REGION"]
    return boto3.session.Session().client("s3", endpoint_url=endpoint, region_name=region, **keys)


def listeners(pids):
    """The addresses that these processes listen on."""
    sockets = [socket for pid in pids for socket in psutil.Process(pid).net_connections("tcp")]
    return [socket.laddr.ip for socket in sockets if socket.status == psutil.CONN_LISTEN]


def test_it_listens_on_loopback_only_and_writes_its_secret_nowhere(swift_server):
    assert set(listeners(swift_server.pids.values())) == {"127.0.0.1"}
    assert len(listeners(swift_server.pids.values())) >= 4
    for path in swift_server.directory.rglob("*"):
        if path.is_file():
            assert swift_server.secret_key.encode() not in path.read_bytes(), path
    for pid in swift_server.pids.values():
        assert swift_server.secret_key.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()


def test_the_command_prints_its_use_and_ends_with_ctrl_c(tmp_path):
    call = [sys.executable, "-m", "infra.local.s3", "--dir", str(tmp_path / "s3")]
    # a shell makes its background jobs, and so perhaps these tests, ignore Ctrl-C
    process = subprocess.Popen(call, cwd=ROOT, stdout=subprocess.PIPE, text=True, preexec_fn=restore_ctrl_c)  # noqa: PLW1509
    try:
        lines = [process.stdout.readline() for _ in range(6)]
        environment = dict(re.findall(r"^export (\w+)=(.*)$", "".join(lines), re.MULTILINE))
        assert "store=s3://mae/runs" in lines[-1]
        client(environment).put_object(Bucket="mae", Key="a", Body=b"x")
        port = int(environment["AWS_ENDPOINT_URL"].rpartition(":")[2])
        servers = servers_on(tmp_path)
        assert len(servers) == 5
    finally:
        process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=30)[0]
    assert (process.returncode, rest) == (0, "")
    assert not any(map(_runs, servers))
    with serving(tmp_path / "s3", port=port) as again:
        assert client(again.environment()).get_object(Bucket="mae", Key="a")["Body"].read() == b"x"


def restore_ctrl_c():
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def servers_on(folder):
    """The server processes with this folder in their command line, without the one that a person starts."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes()
        except OSError:
            continue
        if str(folder).encode() in command and b"swift_server" in command:
            found.append(int(path.parent.name))
    return found


@pytest.mark.parametrize("killed", ["the parent", "the server"])
def test_a_kill_leaves_no_process(tmp_path, killed):
    script = "import sys, infra.local.s3 as s3, pathlib, time\nserver = s3.S3Server(pathlib.Path(sys.argv[1]))\n"
    script += "server.start()\nprint(server._process.pid, flush=True)\ntime.sleep(600)"
    starter = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        supervisor = int(starter.stdout.readline())
        servers = servers_on(tmp_path)
        assert len(servers) == 5
        os.kill(starter.pid if killed == "the parent" else supervisor, signal.SIGKILL)
        ends = time.monotonic() + 20
        while any(map(_runs, servers)) and time.monotonic() < ends:
            time.sleep(0.05)
        assert not any(map(_runs, servers))
    finally:
        starter.kill()
        starter.communicate()


def test_two_servers_share_neither_folder_nor_port(tmp_path, swift_server):
    with pytest.raises(RuntimeError, match="is in use by another server"):
        S3Server(swift_server.directory).start()
    assert swift_server.pids
    with pytest.raises(RuntimeError, match=f"port {swift_server.port} is not available"):
        S3Server(tmp_path, port=swift_server.port).start()


def test_after_a_kill_list_agrees_with_get(tmp_path):
    """The server is killed between the write of an object and that of its listing entry, and likewise in a deletion."""
    with serving(tmp_path) as server:
        bucket = client(server.environment())
        bucket.create_bucket(Bucket="bucket")
        bucket.put_object(Bucket="bucket", Key="old", Body=b"x")
        os.kill(server.pids["container"], signal.SIGSTOP)  # no listing is written from now on
        doomed = [
            threading.Thread(
                target=_ignoring_errors, args=(lambda: bucket.put_object(Bucket="bucket", Key="é/new", Body=b"abc"),)
            ),
            threading.Thread(target=_ignoring_errors, args=(lambda: bucket.delete_object(Bucket="bucket", Key="old"),)),
        ]
        for thread in doomed:
            thread.start()
        disk = tmp_path / "disk"
        wait_until(lambda: len(list(disk.rglob("objects/**/*.data"))) == 1 and list(disk.rglob("objects/**/*.ts")))
        server.kill()
        server.start()
        for thread in doomed:
            thread.join()
        found = [(item["Key"], item["Size"]) for item in bucket.list_objects_v2(Bucket="bucket").get("Contents", ())]
        assert found == [("é/new", 3)]
        assert bucket.get_object(Bucket="bucket", Key="é/new")["Body"].read() == b"abc"


def _ignoring_errors(act):
    try:
        act()
    except Exception as error:  # noqa: BLE001 - the server is killed meanwhile
        return error


def wait_until(holds, *, within_s=20):
    ends = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < ends, f"the condition was not true within {within_s} s"
        time.sleep(0.02)


def test_a_listing_update_describes_the_whole_object():
    metadata = {
        "name": "/AUTH_a/bucket/a/b",
        "X-Timestamp": "1.0",
        "Content-Length": "3",
        "ETag": "e",
        "Content-Type": "t",
    }
    update = listing_update(metadata, deleted=False)
    assert (update["op"], update["account"], update["container"], update["obj"]) == ("PUT", "AUTH_a", "bucket", "a/b")
    assert (update["headers"]["X-Size"], update["headers"]["X-Etag"]) == ("3", "e")
    parts = metadata | {"X-Object-Sysmeta-Container-Update-Override-Size": "99"}  # all parts of a multipart upload
    assert listing_update(parts, deleted=False)["headers"]["X-Size"] == "99"
    gone = listing_update({"name": "/a/b/c", "X-Timestamp": "2.0"}, deleted=True)
    assert gone["op"] == "DELETE"
    assert "X-Size" not in gone["headers"]
