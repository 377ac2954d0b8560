"""What our Swift has beside Swift's own parts: atomic create-once, a cache in the process, its key, its log.

Swift loads these by name from its configuration (`paste.filter_factory`, `log_custom_handlers`). Everything here lives in ONE
proxy process: with more of them neither the locks nor the cache would hold.
"""

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

SECRET_VARIABLE = "MAE_LOCAL_S3_SECRET"  # noqa: S105 - the name of a variable
ACCESS_KEY = "local:mae"
"""ACCOUNT:USER, the form Swift wants."""
GUEST_KEY = "local:guest"
"""The same secret, and no right to anything: for seeing what `access denied` looks like."""
_CACHED_KEYS = 10_000

App = Callable[[dict[str, Any], Any], Iterable[bytes]]


def create_once(global_conf: Mapping[str, str], **local_conf: str) -> Callable[[App], App]:
    """Writes with `If-None-Match: *` go one at a time for a key, which makes them atomic, as on AWS.

    Swift looks for the old object when a PUT begins, so of two that overlap both may be told 200.
    """
    from eventlet.semaphore import Semaphore

    locks: dict[str, Semaphore] = {}
    users: dict[str, int] = {}

    def release(path: str) -> None:
        locks[path].release()
        users[path] -= 1
        if not users[path]:
            del locks[path], users[path]

    def drained(body: Iterable[bytes], path: str) -> Iterator[bytes]:
        try:  # the completion of a multipart upload works while its answer is sent
            yield from body
        finally:
            try:
                getattr(body, "close", lambda: None)()
            finally:
                release(path)

    def around(app: App) -> App:
        def answer(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
            if environ.get("HTTP_IF_NONE_MATCH") != "*" or environ["REQUEST_METHOD"] not in {"PUT", "POST"}:
                return app(environ, start_response)
            path = environ["PATH_INFO"]
            lock = locks.setdefault(path, Semaphore(1))
            users[path] = users.get(path, 0) + 1
            lock.acquire()
            try:
                return drained(app(environ, start_response), path)
            except BaseException:
                release(path)
                raise

        return answer

    return around


class LocalCache:
    """What Swift keeps in memcached, in a dict. Without it every request asks the account and the container server first."""

    def __init__(self) -> None:
        self._entries: dict[str, tuple[float, Any]] = {}

    def get(self, key: str, raise_on_error: bool = False) -> Any:  # noqa: FBT001, FBT002 - memcached's signature
        """The value, or None when there is none or it has run out."""
        ends, value = self._entries.get(key, (0.0, None))
        if ends and ends < time.time():
            self._entries.pop(key, None)
            return None
        return value

    def set(self, key: str, value: Any, **options: Any) -> None:
        """Keeps the value for `time` seconds; 0: until the cache is full."""
        if len(self._entries) > _CACHED_KEYS:
            self._entries.clear()
        seconds = options.get("time") or 0
        self._entries[key] = (time.time() + seconds if seconds else 0.0, value)

    def incr(self, key: str, delta: int = 1, **options: Any) -> int:
        """Adds, never below 0; the new value."""
        value = max(0, int(self.get(key) or 0) + int(delta))
        self.set(key, value, **options)
        return value

    def decr(self, key: str, delta: int = 1, **options: Any) -> int:
        """Subtracts, never below 0; the new value."""
        return self.incr(key, -int(delta), **options)

    def delete(self, key: str, **options: Any) -> None:
        """Forgets; absent is fine."""
        self._entries.pop(key, None)

    def set_multi(self, mapping: Mapping[str, Any], server_key: str, **options: Any) -> None:
        """`set` for each."""
        for key, value in mapping.items():
            self.set(key, value, **options)

    def get_multi(self, keys: Iterable[str], server_key: str, **options: Any) -> list[Any]:
        """`get` for each, in order."""
        return [self.get(key) for key in keys]


def local_cache(global_conf: Mapping[str, str], **local_conf: str) -> Callable[[App], App]:
    """Hands each request the process's LocalCache."""
    cache = LocalCache()

    def around(app: App) -> App:
        def answer(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
            environ["swift.cache"] = cache
            return app(environ, start_response)

        return answer

    return around


def two_users(global_conf: Mapping[str, str], **local_conf: str) -> Callable[[App], App]:
    """Swift's own check of keys, for ACCESS_KEY and GUEST_KEY; their secret comes from the environment, not from a file."""
    from swift.common.middleware import tempauth

    secret = os.environ[SECRET_VARIABLE]
    users = {ACCESS_KEY: f"{secret} .admin", GUEST_KEY: secret}
    options = {"user_" + name.replace(":", "_"): value for name, value in users.items()}
    made: Callable[[App], App] = tempauth.filter_factory(global_conf, **local_conf, **options)
    return made


def log_to_file(
    conf: Mapping[str, str],
    name: str,
    log_to_console: bool,  # noqa: FBT001 - Swift's signature
    log_route: str,
    fmt: str,
    logger: logging.Logger,
    adapted_logger: Any,
) -> None:
    """Replaces the machine's syslog, where tests have no business, by `log_file` of the configuration."""
    handler = logging.FileHandler(conf["log_file"])
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    for other in list(logger.handlers):
        logger.removeHandler(other)
        other.close()
    logger.addHandler(handler)
