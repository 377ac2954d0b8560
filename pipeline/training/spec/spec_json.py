"""A training's specification as JSON and back, so that a bundle is enough to know what to replay.

Only plain values are written: nothing in a file decides which code runs, beyond the name of a task and a recipe known here.
A patch basis (target `pca`) is left out, because it lies in the training step's directory.
Errors: DataError for a task that is not known, or a value that this version does not accept."""

from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Any, TypeVar, get_type_hints

from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load

from mae_core.targets import PatchBasis
from pipeline.cluster.resources import Resources
from pipeline.data.dataset.address import DatasetAddress
from pipeline.data.feed.order import OrderConfig
from pipeline.errors import DataError
from pipeline.storage import Store
from pipeline.training.spec.probe_tasks import ProbeTask
from pipeline.training.spec.recipe import FinetuneRecipe, Recipe
from pipeline.training.spec.tasks import BASIS, ClassificationTask, MAETask
from pipeline.training.spec.train_spec import TrainSpec

TASKS: Mapping[str, type[MAETask] | type[ClassificationTask] | type[ProbeTask]] = {
    one.__name__: one for one in (MAETask, ClassificationTask, ProbeTask)
}
RECIPES: Mapping[str, type[Recipe]] = {one.__name__: one for one in (Recipe, FinetuneRecipe)}
Built = TypeVar("Built")


def as_json(spec: TrainSpec) -> dict[str, Any]:
    """Return JSON values, including the kinds of task and recipe."""
    # asdict does not descend into pydantic models, so the resources are dumped apart.
    body = asdict(replace(spec, task=_plain(spec.task))) | {"resources": spec.resources.model_dump(mode="json")}
    return body | {"kinds": [type(spec.task).__name__, type(spec.recipe).__name__]}


def from_json(body: Mapping[str, Any], root: Store) -> TrainSpec:
    """Return the specification; `root` is the training step's directory. Reads the JSON of older versions too."""
    task_kind, recipe_kind = body["kinds"]
    if task_kind not in TASKS or recipe_kind not in RECIPES:
        raise DataError(
            f"{root.uri}: {task_kind} with {recipe_kind} is not known to this version. Use the release that trained it"
        )
    task = _made(TASKS[task_kind], body["task"])
    if isinstance(task, MAETask) and task.model.target == "pca":
        task = replace(task, basis=PatchBasis(**load(root.read(BASIS))))
    return TrainSpec(
        task=task,
        recipe=_made(RECIPES[recipe_kind], body["recipe"]),
        order=_made(OrderConfig, body["order"]),
        image_size=tuple(body["image_size"]),
        dataset=_made(DatasetAddress, body["dataset"]),
        train_samples=body["train_samples"],
        evaluation_split=body["evaluation_split"],
        holds_out=body.get("holds_out", False),
        resources=_resources(body),
    )


def _resources(body: Mapping[str, Any]) -> Resources:
    """Return a bundle's resources; older bundles call them `placement` and hold only the fields that the loop reads."""
    try:
        return Resources.model_validate(body["resources"] if "resources" in body else body["placement"])
    except ValidationError as cause:
        raise DataError(f"a bundle's resources are not of this version: {cause.errors()[0]['msg']}") from cause


def _plain(task: Any) -> Any:
    return replace(task, basis=None) if isinstance(task, MAETask) else task


def _made(kind: type[Built], body: Mapping[str, Any]) -> Built:
    """Return a frozen dataclass from JSON values, checked field by field; the caller adds a basis."""
    hints = get_type_hints(kind)
    try:
        # Fields that an older bundle lacks take their defaults; those that this version has dropped are ignored.
        values = {
            one.name: TypeAdapter(hints[one.name]).validate_python(body[one.name])
            for one in fields(kind)  # type: ignore[arg-type]
            if one.name in body and one.name != "basis"
        }
    except ValidationError as cause:
        raise DataError(f"a bundle's {kind.__name__} is not of this version: {cause.errors()[0]['msg']}") from cause
    return kind(**values)
