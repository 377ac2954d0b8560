"""Our additions to Swift: atomic create-once, an in-process cache, authentication and logging.

Swift loads them by name from its configuration (`paste.filter_factory`, `log_custom_handlers`). The locks and the cache live
in memory, so there must be exactly ONE proxy process.
"""

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

SECRET_VARIABLE = "MAE_LOCAL_S3_SECRET"  # noqa: S105 - the name of a variable
ACCESS_KEY = "local:mae"
"""ACCOUNT:USER, the form that Swift requires."""
GUEST_KEY = "local:guest"
"""A user with the same secret and no permissions, for tests of `access denied`."""
_CACHED_KEYS = 10_000

App = Callable[[dict[str, Any], Any], Iterable[bytes]]


def create_once(global_conf: Mapping[str, str], **local_conf: str) -> Callable[[App], App]:
    """Serialise the writes with `If-None-Match: *` of each key, which makes them atomic, as on AWS.

    Plain Swift looks for an existing object when a PUT begins, so two overlapping PUTs may both get 200.
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
        try:  # Swift completes a multipart upload while it sends the answer, so the lock lasts until then
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
    """A dict in place of Swift's memcached. Without a cache, every request would first ask the account and container servers."""

    def __init__(self) -> None:
        self._entries: dict[str, tuple[float, Any]] = {}

    def get(self, key: str, raise_on_error: bool = False) -> Any:  # noqa: FBT001, FBT002 - memcached's signature
        """Return the value, or None if it is absent or has expired."""
        ends, value = self._entries.get(key, (0.0, None))
        if ends and ends < time.time():
            self._entries.pop(key, None)
            return None
        return value

    def set(self, key: str, value: Any, **options: Any) -> None:
        """Store the value for `time` seconds, or until the cache is full if that is 0."""
        if len(self._entries) > _CACHED_KEYS:
            self._entries.clear()
        seconds = options.get("time") or 0
        self._entries[key] = (time.time() + seconds if seconds else 0.0, value)

    def incr(self, key: str, delta: int = 1, **options: Any) -> int:
        """Add to a counter, but never below 0; return the new value."""
        value = max(0, int(self.get(key) or 0) + int(delta))
        self.set(key, value, **options)
        return value

    def decr(self, key: str, delta: int = 1, **options: Any) -> int:
        """Subtract from a counter, but never below 0; return the new value."""
        return self.incr(key, -int(delta), **options)

    def delete(self, key: str, **options: Any) -> None:
        """Delete the value, if there is one."""
        self._entries.pop(key, None)

    def set_multi(self, mapping: Mapping[str, Any], server_key: str, **options: Any) -> None:
        """Store each value."""
        for key, value in mapping.items():
            self.set(key, value, **options)

    def get_multi(self, keys: Iterable[str], server_key: str, **options: Any) -> list[Any]:
        """Return the values of the keys, in order."""
        return [self.get(key) for key in keys]


def local_cache(global_conf: Mapping[str, str], **local_conf: str) -> Callable[[App], App]:
    """Give each request the process's LocalCache."""
    cache = LocalCache()

    def around(app: App) -> App:
        def answer(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
            environ["swift.cache"] = cache
            return app(environ, start_response)

        return answer

    return around


def two_users(global_conf: Mapping[str, str], **local_conf: str) -> Callable[[App], App]:
    """Set up Swift's own authentication for ACCESS_KEY and GUEST_KEY, with the secret from the environment, not from a file."""
    from swift.common.middleware import tempauth

    secret = os.environ[SECRET_VARIABLE]
    users = {ACCESS_KEY: f"{secret} .admin", GUEST_KEY: secret}
    options = {"user_" + name.replace(":", "_"): value for name, value in users.items()}
    auth_filter: Callable[[App], App] = tempauth.filter_factory(global_conf, **local_conf, **options)
    return auth_filter


def log_to_file(
    conf: Mapping[str, str],
    name: str,
    log_to_console: bool,  # noqa: FBT001 - Swift's signature
    log_route: str,
    fmt: str,
    logger: logging.Logger,
    adapted_logger: Any,
) -> None:
    """Log to `log_file` of the configuration instead of the machine's syslog, which is none of a test's business."""
    handler = logging.FileHandler(conf["log_file"])
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    for other in list(logger.handlers):
        logger.removeHandler(other)
        other.close()
    logger.addHandler(handler)
