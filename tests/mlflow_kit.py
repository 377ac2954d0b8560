"""A real `mlflow server` on loopback, to be killed without a warning and started again over the same database."""

import contextlib
import os
import signal
import socket
import subprocess
import time
import urllib.request
from urllib.parse import urlsplit

from run_kit import end_with_parent

from pipeline import tracking


def free_address() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


@contextlib.contextmanager
def mlflow_server(database_uri, address, folder):
    """Healthy on entry, killed with SIGKILL on exit."""
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    log_file = folder / "server.log"
    with log_file.open("w") as output:
        process = subprocess.Popen(
            tracking.serve_command(database_uri, port=urlsplit(address).port),
            env=environment,
            cwd=folder,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=end_with_parent,  # noqa: PLW1509 - one system call
        )
    try:
        wait_until_healthy(address, process, log_file)
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_until_healthy(address, process, log_file):
    def healthy():
        assert process.poll() is None, log_file.read_text()
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=2) as answer:
                return answer.status == 200
        except OSError:
            return False

    wait_for(healthy, within_s=120)


def wait_for(condition, within_s=30):
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)
