"""The save action: hand state and position to the saver, which writes them while training goes on."""

import json
from dataclasses import dataclass

from pipeline.training.checkpoints.format import CheckpointManifest
from pipeline.training.checkpoints.position import Position
from pipeline.training.checkpoints.saver import Saver
from pipeline.training.meters.telemetry import TrainingMeter
from pipeline.training.spec.engines import AnyEngine
from pipeline.training.world import World


@dataclass(frozen=True, kw_only=True)
class Checkpointer:
    """Makes checkpoints of the engine."""

    world: World
    engine: AnyEngine
    saver: Saver
    meter: TrainingMeter
    cursor: dict[str, object]
    """What the position is bound to (`TrainSpec.cursor`)."""

    def save(self, position: Position) -> None:
        """Start a checkpoint of this position. Collective; waits for the previous checkpoint and for one copy of the state."""
        manifest = CheckpointManifest(
            global_step=position.global_step,
            optimizer_steps=self.engine.optimizer_steps,
            cursor=json.loads(json.dumps(self.cursor)),
            # These two are this rank's part; the saver sums them over the ranks before the commit.
            ids_digest=position.digest,
            ids_count=position.count,
            substitutions=tuple(position.substitutions),
            guard=position.guard,
            parameters=self.engine.shapes(),
            world_size=self.world.size,
            zero_stage=self.engine.settings.zero_stage,
        )
        with self.meter.saving():  # times only what training waits for: the previous save and one copy
            position.saved_key = self.saver.save(manifest, position.history)
        position.saved_at = position.global_step  # before the commit; `run` waits for it with `finish`
