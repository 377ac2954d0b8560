"""The log action: one row for the history, the tracker and the progress line."""

import logging
from dataclasses import dataclass

from pipeline.graph.step import Attempt
from pipeline.tracking import Tracker
from pipeline.training.checkpoints.position import Position
from pipeline.training.meters.milestones import Milestones
from pipeline.training.meters.slowness import SpeedWatch
from pipeline.training.meters.telemetry import TrainingMeter, as_metrics, milestone_columns, progress_fields
from pipeline.training.spec.recipe import Recipe
from pipeline.training.world import World

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StepLog:
    """Writes rows about the steps since the last row."""

    recipe: Recipe
    attempt: Attempt
    world: World
    tracker: Tracker
    meter: TrainingMeter
    total_steps: int
    samples_per_epoch: int
    speed: SpeedWatch
    milestones: Milestones

    def begin(self, position: Position) -> None:
        """Report, from rank 0, where the steps begin: from here on, a stop has something to save."""
        if self.world.is_first:
            batch = self.recipe.global_batch
            self.attempt.progress.update(position.global_step * batch, self.total_steps * batch, unit="images")

    def write(self, position: Position) -> None:
        """Log the row at this position. Collective: the row sums over all workers, and rank 0 writes it."""
        lr = self.recipe.learning_rate(position.global_step - 1, self.samples_per_epoch)  # of the step just taken
        row = self.meter.row(position, lr=lr)
        if self.world.is_first:
            row |= milestone_columns(self.milestones.take(), global_batch=self.recipe.global_batch)
            position.history.append(row)
            self.tracker.log(position.global_step, as_metrics(row))
            images = self.total_steps * self.recipe.global_batch
            shown = milestone_columns(self.milestones.latest, global_batch=self.recipe.global_batch)
            # From the row, not the position, so that the line agrees with MLflow.
            self.attempt.progress.update(int(row["images"]), images, unit="images", **progress_fields({**row, **shown}))
            if remark := self.speed.remark(row):
                log.warning("%s: %s", self.attempt.step_name, remark)
