"""Serve a tracking store to the browser."""

import contextlib
import os
import socket
import sys

from pipeline.errors import TrackingError
from pipeline.tracking.connection import MLFLOW_SETTINGS, artifact_location, check_tracking
from pipeline.tracking.database import sqlite_file
from pipeline.tracking.mlflow_format import redact_text


def serve_command(uri: str, *, port: int) -> list[str]:
    """Return the command that serves a local tracking store to this machine only, with artifacts beside the database."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", uri]
    return command + (["--artifacts-destination", str(artifact_location(uri))] if sqlite_file(uri) else [])


def serve(uri: str, *, port: int) -> None:
    """Serve a tracking store until Ctrl-C; if it is already a server, only print its address.

    Otherwise this process becomes the server. Errors: TrackingError for a port in use or an unusable store."""
    if uri.startswith(("http://", "https://")):
        sys.stderr.write(f"MLflow is already running at {redact_text(uri)}\n")
        return
    check_tracking(uri)
    with contextlib.closing(socket.socket()) as probe:
        # or a server that has just ended would count as one that still listens
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as cause:
            raise TrackingError(f"port {port} is already in use ({cause}): choose another --port") from cause
    sys.stderr.write(
        f"MLflow for {redact_text(uri)}\nopen http://127.0.0.1:{port} in a few seconds; stop it with Ctrl-C\n"
    )
    sys.stderr.flush()
    environment = {**MLFLOW_SETTINGS, **os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    os.execve(sys.executable, serve_command(uri, port=port), environment)  # noqa: S606 - this process becomes the server
