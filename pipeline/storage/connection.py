"""This process's S3 client: its settings, its back-off between attempts, and a count of its traffic.

Transfers and retries are boto3's, with longer pauses while a store is away. Endpoint, region, addressing style and
credentials come from AWS's standard environment and files (docs/storage.md). Units: seconds, bytes.
Errors: WrongStoreAddress for settings that botocore refuses."""

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
from botocore.exceptions import (
    BotoCoreError,
    CredentialRetrievalError,
    EndpointConnectionError,
    HTTPClientError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
    SSLError,
)

from pipeline.errors import WrongStoreAddress
from pipeline.storage.error_messages import one_line
from pipeline.storage.traffic import traffic_meter

log = logging.getLogger(__name__)
_MAX_ATTEMPTS = 8
_FIRST_BACKOFF_S, _MAX_BACKOFF_S = 0.5, 16.0
"""The pauses of one request add up to 24 to 48 s, enough for a store to restart."""
_WARN_AFTER_S, _WARN_EVERY_S = 20.0, 30.0
_CONNECT_S, _READ_S = 10, 45
_FIRST_ANSWER_S = 30.0
"""Until the store has answered this process once, no attempt begins later than this. The longest one, of 10 + 45 s, is then the
first and only one, so a wrong address is reported within a minute; a store that has answered before is given more time."""
_TLS_TRIES = 3
_BEGAN = "mae_began"
_CREDENTIAL_ERRORS = (NoCredentialsError, PartialCredentialsError, CredentialRetrievalError, ProfileNotFound)

_clients: dict[tuple[int, int], Any] = {}
_clients_lock = threading.Lock()


def client() -> Any:
    """Return the S3 client of this process and AWS environment, made on first use.

    Clients are thread-safe but do not survive a fork, hence the process id in the key."""
    # a client keeps the settings it was made with; hashed, so that no secret is kept as a key
    settings = hash(frozenset(item for item in os.environ.items() if item[0].startswith("AWS_")))
    with _clients_lock:
        key = (os.getpid(), settings)
        if key not in _clients:
            _clients[key] = _new_client()
        return _clients[key]


def _new_client() -> Any:
    core = botocore.session.get_session()
    profile: Mapping[str, Any] = {}
    try:
        profile = core.get_scoped_config()
        # a profile may name a `services` section, whose endpoint comes before its own
        services = core.full_config.get("services", {}).get(profile.get("services", ""), {})
        endpoint = endpoint_of(os.environ, profile, services)
        options = client_options(os.environ, profile, own_endpoint=endpoint is not None)
        client = boto3.session.Session(botocore_session=core).client("s3", config=Config(**options))
    except _CREDENTIAL_ERRORS:
        raise  # s3_error_messages.py explains these
    except (ValueError, BotoCoreError) as error:
        raise WrongStoreAddress(refusal_of_settings(str(error), os.environ, profile)) from error
    client.meta.events.register("before-send.s3", _count_request)
    # first: botocore takes the first answer that is not None, and its own handler would answer
    backoff = _Backoff(client.meta.config.retries["total_max_attempts"])
    client.meta.events.register("before-call.s3", backoff.note_start)
    client.meta.events.register_first("needs-retry.s3", backoff.delay_s)
    return client


def refusal_of_settings(message: str, environment: Mapping[str, str], profile: Mapping[str, Any]) -> str:
    """Return one line that names the AWS settings at fault: those whose value is in botocore's message, or that are empty.

    botocore does not say which setting its ValueError is about, and a wrong region can look like a wrong endpoint."""
    settings = {name: value for name, value in environment.items() if name.startswith("AWS_")}
    settings |= {f"{name} in the AWS profile": value for name, value in profile.items() if isinstance(value, str)}
    # before anything is shown: these must not reach a log
    settings = {name: value for name, value in settings.items() if not re.search("(?i)secret|token|access_key", name)}
    # as a whole word: a region such as `eu` is part of many other words
    named = {n: v for n, v in settings.items() if v and re.search(rf"(?<!\w){re.escape(v)}(?!\w)", message)}
    named = named or {name: value for name, value in settings.items() if not value}
    for value in named.values():  # an endpoint may hold a password
        message = message.replace(value, value.rpartition("@")[2]) if value else message
    shown = [f"{name}={value.rpartition('@')[2]!r}" for name, value in named.items()]
    if any("endpoint_url" in name.lower() for name in named):
        way_out = f"{' or '.join(shown)} is not a URL. Set AWS_ENDPOINT_URL to http://host:port or https://host"
    elif shown:
        way_out = f"correct or unset {' or '.join(shown)}"
    else:
        way_out = "check the AWS_* variables and the AWS configuration file"
    return f"botocore refuses the AWS settings ({one_line(message)}): {way_out}"


def endpoint_of(environment: Mapping[str, str], profile: Mapping[str, Any], services: Mapping[str, Any]) -> str | None:
    """Return the endpoint that botocore will use, by its own order of precedence; None means AWS."""
    if environment.get("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "").lower() == "true":
        return None
    return (
        environment.get("AWS_ENDPOINT_URL_S3")
        or environment.get("AWS_ENDPOINT_URL")
        or services.get("s3", {}).get("endpoint_url")
        or profile.get("endpoint_url")
    )


def client_options(environment: Mapping[str, str], profile: Mapping[str, Any], *, own_endpoint: bool) -> dict[str, Any]:
    """Return our defaults for the options that neither AWS's environment nor the profile sets.

    Options passed to botocore take precedence over both, so whatever the user has set must be left out."""

    def is_set(variable: str, name: str) -> bool:
        return variable in environment or name in profile

    retries: dict[str, Any] = {}
    # standard: legacy, the default, retries fewer kinds of errors
    if not is_set("AWS_RETRY_MODE", "retry_mode"):
        retries["mode"] = "standard"
    if not is_set("AWS_MAX_ATTEMPTS", "max_attempts"):
        retries["total_max_attempts"] = _MAX_ATTEMPTS
    options: dict[str, Any] = {
        "retries": retries,
        "connect_timeout": _CONNECT_S,
        "read_timeout": _READ_S,
        # botocore's 10 are too few for a few transfers at once, each of which takes 8 (s3.py)
        "max_pool_connections": 64,
    }
    if own_endpoint:  # other stores often lack virtual hosts and the newer checksums
        if "addressing_style" not in profile.get("s3", {}):
            options["s3"] = {**profile.get("s3", {}), "addressing_style": "path"}
        if not is_set("AWS_REQUEST_CHECKSUM_CALCULATION", "request_checksum_calculation"):
            options["request_checksum_calculation"] = "when_required"
        if not is_set("AWS_RESPONSE_CHECKSUM_VALIDATION", "response_checksum_validation"):
            options["response_checksum_validation"] = "when_required"
    return options


def backoff_s(attempt: int, max_attempts: int, jitter: float) -> float | None:
    """Return the pause after a failed attempt (1, 2, ...), or None after the last one.

    The pause doubles from 0.5 s to 16 s; `jitter` in [0, 1) scales it by 0.5 to 1, so that clients do not retry in step."""
    if attempt >= max_attempts:
        return None
    return min(_FIRST_BACKOFF_S * 2.0 ** (attempt - 1), _MAX_BACKOFF_S) * (1 + jitter) / 2


class _Backoff:
    """Handler of botocore's `needs-retry` event: longer pauses while a store is away or overloaded.

    botocore's own pauses begin at 50 ms, and a client has 35 retries in all until something succeeds again (botocore 1.44).
    When a server was killed, parallel transfers used those up within a second, before it could restart.
    """

    def __init__(self, max_attempts: int) -> None:
        self._max_attempts = max_attempts
        self._answered = False
        self._silent_until = 0.0

    def note_start(self, params: dict[str, Any], **_: Any) -> None:
        """Note when a request began, in a context that botocore hands on to `delay_s`."""
        params["context"][_BEGAN] = time.monotonic()

    def delay_s(
        self,
        response: Any,
        attempts: int,
        caught_exception: Any,
        request_dict: Mapping[str, Any],
        endpoint: Any = None,
        **_: Any,
    ) -> float | None:
        """Return the seconds to wait before the next attempt, or None to leave the decision to botocore.

        Raises what the attempt raised when a store that has never answered is not to be asked again: botocore has no other
        way to say so."""
        # the first answer, even a refusal, proves that the address is right
        self._answered = self._answered or response is not None
        away = isinstance(caught_exception, (EndpointConnectionError, HTTPClientError))
        overloaded = response is not None and response[0].status_code in {429, 500, 502, 503, 504}
        if not (away or overloaded):
            return None
        elapsed = time.monotonic() - request_dict["context"].get(_BEGAN, time.monotonic())
        pause = backoff_s(attempts, self._max_attempts, random.random())  # noqa: S311
        if not self._answered and elapsed + (pause or 0.0) > _FIRST_ANSWER_S:
            raise caught_exception
        # a TLS failure usually means a wrong certificate or address, which does not get better by waiting
        if isinstance(caught_exception, SSLError):
            if attempts < _TLS_TRIES:
                return None
            raise caught_exception
        if pause is not None and (attempts >= 3 or elapsed > _WARN_AFTER_S) and time.monotonic() > self._silent_until:
            self._silent_until = time.monotonic() + _WARN_EVERY_S
            problem = f"answered {response[0].status_code}" if overloaded else "does not answer"
            address = one_line(getattr(endpoint, "host", ""))
            log.warning(
                "object store %s %s; retrying (attempt %d of %d)", address, problem, attempts + 1, self._max_attempts
            )
        return pause


def _count_request(request: Any, **_: Any) -> None:
    """Count one attempt; botocore calls this before it sends one, with its number in a header (`attempt=2; max=8`)."""
    header = request.headers.get("amz-sdk-request", b"")
    attempt = re.search(rb"attempt=(\d+)", header if isinstance(header, bytes) else header.encode())
    traffic_meter.add(requests=1, retries=int(attempt is not None and int(attempt[1]) > 1))


def count_received(count: int) -> None:
    """Count received bytes: boto3's progress callback.

    boto3 reports a negative count before it fetches a part again; those bytes crossed the network all the same."""
    traffic_meter.add(bytes_received=max(count, 0))
