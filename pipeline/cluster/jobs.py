"""The one importer of ray outside training/on_ray.py: connect, run plain functions as tasks, progress, jobs.

Coordinating code reserves 0 CPUs, so that two training workers fit on two cores. In executor `in_process` nothing of
Ray is imported.
Errors: PipelineError when a cluster cannot be reached; a task's own PipelineError comes out as itself."""

import asyncio
import hashlib
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import PipelineError

STOP_WITHIN_S = "120"
"""Between SIGTERM and SIGKILL when a job is stopped: time for a checkpoint. Ray's own is 3."""


def submit_run(name: str, config_text: str, *, address: str) -> str:
    """Starts `mae run` of a checked configuration as a Ray job; returns its id. One that is under way is not started again."""
    stem = f"{name}-{hashlib.sha256(config_text.encode()).hexdigest()[:12]}"
    with _jobs(address) as client, tempfile.TemporaryDirectory(prefix="mae-submit-") as folder:
        earlier = [job for job in client.list_jobs() if (job.submission_id or "").startswith(f"{stem}-")]
        for job in earlier:
            if not job.status.is_terminal():
                return str(job.submission_id)
        (Path(folder) / "run.yaml").write_text(config_text)
        job = {
            "entrypoint": "mae run run.yaml --json || test $? -eq 4",  # 4: done, with a warning
            "submission_id": f"{stem}-{len(earlier) + 1}",
            "runtime_env": {"working_dir": folder, "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": STOP_WITHIN_S}},
            "metadata": {"run": name},
        }
        return _submitted(client, job, within_s=60.0)


def _submitted(client: Any, job: Mapping[str, Any], *, within_s: float) -> str:
    """A cluster that has only just begun has a dashboard before it can take jobs: asks again until it can."""
    deadline = time.monotonic() + within_s
    while True:
        try:
            return str(client.submit_job(**job))
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(1.0)


def job_status(job: str, *, address: str) -> dict[str, str]:
    """Where a job stands."""
    with _jobs(address) as client:
        return _row(client.get_job_info(job))


def job_logs(job: str, *, address: str, until: Literal["now", "end"]) -> Iterator[str]:
    """A job's output, as it comes when followed."""
    with _jobs(address) as client:
        if until == "now":
            yield str(client.get_job_logs(job))
            return
        client.get_job_info(job)
        lines = client.tail_job_logs(job)
        loop = asyncio.new_event_loop()
        try:
            while True:
                yield str(loop.run_until_complete(anext(lines)))
        except StopAsyncIteration:
            return
        finally:
            loop.close()


def stop_job(job: str, *, address: str) -> dict[str, str]:
    """Asks a job to stop and waits until it has."""
    with _jobs(address) as client:
        client.stop_job(job)
        while not (info := client.get_job_info(job)).status.is_terminal():
            time.sleep(0.5)
        return _row(info)


def list_runs(*, address: str) -> list[dict[str, str]]:
    """All jobs the cluster remembers."""
    with _jobs(address) as client:
        return [_row(job) for job in client.list_jobs()]


def _row(job: Any) -> dict[str, str]:
    first, _, _ = str(job.message or "").partition("\n")  # what follows is the end of the log
    return {"job": str(job.submission_id), "status": str(job.status.value), "message": first}


@contextmanager
def _jobs(address: str) -> Iterator[Any]:
    """A client of the cluster's job API; what it refuses is one clear line."""
    import aiohttp
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    try:
        yield JobSubmissionClient(address)
    except AuthenticationError as cause:
        raise PipelineError(
            f"{address}: the cluster refuses the token: does RAY_AUTH_TOKEN hold the cluster's token, and is RAY_AUTH_MODE=token?"
        ) from cause
    except (OSError, RuntimeError, ValueError, aiohttp.ClientError) as cause:
        lines = str(cause).strip().splitlines()
        first = (lines[0] if lines else type(cause).__name__).rstrip(".")
        unknown = "does not exist" in str(cause)
        hint = (
            "`mae job list` names those there are" if unknown else "Is this the dashboard's address (http://head:8265)?"
        )
        raise PipelineError(f"{address}: {first}. {hint}") from cause
