"""What a snapshot step lists."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.data.sources.listing import MOVED
from pipeline.data.sources.splits import SplitFrom
from pipeline.errors import ConfigError
from pipeline.graph.step import ADDED_LATER


@dataclass(frozen=True, kw_only=True)
class SnapshotConfig:
    """What is listed, and how a pool is split."""

    source: str
    """Folder or s3:// prefix of images, tars or Parquet tables."""
    snapshot: str = "1"
    """Name of the listing. A new name lists a changed source again."""
    test_share: float
    """Share of the images held out as `test` if the source has no splits, in [0, 1)."""
    seed: int
    """Key of the hash that selects them."""
    labels: str | None = field(default=None, metadata=ADDED_LATER)
    """File with labels and splits of a folder of images (`sources/labels.py`); None: folders are the labels."""
    image_column: str = field(default="image", metadata=ADDED_LATER)
    """Tables only: bytes, or Hugging Face's struct of bytes and path."""
    label_column: str | None = field(default="label", metadata=ADDED_LATER)
    """Tables only: whole numbers or text; None: no labels."""
    split_column: str | None = field(default=None, metadata=ADDED_LATER)
    """Tables only: train, val or test."""
    split_from: SplitFrom | None = field(default=None, metadata=ADDED_LATER)
    """What decides the split; None: a column if there is one, else the names of folders and files, else the keyed hash."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.test_share < 1.0:
            raise ConfigError(f"test_share={self.test_share} is not in [0, 1): write 0.1 for 10 %")


def where_it_is(config: SnapshotConfig, options: Mapping[str, Any]) -> SnapshotConfig:
    """Return the configuration with the addresses at which the files are now, given the step's options."""
    return replace(config, **options.get(MOVED, {}))
