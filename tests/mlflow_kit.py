"""A real `mlflow server` on loopback over a SQLite file, which a test can hang, kill and restart."""

import contextlib
import os
import signal
import socket
import sqlite3
import subprocess
import time
import urllib.request
from pathlib import Path

from run_kit import end_with_parent

from pipeline import tracking


class Server:
    """A server over `folder/mlflow.db`, killed at the end of the context."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder, self.database = folder, folder / "mlflow.db"
        self.address = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen | None = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process:
            self.kill()

    def start(self) -> None:
        """Start the server and wait until it is healthy."""
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        log_file = self.folder / "server.log"
        with log_file.open("w") as output:
            self.process = subprocess.Popen(
                tracking.serve_command(f"sqlite:///{self.database}", port=self.port),
                env=environment,
                cwd=self.folder,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=end_with_parent,  # noqa: PLW1509 - one system call
            )

        def healthy():
            assert self.process.poll() is None, log_file.read_text()
            try:
                with urllib.request.urlopen(f"{self.address}/health", timeout=2) as answer:
                    return answer.status == 200
            except OSError:
                return False

        wait_for(healthy, within_s=120)

    def hang(self) -> None:
        """Stop the server: it accepts connections but answers nothing."""
        os.killpg(self.process.pid, signal.SIGSTOP)

    def kill(self) -> None:
        """Kill the server with SIGKILL, hanging or not."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process = None


def points_of(database: Path, run_id: str, name: str) -> list[tuple[int, float]]:
    """Return (step, value) of every point in the database, by step; a duplicated point appears twice."""
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        query = "SELECT step, value FROM metrics WHERE run_uuid = ? AND key = ? ORDER BY step, timestamp"
        return connection.execute(query, (run_id, name)).fetchall()


def wait_for(condition, within_s=30):
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end, f"{condition.__qualname__} was not true within {within_s} s"
        time.sleep(0.1)
