"""Where a finished dataset is: the one thing that a worker needs to open it."""

from dataclasses import dataclass

from pipeline.data.dataset.facts import DatasetFacts
from pipeline.data.dataset.manifest import Manifest
from pipeline.graph.step import StageInput
from pipeline.storage import open_store


@dataclass(frozen=True, kw_only=True)
class DatasetAddress:
    """A finished shard step: where its manifest and its shards lie."""

    manifest_uri: str
    root_uri: str
    digest: str
    """The manifest's: the identity of the dataset."""

    def open(self) -> Manifest:
        """Reads the manifest."""
        return Manifest.open(open_store(self.manifest_uri), open_store(self.root_uri))


def dataset_address(shards: StageInput) -> DatasetAddress:
    """Where a finished shard step left its dataset; a join's shards lie in the steps of its parts, beside its own."""
    facts = DatasetFacts.read(shards.facts)
    root_uri = shards.root_uri.rpartition("/")[0] if facts.keys_from == "store" else shards.root_uri
    return DatasetAddress(manifest_uri=shards.store.uri, root_uri=root_uri, digest=facts.digest)
