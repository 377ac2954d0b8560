"""`mae shards audit`: one training step, or all of a store, by `pipeline.training.checkpoints.audit`."""

from pipeline.errors import DataError
from pipeline.graph.receipts import claims
from pipeline.storage import open_store
from pipeline.training.checkpoints.audit import AuditResult, dataset_at, training_steps
from pipeline.training.checkpoints.audit import audit as audit_step


def audit(address: str, *, dataset: str | None) -> list[AuditResult]:
    """Audit the training step in a directory, or all of a run's store.

    `dataset`: the directory of the step that made the dataset; None: it is looked for in the same
    store. Raises DataError when there is no step to audit."""
    store = open_store(address)
    steps = [store] if claims(store) else [store.at(name) for name in training_steps(store)]
    if not steps:
        raise DataError(
            f"{store.uri}: no training step with a committed checkpoint. Give a run's store, or a step's directory"
        )
    given = dataset_at(open_store(dataset)) if dataset else None
    return [audit_step(step, dataset=given) for step in steps]
