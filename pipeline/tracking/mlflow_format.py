"""Convert values to what MLflow accepts: secrets hidden, nested configs flattened, names and values within its limits.

Pure functions. MLflow's limits: 1000 metrics or 100 parameters per call, 6000 characters per parameter value, 36 per
dataset digest."""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

METRICS_PER_CALL = 1000
PARAMS_PER_CALL = 100
PARAM_MAX_CHARS = 6000
TAG_MAX_CHARS = 8000
DIGEST_MAX_CHARS = 36

T = TypeVar("T")
_SECRET_KEY = re.compile(r"password|passwd|secret|token|accesskey|apikey|credential")
_USERINFO = re.compile(r"(?<=://)[^/\s?#]*@")
_SECRET_QUERY = re.compile(
    r"([?&][^=&\s]*(?:password|secret|token|access_?key|signature|credential)[^=&\s]*=)[^&\s]+", re.I
)
HIDDEN = "***"


def redact(value: Any, *, key: str = "") -> Any:
    """Return a copy of a config with its secrets replaced by `***`.

    Secrets are strings under keys such as `password` or `token`, and the user:password and signed query values of
    addresses. Numbers stay (`num_tokens: 196` is no secret), and so do empty strings, which mean "not set"."""
    if hasattr(value, "model_dump"):
        value = value.model_dump(mode="json")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): redact(v, key=f"{key}.{k}") for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact(item, key=key) for item in value]
    if value is None or isinstance(value, (bool, int, float)) or value == "":
        return value
    # access_key, access-key and `access key` alike
    secret = _SECRET_KEY.search(re.sub(r"[_\-\s]", "", key.lower()))
    return HIDDEN if secret else redact_text(str(value))


def redact_text(text: str) -> str:
    """Return a text in which the user, password and signed query values of addresses read `***`."""
    return _SECRET_QUERY.sub(rf"\1{HIDDEN}", _USERINFO.sub(f"{HIDDEN}@", text))


def flatten_params(config: Any, *, prefix: str = "") -> dict[str, str]:
    """Flatten a nested config: `{"a": {"b": [1, {"c": None}]}}` -> `{"a.b.0": "1", "a.b.1.c": "null"}`.

    A list without mappings stays one value."""
    if isinstance(config, Mapping):
        items = [(str(key), value) for key, value in config.items()]
    elif isinstance(config, (list, tuple)) and any(isinstance(item, Mapping) for item in config):
        items = [(str(index), value) for index, value in enumerate(config)]
    else:
        return {prefix: config if isinstance(config, str) else json.dumps(config, default=str)}
    flat: dict[str, str] = {}
    for key, value in items:
        flat |= flatten_params(value, prefix=f"{prefix}.{key}" if prefix else key)
    return flat


def short_digest(digest: str) -> str:
    """Return what fits of a digest into MLflow's 36 characters: a short one whole, else the first 32 hex digits of a SHA-256."""
    return digest if len(digest) <= DIGEST_MAX_CHARS else digest.removeprefix("sha256:")[:32]


def chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Yield consecutive slices of at most `size` items."""
    return (items[start : start + size] for start in range(0, len(items), size))


def mlflow_key(name: str) -> str:
    """Return a name as MLflow accepts it for a metric, parameter or tag."""
    return re.sub(r"[^\w\-. :/]", "_", name)[:200]


def mlflow_tags(tags: Mapping[str, str]) -> dict[str, str]:
    """Return tags as MLflow accepts them: without secrets in addresses, long values truncated."""
    return {mlflow_key(key): redact_text(str(value))[:TAG_MAX_CHARS] for key, value in tags.items()}
