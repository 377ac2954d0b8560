"""Which engine trains what a Task has built."""

from pipeline.training.engine.deepspeed_engine import Engine
from pipeline.training.engine.plain_engine import PlainEngine
from pipeline.training.engine.settings import EngineSettings
from pipeline.training.spec.tasks import Built, BuiltHeads
from pipeline.training.world import World

AnyEngine = Engine | PlainEngine


def engine_for(built: Built | BuiltHeads, settings: EngineSettings, world: World) -> AnyEngine:
    """Return the plain engine for heads on a frozen encoder, and DeepSpeed's for all else. Collective."""
    if isinstance(built, BuiltHeads):
        return PlainEngine(built.module, built.groups, built.optimizer, settings, world)
    return Engine(built.module, built.groups, settings, world)
