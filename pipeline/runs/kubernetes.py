"""`mae job submit --kubernetes --dry-run`: a configuration checked for pods, which share no disk and hold no secret of ours.

Errors: ConfigError for a folder where pods need a bucket or a server, and for a secret that would be written out."""

from collections.abc import Iterator, Mapping

from pipeline.cluster.connection import FORWARDED_VARIABLES
from pipeline.cluster.kubernetes import Pods, rendered
from pipeline.config import RunConfig
from pipeline.errors import ConfigError
from pipeline.runs.submission import resolved_document
from pipeline.tracking import redact_text
from pipeline.tracking.mlflow_format import flatten_params

TRAVELLING = tuple(name for name in FORWARDED_VARIABLES if name != "OMP_NUM_THREADS")
"""Addresses and the region. How many threads suit this machine says nothing about the pods."""
SECRET = "mae-credentials"  # noqa: S105 - its name
"""The Secret whose entries are environment variables of the pods."""


def manifest(config: RunConfig, *, pods: Pods, environment: Mapping[str, str]) -> str:
    """Return the YAML for `kubectl apply`. Of `environment`, variables that workers need and that are no secrets go along."""
    document = resolved_document(config)
    settings = {name: environment[name] for name in TRAVELLING if environment.get(name)}
    for field, address in _local(config, settings):
        raise ConfigError(
            f"{field} = {address} is on this machine, and pods share no disk with it: write {_instead(field)}"
        )
    for field, value in flatten_params({**document, **settings}).items():
        if redact_text(value) != value:
            raise ConfigError(
                f"{field} holds a password or key, which would stand in a ConfigMap for all to read. Leave it out here and "
                f"put it into the Secret {SECRET}; docs/kubernetes.md says how"
            )
    return rendered(config.name, document, config.resources, pods=pods, settings=settings)


def _local(config: RunConfig, settings: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield each field whose address only this machine knows."""
    buckets = {
        "store": config.store,
        "data.source": config.data.source,
        "data.labels": config.data.labels,
        "pretrain.start": config.pretrain.start,
    }
    yield from ((field, address) for field, address in buckets.items() if address and not address.startswith("s3://"))
    tracked = config.tracking.uri or settings.get("MLFLOW_TRACKING_URI", "")
    if tracked.startswith("sqlite"):
        yield "tracking.uri", tracked


def _instead(field: str) -> str:
    return "the address of an MLflow server" if field == "tracking.uri" else "s3://bucket/path"
