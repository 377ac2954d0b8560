"""Runs as Ray jobs on a remote cluster, through the job API of its dashboard.

A job's id is `<run name>-<hash of its configuration>-<number>`, so that submitting a run twice does not start it twice.
`address` is that of the dashboard, such as http://head:8265.
Errors: PipelineError, in one line, if the cluster cannot be reached or refuses."""

import asyncio
import hashlib
import re
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import PipelineError

STOP_WITHIN_S = "120"
"""Seconds between SIGTERM and SIGKILL when a job is stopped: time for a checkpoint. Ray's default is 3."""


def submit_run(name: str, config_text: str, *, address: str) -> str:
    """Start `mae run` with a checked configuration as a Ray job and return its id, or that of the one already running."""
    stem = f"{name}-{hashlib.sha256(config_text.encode()).hexdigest()[:12]}"
    with _jobs(address) as client, tempfile.TemporaryDirectory(prefix="mae-submit-") as folder:
        earlier = [job for job in client.list_jobs() if (job.submission_id or "").startswith(f"{stem}-")]
        for job in earlier:
            if not job.status.is_terminal():
                return str(job.submission_id)
        (Path(folder) / "run.yaml").write_text(config_text)
        job = {
            "entrypoint": "mae run run.yaml --json || test $? -eq 4",  # exit code 4, done with a warning, is no failure
            # Ray takes each id once, even when its job has ended
            "submission_id": f"{stem}-{len(earlier) + 1}",
            "runtime_env": {"working_dir": folder, "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": STOP_WITHIN_S}},
            "metadata": {"run": name},
        }
        return _submitted(client, job, within_s=60.0)


def _submitted(client: Any, job: Mapping[str, Any], *, within_s: float) -> str:
    """Submit a job, trying again while a cluster that has just started has a dashboard but cannot run jobs yet."""
    deadline = time.monotonic() + within_s
    while True:
        try:
            return str(client.submit_job(**job))
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(1.0)


def job_status(job: str, *, address: str) -> dict[str, str]:
    """Return a job's id, status and message; the message of a failed one ends in the reason, from its log."""
    with _jobs(address) as client:
        info = client.get_job_info(job)
        return _row(info, client.get_job_logs(job) if info.status.value == "FAILED" else "")


def job_logs(job: str, *, address: str, until: Literal["now", "end"]) -> Iterator[str]:
    """Yield a job's output: what there is now, or everything as it comes until the job ends."""
    with _jobs(address) as client:
        if until == "now":
            yield str(client.get_job_logs(job))
            return
        client.get_job_info(job)  # raises for an unknown job; tailing its log would end silently
        lines = client.tail_job_logs(job)
        # the client's generator is asynchronous, and everything here is not
        loop = asyncio.new_event_loop()
        try:
            while True:
                yield str(loop.run_until_complete(anext(lines)))
        except StopAsyncIteration:
            return
        finally:
            loop.close()


def stop_job(job: str, *, address: str) -> dict[str, str]:
    """Ask a job to stop, wait until it has, and return its id, status and message."""
    with _jobs(address) as client:
        client.stop_job(job)
        while not (info := client.get_job_info(job)).status.is_terminal():
            time.sleep(0.5)
        return _row(info)


def list_runs(*, address: str) -> list[dict[str, str]]:
    """Return id, status and message of every job that the cluster remembers; a driver that was not submitted is no job."""
    with _jobs(address) as client:
        return [_row(job) for job in client.list_jobs() if job.submission_id]


def _row(job: Any, log: str = "") -> dict[str, str]:
    """`log`: the whole log; without it, the reason is sought in the few lines that the message ends in."""
    first, _, end_of_log = str(job.message or "").partition("\n")
    if reason := _reason((log or end_of_log).splitlines()):
        first = f"{first.partition(', last available logs')[0]}: {reason}"
    return {"job": str(job.submission_id), "status": str(job.status.value), "message": first}


def _reason(log: Sequence[str]) -> str:
    """Return the line of a failed run's log that says why: an error, else how a step ended, else the last one in words."""
    lines = [line.strip() for line in log if line.strip() and not line.startswith("{")]  # the result is a line of JSON
    said = (
        line
        for pattern in (r"mae: ", r"\S+: (failed|stopped)  .*  ", "")
        for line in lines[::-1]
        if re.match(pattern, line)
    )
    return next(said, "")


@contextmanager
def _jobs(address: str) -> Iterator[Any]:
    """A client of the cluster's job API, whose errors become one-line PipelineErrors."""
    import aiohttp
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    try:
        yield JobSubmissionClient(address)
    except AuthenticationError as cause:
        raise PipelineError(
            f"{address}: the cluster refuses the token. Set RAY_AUTH_TOKEN to the cluster's token and RAY_AUTH_MODE=token"
        ) from cause
    except (OSError, RuntimeError, ValueError, aiohttp.ClientError) as cause:
        lines = str(cause).strip().splitlines()
        first = (lines[0] if lines else type(cause).__name__).rstrip(".")
        unknown = "does not exist" in str(cause)
        hint = (
            "`mae job list` shows the existing ones"
            if unknown
            else "Is this the dashboard's address (http://head:8265)?"
        )
        raise PipelineError(f"{address}: {first}. {hint}") from cause
