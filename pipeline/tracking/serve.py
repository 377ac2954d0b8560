"""Looking at a tracking store in the browser."""

import contextlib
import os
import socket
import sys

from pipeline.tracking.connection import MLFLOW_SETTINGS, TrackingError, check_tracking, sqlite_file
from pipeline.tracking.mlflow_format import redact_text


def serve_command(uri: str, *, port: int) -> list[str]:
    """The server over a local tracking store, seen by this machine alone, its files beside the database."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", uri]
    database = sqlite_file(uri)
    return command + (["--artifacts-destination", str(database.absolute().parent / "mlartifacts")] if database else [])


def serve(uri: str, *, port: int) -> None:
    """Shows a tracking store in the browser until Ctrl-C; one that is a server already is only named."""
    if uri.startswith(("http://", "https://")):
        sys.stderr.write(f"MLflow is served at {redact_text(uri)}\n")
        return
    check_tracking(uri)
    with contextlib.closing(socket.socket()) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as cause:
            raise TrackingError(f"port {port} is taken on this machine ({cause}): choose another") from cause
    sys.stderr.write(f"MLflow over {redact_text(uri)}\nopen http://127.0.0.1:{port} in a few seconds; Ctrl-C ends it\n")
    sys.stderr.flush()
    environment = {**MLFLOW_SETTINGS, **os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    os.execve(sys.executable, serve_command(uri, port=port), environment)  # noqa: S606 - this process becomes the server
