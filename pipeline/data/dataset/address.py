"""Where a finished dataset and its shards are: all that a worker needs to open them."""

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.data.dataset.facts import DatasetFacts, SplitLabels
from pipeline.data.dataset.manifest import Manifest
from pipeline.graph.step import StageInput
from pipeline.storage import Store, open_store


@dataclass(frozen=True, kw_only=True)
class DatasetAddress:
    """Where the manifest and the shards of a finished shard or join step are."""

    manifest_uri: str
    root_uri: str
    """What the shards' keys are relative to."""
    digest: str
    """The manifest's: the identity of the dataset."""

    def open(self) -> Manifest:
        """Read the manifest."""
        return Manifest.open(open_store(self.manifest_uri), open_store(self.root_uri))


def dataset_address(shards: StageInput) -> DatasetAddress:
    """Return where a finished shard or join step left its dataset."""
    facts = DatasetFacts.read(shards.facts)
    # a join writes no shards: those of its parts are in other steps' directories, so keys start at the store's root
    root_uri = shards.root_uri.rpartition("/")[0] if facts.keys_from == "store" else shards.root_uri
    return DatasetAddress(manifest_uri=shards.store.uri, root_uri=root_uri, digest=facts.digest)


def labels_of(shards: StageInput) -> Mapping[str, SplitLabels]:
    """Return how the served images of each split are labelled; for receipts of older versions the manifest is read."""
    facts = DatasetFacts.read(shards.facts)
    if facts.labels is None:
        return dataset_address(shards).open().labels()
    return facts.labels


def is_indexed(key: str) -> bool:
    """Return whether a shard's key is the address of a tar that was indexed in place, rather than a key below the root."""
    return "://" in key


def locate_shard(root: Store, key: str) -> tuple[Store, str]:
    """Return the store that holds a shard, and the shard's key in that store."""
    if not is_indexed(key):
        return root, key
    folder, _, name = key.rpartition("/")
    return open_store(folder), name


def shard_address(root: Store, key: str) -> str:
    """Return a shard's address for messages."""
    return key if is_indexed(key) else f"{root.uri}/{key}"
