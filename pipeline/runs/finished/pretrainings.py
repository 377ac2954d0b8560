"""Find a pretraining by configuration, store or directory, and read its weights: the final ones or those of a checkpoint.

Errors: DataError if there is none or more than one; CheckpointError if the checkpoint that was asked for is not kept."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter
from torch import Tensor

from mae_core.config import MAEConfig
from pipeline.config import RunConfig
from pipeline.errors import CheckpointError, ConfigError, DataError
from pipeline.graph.receipts import claims, finished_steps, read_receipt
from pipeline.graph.step import Step
from pipeline.runs.workflow import build
from pipeline.storage import Store, open_store
from pipeline.training.checkpoints.format import committed, open_checkpoint, step_of
from pipeline.weights import MODEL, read_weights


@dataclass(frozen=True)
class Pretraining:
    """A pretraining step, finished or not."""

    root: Store
    model: MAEConfig
    identity: Mapping[str, Any]
    """What its fingerprint covers."""
    fingerprint: str

    def weights(self, at: int | None) -> dict[str, Tensor]:
        """Return the weights at training step `at`, or the final ones if it is None: float32, by names of MaskedAutoencoder."""
        if at is not None:
            return checkpoint_weights(self.root, checkpoint_at(self.root, at))
        receipt = read_receipt(self.root)
        if receipt is None:
            raise DataError(f"{self.root.uri}: not finished. Choose a checkpoint with --at: {_kept(self.root)}")
        return read_weights(receipt.as_input(self.root.uri).store, MODEL)


def pretrain_step(config: RunConfig) -> Step:
    """Return the pretraining step of a run."""
    if config.weights:
        raise ConfigError(
            f"weights={config.weights.file}: weights from elsewhere are evaluated, and nothing is pretrained"
        )
    return next(step for step in build(config) if step.kind == "pretrain")


def pretraining_of(config: RunConfig) -> Pretraining:
    """Return the pretraining of a configuration."""
    step = pretrain_step(config)
    return Pretraining(open_store(config.store).at(step.directory), config.model, step.identity(), step.fingerprint)


def pretraining_at(address: str) -> Pretraining:
    """Return the pretraining in a step's directory, or the only finished one of a store."""
    store = open_store(address)
    # a step's directory has claims, a run's store has none of its own
    if not claims(store):
        folders = {directory for directory, receipt in finished_steps(store) if receipt.kind == "pretrain"}
        if len(folders) != 1:
            found = f"several pretrainings: {', '.join(sorted(folders))}" if folders else "no finished pretraining"
            raise DataError(f"{store.uri} holds {found}. Give the YAML file of a run, or the directory of one step")
        store = store.at(folders.pop())
    receipt = read_receipt(store)
    if receipt is None or receipt.kind != "pretrain":
        what = f"a {receipt.step} step" if receipt else "a step that is not finished, so its model is unknown"
        raise DataError(f"{store.uri} is {what}. Give the YAML file of the run instead")
    model = TypeAdapter(MAEConfig).validate_python(receipt.identity["config"]["model"])
    return Pretraining(store, model, receipt.identity, receipt.fingerprint)


def checkpoint_at(root: Store, step: int) -> str:
    """Return the key of the committed checkpoint of a training step."""
    for key in committed(root):
        if step_of(key) == step:
            return key
    raise CheckpointError(f"{root.uri}: no checkpoint of step {step} is kept. Available: {_kept(root)}")


def checkpoint_weights(root: Store, key: str) -> dict[str, Tensor]:
    """Return the weights of a checkpoint, verified, by the names of MaskedAutoencoder."""
    with open_checkpoint(root, key) as checkpoint:
        return {name.removeprefix("model."): value for name, value in checkpoint.weights().items()}


def _kept(root: Store) -> str:
    steps = sorted(step_of(key) for key in committed(root))
    return ", ".join(map(str, steps)) or "none (resources.keep_every_steps would keep some)"
