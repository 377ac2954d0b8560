"""OpenStack Swift with its S3 interface on loopback: one copy, one disk, four servers supervised by this process.

`infra.local.s3` starts this module, which prints one line of JSON once it answers requests. SIGTERM, SIGINT or the end of its
standard input (a pipe from its parent) ends all five processes; a SIGKILL takes the four servers along (PR_SET_PDEATHSIG).
The data in `directory` survive all of these.

    directory/swift/   configuration and rings, rewritten at each start because the servers' ports change
    directory/disk/    the objects; the file system needs user xattrs (ext4, xfs, btrfs, overlay, tmpfs since Linux 6.6)
    directory/log/     one file per server

Source: Swift's "SAIO" (all in one) configuration, with one process per server.
"""

import argparse
import ctypes
import fcntl
import json
import os
import pwd
import select
import signal
import socket
import sys
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HOST = "127.0.0.1"
REGION = "us-east-1"
BACKENDS = ("object", "container", "account")
_START_S, _STOP_S, _LOCK_S, _REPAIR_S = 60, 10, 3, 60
_PR_SET_PDEATHSIG = 1
_DEVICE = "d0"

_DEFAULTS = """[DEFAULT]
bind_ip = {host}
bind_port = {port}
workers = 0
user = {user}
swift_dir = {directory}/swift
devices = {directory}/disk
mount_check = false
disable_fallocate = true
fallocate_reserve = 0
log_name = {role}
log_level = WARNING
log_file = {directory}/log/{role}.log
log_custom_handlers = infra.local.swift_filters.log_to_file
recon_cache_path = {directory}/log
client_timeout = 60
conn_timeout = 2
"""
# A PUT must be in the listing before it is answered: by default Swift waits only 1 s for that, then updates it later.
_BACKEND = """
[pipeline:main]
pipeline = {role}-server
[app:{role}-server]
use = egg:swift#{role}
container_update_timeout = 30
node_timeout = 30
[object-updater]
concurrency = 1
updater_workers = 1
objects_per_second = 10000
"""
_PROXY = """
[pipeline:main]
pipeline = {pipeline}
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
allow_account_management = true
node_timeout = 60
recoverable_node_timeout = 60
object_chunk_size = 1048576
client_chunk_size = 1048576
[filter:local_cache]
paste.filter_factory = infra.local.swift_filters:local_cache
[filter:create_once]
paste.filter_factory = infra.local.swift_filters:create_once
[filter:two_users]
paste.filter_factory = infra.local.swift_filters:two_users
[filter:s3api]
use = egg:swift#s3api
location = {region}
max_upload_part_num = 10000
[filter:slo]
use = egg:swift#slo
max_manifest_segments = 10000
[filter:versioned_writes]
use = egg:swift#versioned_writes
allow_versioned_writes = true
allow_object_versioning = true
"""
_FILTERS = ("catch_errors", "gatekeeper", "local_cache", "listing_formats", "create_once", "bulk", "s3api", "two_users")
_LATER_FILTERS = ("copy", "slo", "dlo", "versioned_writes", "symlink")
_UNCHANGED_FILTERS = ("catch_errors", "gatekeeper", "listing_formats", "bulk", "copy", "dlo", "symlink")


def configuration(role: str, directory: Path, port: int, *, user: str, atomic: bool = True) -> str:
    """Return the text of a server's configuration; `atomic=False` leaves out the create-once filter, as in plain Swift."""
    head = _DEFAULTS.format(host=HOST, port=port, user=user, directory=directory, role=role)
    if role != "proxy":
        return head + _BACKEND.format(role=role)
    filters = [name for name in _FILTERS if atomic or name != "create_once"]
    pipeline = " ".join([*filters, *_LATER_FILTERS, "proxy-server"])
    plain = "".join(f"[filter:{name}]\nuse = egg:swift#{name}\n" for name in _UNCHANGED_FILTERS)
    return head + _PROXY.format(pipeline=pipeline, region=REGION) + plain


def listing_update(metadata: Mapping[str, str], *, deleted: bool) -> dict[str, Any]:
    """Return what Swift's updater sends to a bucket's listing, given the metadata of an object on disk."""
    account, container, name = metadata["name"].lstrip("/").split("/", 2)
    headers = {"X-Timestamp": metadata["X-Timestamp"], "X-Backend-Storage-Policy-Index": "0"}
    if not deleted:
        override = "X-Object-Sysmeta-Container-Update-Override-"
        headers |= {
            "X-Size": metadata.get(f"{override}Size", metadata["Content-Length"]),
            "X-Etag": metadata.get(f"{override}Etag", metadata["ETag"]),
            "X-Content-Type": metadata.get(f"{override}Content-Type", metadata["Content-Type"]),
        }
    operation = "DELETE" if deleted else "PUT"
    return {"op": operation, "account": account, "container": container, "obj": name, "headers": headers}


def main() -> int:
    """Start the four servers, report them, and wait for a signal or for one of them to end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--not-atomic", action="store_true")
    arguments = parser.parse_args()
    return _Servers(arguments.dir.resolve(), arguments.port, atomic=not arguments.not_atomic).run()


class _Servers:
    def __init__(self, directory: Path, port: int, *, atomic: bool) -> None:
        self.directory, self.port, self.atomic = directory, port, atomic
        self.pids: dict[int, str] = {}
        self.stopping = False

    def run(self) -> int:
        for name in ("swift", "disk/" + _DEVICE, "log"):
            (self.directory / name).mkdir(parents=True, exist_ok=True)
        # the servers inherit the lock, so that nobody can start on these data before the last of them is gone
        lock = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT)
        _acquire(lock, self.directory)
        _check_port(self.port)
        _check_xattrs(self.directory / "disk")
        ports = self._configure()
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, self._stop)
        for role in ports:
            self._start(role)
        for role, port in ports.items():
            self._wait_for(role, port)
        if self.stopping:
            self._wait()
            return 1
        running = self.directory / "swift" / "running"
        if running.exists():  # the servers were killed last time
            self._repair_listings(since=running.stat().st_mtime)
        running.touch()
        print(json.dumps({role: pid for pid, role in self.pids.items()}), flush=True)
        status = self._wait()
        if status == 0:
            running.unlink(missing_ok=True)
        return status

    def _configure(self) -> dict[str, int]:
        """Write the configuration and rings; return the ports by role."""
        etc = self.directory / "swift"
        if not (etc / "swift.conf").exists():  # the suffix is part of every path on the disk, so it must never change
            whole = etc / "swift.conf.new"  # renamed, since a kill must not leave a file without the suffix
            whole.write_text(f"[swift-hash]\nswift_hash_path_suffix = {uuid.uuid4().hex}\n")
            whole.replace(etc / "swift.conf")
        ports = dict(zip(BACKENDS, _free_ports(len(BACKENDS)), strict=True))
        _point_swift_at(etc)
        from swift.common.ring import RingBuilder

        for role, port in ports.items():
            builder = RingBuilder(8, 1, 0)
            device = {"region": 1, "zone": 1, "device": _DEVICE, "weight": 1.0, "meta": ""}
            address = {"ip": HOST, "port": port, "replication_ip": HOST, "replication_port": port}
            builder.add_dev(device | address)
            builder.rebalance()
            builder.get_ring().save(str(etc / f"{role}.ring.gz"))
        ports["proxy"] = self.port
        user = pwd.getpwuid(os.getuid()).pw_name
        for role, port in ports.items():
            text = configuration(role, self.directory, port, user=user, atomic=self.atomic)
            (etc / f"{role}.conf").write_text(text)
        return ports

    def _start(self, role: str) -> None:
        parent = os.getpid()  # PR_SET_PDEATHSIG fires when the forking thread ends; this process has only one
        pid = os.fork()
        if pid:
            self.pids[pid] = role
            return
        status = 1
        try:
            _die_with(parent)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            # a terminal sends Ctrl-C to every process, but only the parent acts on it
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            from swift.common.wsgi import run_wsgi

            status = run_wsgi(str(self.directory / "swift" / f"{role}.conf"), f"{role}-server")
        finally:
            os._exit(status)

    def _wait_for(self, role: str, port: int) -> None:
        ends = time.monotonic() + _START_S
        while not self.stopping:
            try:
                socket.create_connection((HOST, port), 0.2).close()
                return
            except OSError:
                dead = next((pid for pid in self.pids if _has_ended(pid)), None)
                if dead is not None or time.monotonic() > ends:
                    reason = f"the {self.pids[dead]} server ended" if dead else f"no answer within {_START_S} s"
                    print(f"{role} on port {port}: {reason}; see {self.directory}/log", file=sys.stderr, flush=True)
                    self._stop()
                    return
                time.sleep(0.02)

    def _wait(self) -> int:
        """Wait until every server has ended; return 0 if that was asked for."""
        status, kill_at = 0, None
        while self.pids:
            pid, _ = os.waitpid(-1, os.WNOHANG)
            if pid:
                role = self.pids.pop(pid)
                if not self.stopping:
                    print(f"the {role} server ended; see {self.directory}/log", file=sys.stderr, flush=True)
                    status = 1
                    self._stop()
                continue
            if not self.stopping and _has_ended_input():
                self._stop()
            if self.stopping:
                kill_at = kill_at or time.monotonic() + _STOP_S
                if time.monotonic() > kill_at:
                    self._signal(signal.SIGKILL)
            time.sleep(0.02)
        return status

    def _stop(self, *_: object) -> None:
        self.stopping = True
        self._signal(signal.SIGTERM)

    def _signal(self, number: signal.Signals) -> None:
        for pid in self.pids:  # not reaped yet, so the ids are still theirs alone
            os.kill(pid, number)

    def _repair_listings(self, *, since: float) -> None:
        """Add to the listings what a kill between object and listing left out, so that LIST agrees with GET."""
        pid = os.fork()
        if not pid:
            status = 1
            try:
                signal.alarm(_REPAIR_S)  # SIGALRM ends this child, so the parent cannot wait for ever
                _update_listings(self.directory, since=since - 1)
                status = 0
            finally:
                os._exit(status)
        if os.waitpid(pid, 0)[1]:
            print(
                f"the listings could not be repaired (limit {_REPAIR_S} s); see {self.directory}/log",
                file=sys.stderr,
                flush=True,
            )


def _update_listings(directory: Path, *, since: float) -> None:
    from swift.common.daemon import run_daemon
    from swift.common.storage_policy import POLICIES
    from swift.common.utils import get_logger
    from swift.obj.diskfile import DiskFileManager, read_metadata
    from swift.obj.updater import ObjectUpdater

    conf = {"devices": str(directory / "disk"), "mount_check": "false"}
    manager = DiskFileManager(conf, get_logger(conf))
    for path in (directory / "disk" / _DEVICE / "objects").rglob("*"):
        if path.suffix in {".data", ".ts"} and path.stat().st_mtime >= since:
            metadata = read_metadata(str(path))
            update = listing_update(metadata, deleted=path.suffix == ".ts")
            where = update["account"], update["container"], update["obj"]
            manager.pickle_async_update(_DEVICE, *where, update, metadata["X-Timestamp"], POLICIES.default)
    run_daemon(ObjectUpdater, str(directory / "swift" / "object.conf"), once=True)


def _point_swift_at(etc: Path) -> None:
    """Make Swift read our swift.conf instead of /etc/swift."""
    from swift.common import constraints, utils

    utils.set_swift_dir(str(etc))
    constraints.reload_constraints()


def _acquire(lock: int, directory: Path) -> None:
    ends = time.monotonic() + _LOCK_S  # servers that were just killed take a moment to exit
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > ends:
                sys.exit(f"{directory} is in use by another server: stop that one, or give another --dir")
            time.sleep(0.05)


def _check_port(port: int) -> None:
    """Exit if the port is in use: with SO_REUSEPORT, Swift would share it, and each server would get some of the requests."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            sys.exit(f"port {port} is not available ({error.strerror}): give another --port, or none")


def _check_xattrs(folder: Path) -> None:
    try:
        os.setxattr(folder, "user.mae", b"1")
    except OSError as error:
        sys.exit(
            f"{folder}: this file system does not support user xattrs ({error.strerror}): give a --dir on another one"
        )


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind((HOST, 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _has_ended(pid: int) -> bool:
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True


def _has_ended_input() -> bool:
    """Return whether the parent has ended or closed the pipe."""
    return bool(select.select([sys.stdin], [], [], 0)[0]) and not os.read(sys.stdin.fileno(), 1)


def _die_with(parent: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != parent:  # the parent died before the call
        os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
