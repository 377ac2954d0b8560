"""Find the finished datasets of a configuration or in a step's directory, and make them without the rest of a run.

Errors: DataError when there is no finished dataset; StorageError when a store is down."""

from dataclasses import dataclass

from pipeline.cluster.tasks import Executor
from pipeline.config import RunConfig
from pipeline.data.dataset.address import DatasetAddress, dataset_address
from pipeline.data.dataset.facts import DatasetFacts
from pipeline.errors import DataError
from pipeline.graph.receipts import Receipt, read_receipt
from pipeline.graph.runner import GraphRun, Hooks, Outcome
from pipeline.runs.workflow import build
from pipeline.storage import open_store, probe


@dataclass(frozen=True)
class FinishedDataset:
    """A shard or join step that has its receipt."""

    step_uri: str
    receipt: Receipt

    @property
    def address(self) -> DatasetAddress:
        """Where the manifest and the shards are."""
        return dataset_address(self.receipt.as_input(self.step_uri))

    @property
    def facts(self) -> DatasetFacts:
        """What its step said of it."""
        return DatasetFacts.read(self.receipt.facts)

    @property
    def joined(self) -> bool:
        """Whether its shards are in the directories of its parts' steps rather than in its own."""
        return self.address.root_uri != self.step_uri


def datasets_of(config: RunConfig) -> list[FinishedDataset]:
    """Return the finished datasets of a run, that of pretraining first."""
    steps = build(config)
    parts = {part.name for step in steps if step.kind == "join" for part in step.inputs.values()}
    store = open_store(config.store)
    made = []
    for step in steps:
        if step.kind in {"shard", "join"} and step.name not in parts:
            root = store.at(step.directory)
            receipt = read_receipt(root)
            made += [FinishedDataset(root.uri, receipt)] if receipt else []
    if not made:
        raise DataError(f"{store.uri}: the shards of this configuration do not exist yet. `mae run` makes them")
    pretraining = next((step.inputs["shards"].name for step in steps if step.kind == "pretrain"), "")
    return sorted(made, key=lambda dataset: dataset.receipt.step != pretraining)


def dataset_in(uri: str) -> FinishedDataset:
    """Return the dataset of the step whose directory this is."""
    root = open_store(uri)
    receipt = read_receipt(root)
    if receipt is None or receipt.kind not in {"shard", "join"}:
        found = f"the receipt is of {receipt.step}" if receipt else "there is no receipt"
        raise DataError(
            f"{root.uri}: {found}, so this is not a finished shard or join step. Give the directory of one (`mae plan CONFIG "
            "--json` names it), or the configuration"
        )
    return FinishedDataset(root.uri, receipt)


def make_datasets(config: RunConfig, *, executor: Executor, hooks: Hooks) -> list[Outcome]:
    """Run the steps up to the datasets, as `mae run` would, and no others."""
    steps = [step for step in build(config) if step.kind in {"snapshot", "shard", "join"}]
    store = open_store(config.store)
    probe(store)
    parallel = config.resources.parallel_steps
    return GraphRun(
        steps, store=store, executor=executor, hooks=hooks, parallel=1 if parallel == "auto" else parallel
    ).walk()
