"""A real S3 server on loopback for tests and for trying things: OpenStack Swift with atomic create-once.

Command: make local-s3        or   python -m infra.local.s3 --dir .mae/s3 [--port N]      (Ctrl-C ends it; the data stay)
Prints the endpoint and the variables to export; the secret is made anew at each start and is written nowhere.

Unlike a mock it checks signatures, keeps its data through `kill -9`, and refuses what a real store refuses. A test store: one
copy, one disk, one process a server; about 180 MiB of memory, 2 to 5 s to start. Needs Linux and the package `swift`
(the extra `local-infra`, part of `dev`).
"""

import argparse
import contextlib
import json
import os
import random
import secrets
import select
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from infra.local.swift_filters import ACCESS_KEY, SECRET_VARIABLE
from infra.local.swift_server import HOST, REGION

ROOT = Path(__file__).parents[2]
_START_S, _STOP_S = 90, 20


class S3Server:
    """A server over a folder; it can be stopped, killed and started again on the same port, with the same data and secret."""

    def __init__(self, directory: Path, *, port: int | None = None, atomic: bool = True) -> None:
        """Starts nothing yet. `atomic=False`: Swift as it comes, where simultaneous creates of a key may all succeed."""
        self.directory = directory
        self.port = port or free_port()
        self.secret_key = secrets.token_urlsafe(32)
        self.atomic = atomic
        self._process: subprocess.Popen[bytes] | None = None
        self.pids: dict[str, int] = {}
        """Of its four servers, by role: proxy, object, container, account."""

    @property
    def endpoint(self) -> str:
        """`http://127.0.0.1:PORT`."""
        return f"http://{HOST}:{self.port}"

    def environment(self) -> dict[str, str]:
        """AWS's standard variables for this server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": REGION,
        }

    def start(self) -> None:
        """Returns when requests are answered; RuntimeError with the server's words when it does not come up."""
        self.directory.mkdir(parents=True, exist_ok=True)
        call = [
            sys.executable,
            "-m",
            "infra.local.swift_server",
            "--dir",
            str(self.directory),
            "--port",
            str(self.port),
        ]
        if not self.atomic:
            call.append("--not-atomic")
        (self.directory / "log").mkdir(exist_ok=True)
        errors = self.directory / "log" / "start.log"
        with errors.open("wb") as stderr:
            self._process = subprocess.Popen(  # noqa: S603 - our own module
                call,
                cwd=ROOT,
                env=os.environ | {SECRET_VARIABLE: self.secret_key},
                stdin=subprocess.PIPE,  # it ends with this process
                stdout=subprocess.PIPE,
                stderr=stderr,
                start_new_session=True,  # Ctrl-C reaches the servers through this process, in order
            )
        line = _first_line(self._process, within_s=_START_S)
        if not line:
            self.stop()
            raise RuntimeError(f"the local S3 server did not start: {errors.read_text().strip() or 'no answer'}")
        self.pids = json.loads(line)

    def stop(self) -> None:
        """Ends every process of the server; fine when none runs."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reap()

    def kill(self) -> None:
        """`kill -9` of all its processes at once, as a machine that loses its power."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)  # the kernel sends the same to its four servers
            self._process.wait()
            self._reap()

    def _reap(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout) if self._process else ():
            if pipe is not None:
                pipe.close()
        ends = time.monotonic() + _STOP_S
        while any(map(_runs, self.pids.values())) and time.monotonic() < ends:
            time.sleep(0.01)
        self._process, self.pids = None, {}


@contextlib.contextmanager
def serving(directory: Path, *, port: int | None = None, atomic: bool = True) -> Iterator[S3Server]:
    """A running server; it is ended at the end, killed or not."""
    server = S3Server(directory, port=port, atomic=atomic)
    try:
        server.start()
        yield server
    finally:
        server.stop()


def free_port() -> int:
    """A free port of loopback that the kernel gives to no outgoing connection.

    One of those could be taken while a killed server is down, or a client could even connect to itself.
    """
    first_dynamic = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    low, high = (10_000, first_dynamic) if first_dynamic > 11_000 else (1024, 65_536)
    while True:
        port = random.SystemRandom().randrange(low, high)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((HOST, port))
            return port


def _first_line(process: subprocess.Popen[bytes], *, within_s: float) -> bytes:
    """What a process says first; empty when it ends or keeps silent."""
    assert process.stdout is not None  # noqa: S101 - a pipe was asked for
    ready, _, _ = select.select([process.stdout], [], [], within_s)
    return process.stdout.readline() if ready else b""


def _runs(pid: int) -> bool:
    """Whether it does; a zombie, which only waits for its parent to look, does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in {"Z", "X"}
    except (FileNotFoundError, ProcessLookupError):
        return False


def main() -> int:
    """Serves until Ctrl-C or SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path(".mae/s3"), help="where the data lie (.mae/s3)")
    parser.add_argument("--port", type=int, help="a free one is taken when left out")
    parser.add_argument("--bucket", default="mae", help="a bucket to have there (mae)")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with serving(arguments.dir.absolute(), port=arguments.port) as server:
            _make_bucket(server, arguments.bucket)
            print(f"# S3 on {server.endpoint}, data in {arguments.dir}; Ctrl-C ends it. In another terminal:")
            for name, value in server.environment().items():
                print(f"export {name}={shlex.quote(value)}")
            print(f"mae run my.yaml --set store=s3://{arguments.bucket}/runs", flush=True)
            signal.pause()
    except KeyboardInterrupt:
        return 0
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _make_bucket(server: S3Server, name: str) -> None:
    import boto3

    keys = {"aws_access_key_id": ACCESS_KEY, "aws_secret_access_key": server.secret_key}
    client = boto3.session.Session().client("s3", endpoint_url=server.endpoint, region_name=REGION, **keys)
    with contextlib.suppress(client.exceptions.BucketAlreadyOwnedByYou):
        client.create_bucket(Bucket=name)


if __name__ == "__main__":
    sys.exit(main())
