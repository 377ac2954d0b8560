"""A real S3 server on loopback for tests and experiments: OpenStack Swift with atomic create-once.

Command: make local-s3        or   python -m infra.local.s3 --dir .mae/s3 [--port N]      (Ctrl-C stops it; the data stay)
It prints the endpoint and the variables to export. The secret key is new at each start and is never written to disk.

Unlike a mock, it checks signatures, keeps its data through `kill -9`, and refuses what a real store refuses. It is a test
store: one copy, one disk, one process per server; about 180 MiB of memory, 2 to 5 s to start. Needs Linux and the package
`swift` (the extra `local-infra`, part of `dev`).
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
    """A server over a folder, which can be stopped, killed and restarted with the same port, data and secret."""

    def __init__(self, directory: Path, *, port: int | None = None, atomic: bool = True) -> None:
        """Start nothing yet. `atomic=False` gives plain Swift, where simultaneous creates of a key may all succeed."""
        self.directory = directory
        self.port = port or free_port()
        self.secret_key = secrets.token_urlsafe(32)
        self.atomic = atomic
        self._process: subprocess.Popen[bytes] | None = None
        self.pids: dict[str, int] = {}
        """Process ids of the four servers by role: proxy, object, container, account."""

    @property
    def endpoint(self) -> str:
        """The address, `http://127.0.0.1:PORT`."""
        return f"http://{HOST}:{self.port}"

    def environment(self) -> dict[str, str]:
        """Return AWS's standard environment variables for this server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": REGION,
        }

    def start(self) -> None:
        """Start the server and wait until it answers requests; raise RuntimeError with its output if it does not come up."""
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
                stdin=subprocess.PIPE,  # closes with this process, which ends the server
                stdout=subprocess.PIPE,
                stderr=stderr,
                start_new_session=True,  # so that Ctrl-C reaches the servers only through this process, in order
            )
        line = _first_line(self._process, within_s=_START_S)
        if not line:
            self.stop()
            raise RuntimeError(
                f"the local S3 server did not start: {errors.read_text().strip() or f'no answer within {_START_S} s'}"
            )
        self.pids = json.loads(line)

    def stop(self) -> None:
        """Stop every process of the server, if it is running."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(_STOP_S)
        self._reap()

    def kill(self) -> None:
        """Kill all processes at once with SIGKILL, like a machine that loses power."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)  # the kernel sends the same to its four servers
            self._process.wait(_STOP_S)
            self._reap()

    def _reap(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout) if self._process else ():
            if pipe is not None:
                pipe.close()
        ends = time.monotonic() + _STOP_S
        while left := {role: pid for role, pid in self.pids.items() if _runs(pid)}:
            if time.monotonic() > ends:
                print(f"the local S3 server's processes {left} did not end within {_STOP_S} s", file=sys.stderr)
                break
            time.sleep(0.01)
        self._process, self.pids = None, {}


@contextlib.contextmanager
def serving(directory: Path, *, port: int | None = None, atomic: bool = True) -> Iterator[S3Server]:
    """Run a server and stop it at the end, even if it was killed meanwhile."""
    server = S3Server(directory, port=port, atomic=atomic)
    try:
        server.start()
        yield server
    finally:
        server.stop()


def free_port() -> int:
    """Return a free loopback port outside the kernel's range for outgoing connections.

    A port in that range could be taken while a killed server is down, or a client could even connect to itself.
    Errors: RuntimeError if no port is free.
    """
    first_dynamic = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    low, high = (10_000, first_dynamic) if first_dynamic > 11_000 else (1024, 65_536)
    for _ in range(1000):
        port = random.SystemRandom().randrange(low, high)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((HOST, port))
            return port
    raise RuntimeError(f"no free port found between {low} and {high - 1} on {HOST}: give one with --port")


def _first_line(process: subprocess.Popen[bytes], *, within_s: float) -> bytes:
    """Return a process's first line of output, or nothing if it ends or stays silent."""
    assert process.stdout is not None  # noqa: S101 - a pipe was asked for
    ready, _, _ = select.select([process.stdout], [], [], within_s)
    return process.stdout.readline() if ready else b""


def _runs(pid: int) -> bool:
    """Return whether a process is running; a zombie is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in {"Z", "X"}
    except (FileNotFoundError, ProcessLookupError):
        return False


def main() -> int:
    """Serve until Ctrl-C or SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path(".mae/s3"), help="where to keep the data (default: .mae/s3)")
    parser.add_argument("--port", type=int, help="port to listen on (default: a free one)")
    parser.add_argument("--bucket", default="mae", help="bucket to create (default: mae)")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with serving(arguments.dir.absolute(), port=arguments.port) as server:
            _make_bucket(server, arguments.bucket)
            print(f"# S3 on {server.endpoint}, data in {arguments.dir}; stop it with Ctrl-C. In another terminal:")
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
