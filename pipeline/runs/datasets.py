"""A finished dataset as people ask about it: found by a configuration or a directory, and verified as a whole.

`verify` reads every byte of every shard, as tasks; nothing is written. What is damaged is named with the objects to delete,
after which the same `mae run` makes these, and only these, anew: a shard that its row still names is not written
again, nor is a step that has its receipt run, so shard, row and receipt go together.
Errors: DataError when there is no finished dataset; StorageError when a store is down."""

from dataclasses import dataclass

from pipeline.cluster.tasks import Executor
from pipeline.config import RunConfig
from pipeline.data.dataset.address import DatasetAddress, dataset_address
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
        """Where manifest and shards lie."""
        return dataset_address(self.receipt.as_input(self.step_uri))

    @property
    def joined(self) -> bool:
        """Whether its shards lie in the steps of its parts."""
        return self.address.root_uri != self.step_uri


def datasets_of(config: RunConfig) -> list[FinishedDataset]:
    """The datasets of a run, that of pretraining first; those that are not made yet are left out."""
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
        raise DataError(f"{store.uri}: this configuration's shards are not made yet. `mae run` makes them")
    pretraining = next(step.inputs["shards"].name for step in steps if step.kind == "pretrain")
    return sorted(made, key=lambda dataset: dataset.receipt.step != pretraining)


def dataset_in(uri: str) -> FinishedDataset:
    """The dataset of the step whose directory this is."""
    root = open_store(uri)
    receipt = read_receipt(root)
    if receipt is None or receipt.kind not in {"shard", "join"}:
        found = f"the receipt of {receipt.step}" if receipt else "no receipt"
        raise DataError(
            f"{root.uri}: {found}, so this is no finished shard or join step. Give the directory of one (`mae plan CONFIG --json` "
            "names it), or the configuration"
        )
    return FinishedDataset(root.uri, receipt)


def make_datasets(config: RunConfig, *, executor: Executor, hooks: Hooks) -> list[Outcome]:
    """Runs the steps up to the datasets, as `mae run` would, and no other."""
    steps = [step for step in build(config) if step.kind in {"snapshot", "shard", "join"}]
    store = open_store(config.store)
    probe(store)
    return GraphRun(steps, store=store, executor=executor, hooks=hooks, parallel=config.resources.parallel_steps).walk()
