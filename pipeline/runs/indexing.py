"""`mae shards index`: the snapshot and shard steps of WebDataset tars that already exist somewhere.

The tars stay as they are. A run with the same `data` and the same store finds these steps done,
because its fingerprints for them are the same. Errors: ConfigError for a source that holds anything
but tars, before anything is written."""

import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipeline.config import RunConfig, absolute_address, load_config
from pipeline.data.sources.listing import KINDS, list_source
from pipeline.errors import ConfigError


def index_config(source: str, overrides: Sequence[str], *, store: str | None) -> RunConfig:
    """Return the configuration under which tars are indexed. `store` None: the default store of a run."""
    config = source_config(source, overrides, store=store)
    _refuse_other_sources(config.data.source)
    return config


def source_config(source: str, overrides: Sequence[str], *, store: str | None = None) -> RunConfig:
    """Return a run's configuration as far as its shards depend on it; the model in it is never built."""
    document: dict[str, Any] = {"data": {"source": absolute_address(source)}, "model": {"size": "tiny"}}
    if store is not None:
        document["store"] = absolute_address(store)
    # through a file, because load_config reads, overrides and checks in one place
    with TemporaryDirectory() as folder:
        path = Path(folder) / "index.yaml"
        path.write_text(json.dumps(document))  # JSON is YAML
        return load_config(path, overrides)


def _refuse_other_sources(source: str) -> None:
    first = next((item for item in list_source(source) if item.role != "ignored"), None)
    if first is not None and first.role != "tar":
        raise ConfigError(
            f"{source} holds {KINDS[first.role]} ({first.path}), and only tars are indexed: `mae run` takes these in"
        )
