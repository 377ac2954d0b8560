"""This process's connection to S3: one client, its settings, its patience, and what goes over it.

boto3's transfers and retries, with pauses of our own while a store is away; endpoint, region, addressing style and credentials come
from AWS's standard environment and files (docs/storage.md). Units: seconds, bytes. Errors: StorageError for an endpoint that is no
address."""

import logging
import os
import random
import re
import threading
import time
from collections.abc import Mapping
from typing import Any

import boto3
import botocore.session
from botocore.config import Config
from botocore.exceptions import EndpointConnectionError, HTTPClientError, SSLError

from pipeline.errors import StorageError
from pipeline.storage.store import Traffic

log = logging.getLogger(__name__)
_MAX_ATTEMPTS = 8
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 16.0
"""The pauses between the attempts of one request add up to 24 to 48 s: a store that restarts is waited for."""

_clients: dict[tuple[int, int], Any] = {}
_clients_lock = threading.Lock()


def client() -> Any:
    """One client a process and AWS environment: clients are thread-safe, but do not survive a fork."""
    settings = hash(frozenset(item for item in os.environ.items() if item[0].startswith("AWS_")))
    with _clients_lock:
        key = (os.getpid(), settings)
        if key not in _clients:
            _clients[key] = _new_client()
        return _clients[key]


def _new_client() -> Any:
    core = botocore.session.get_session()
    profile = core.get_scoped_config()
    services = core.full_config.get("services", {}).get(profile.get("services", ""), {})
    endpoint = endpoint_of(os.environ, profile, services)
    options = client_options(os.environ, profile, own_endpoint=endpoint is not None)
    try:
        client = boto3.session.Session(botocore_session=core).client("s3", config=Config(**options))
    except ValueError as error:  # how botocore says so
        raise StorageError(
            f"the endpoint {(endpoint or '').rpartition('@')[2]!r} is no address. "
            "Write AWS_ENDPOINT_URL as http://host:port or https://host"
        ) from error
    client.meta.events.register("before-send.s3", _count_request)
    waiting = _Waiting(client.meta.config.retries["total_max_attempts"])
    client.meta.events.register_first("needs-retry.s3", waiting.seconds_to_wait)
    return client


def endpoint_of(environment: Mapping[str, str], profile: Mapping[str, Any], services: Mapping[str, Any]) -> str | None:
    """The address that botocore will use instead of AWS's own, by its order of precedence; None for AWS."""
    if environment.get("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "").lower() == "true":
        return None
    return (
        environment.get("AWS_ENDPOINT_URL_S3")
        or environment.get("AWS_ENDPOINT_URL")
        or services.get("s3", {}).get("endpoint_url")
        or profile.get("endpoint_url")
    )


def client_options(environment: Mapping[str, str], profile: Mapping[str, Any], *, own_endpoint: bool) -> dict[str, Any]:
    """Ours where AWS's standard environment and profile say nothing: what is given to botocore would override them."""

    def said(variable: str, name: str) -> bool:
        return variable in environment or name in profile

    retries: dict[str, Any] = {}
    if not said("AWS_RETRY_MODE", "retry_mode"):
        retries["mode"] = "standard"
    if not said("AWS_MAX_ATTEMPTS", "max_attempts"):
        retries["total_max_attempts"] = _MAX_ATTEMPTS
    options: dict[str, Any] = {
        "retries": retries,
        "connect_timeout": 10,
        "read_timeout": 60,
        "max_pool_connections": 64,
    }
    if own_endpoint:  # not AWS itself: virtual hosts and the newer checksums are not everywhere
        if "addressing_style" not in profile.get("s3", {}):
            options["s3"] = {**profile.get("s3", {}), "addressing_style": "path"}
        if not said("AWS_REQUEST_CHECKSUM_CALCULATION", "request_checksum_calculation"):
            options["request_checksum_calculation"] = "when_required"
        if not said("AWS_RESPONSE_CHECKSUM_VALIDATION", "response_checksum_validation"):
            options["response_checksum_validation"] = "when_required"
    return options


def pause_s(attempt: int, max_attempts: int, share: float) -> float | None:
    """Seconds from the failure of an attempt (1, 2, ...) to the next; None: it was the last. `share` in [0, 1) spreads clients."""
    if attempt >= max_attempts:
        return None
    return min(_FIRST_PAUSE_S * 2.0 ** (attempt - 1), _LONGEST_PAUSE_S) * (1 + share) / 2


class _Waiting:
    """Pauses while a store is away or overloaded, from botocore's event `needs-retry`.

    botocore's own begin at 50 ms, and a client has 35 retries in all until something succeeds again (1.44): parallel transfers
    gave up within a second when a server was killed, and it takes longer than that to start again.
    """

    def __init__(self, max_attempts: int) -> None:
        self._max_attempts = max_attempts
        self._quiet_until = 0.0

    def seconds_to_wait(self, response: Any, attempts: int, caught_exception: Any, **_: Any) -> float | None:
        """None leaves the decision to botocore."""
        away = isinstance(caught_exception, (EndpointConnectionError, HTTPClientError))
        overloaded = response is not None and response[0].status_code in {429, 500, 502, 503, 504}
        if isinstance(caught_exception, SSLError) or not (away or overloaded):
            return None
        pause = pause_s(attempts, self._max_attempts, random.random())  # noqa: S311
        if pause is not None and attempts >= 3 and time.monotonic() > self._quiet_until:
            self._quiet_until = time.monotonic() + 30
            words = f"answers {response[0].status_code}" if overloaded else "does not answer"
            log.warning("the object store %s; attempt %d of %d follows", words, attempts + 1, self._max_attempts)
        return pause


class Meter:
    """Sums that many threads add to."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sums = Traffic(0, 0, 0)

    def add(self, *, requests: int = 0, bytes_received: int = 0, retries: int = 0) -> None:
        """Counts so many more."""
        with self._lock:
            more = Traffic(requests, bytes_received, retries)
            self._sums = Traffic(*(a + b for a, b in zip(self._sums, more, strict=True)))

    def read(self) -> Traffic:
        """What was counted so far."""
        return self._sums


meter = Meter()


def _count_request(request: Any, **_: Any) -> None:
    """botocore calls this before each attempt, whose number is in a header (`attempt=2; max=8`)."""
    sent = request.headers.get("amz-sdk-request", b"")
    attempt = re.search(rb"attempt=(\d+)", sent if isinstance(sent, bytes) else sent.encode())
    meter.add(requests=1, retries=int(attempt is not None and int(attempt[1]) > 1))


def count_received(count: int) -> None:
    """boto3 calls this as parts arrive; it takes back what it fetches again, which came over the network all the same."""
    meter.add(bytes_received=max(count, 0))
