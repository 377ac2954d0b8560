"""`mae replay`: the bundle of a bad step found in a store, and its step computed again.

Errors: DataError when there is no bundle at the address, or none of the step asked for."""

from pipeline.errors import DataError
from pipeline.storage import Store, open_store
from pipeline.training.health.incidents import FOLDER, Bundle, read_bundle
from pipeline.training.health.replay import Replayed
from pipeline.training.health.replay import replay as replay_step
from pipeline.training.spec.spec_json import from_json

FIRST_RANK = "rank-0000.json"


def find_bundle(address: str, *, step: int | None) -> Bundle:
    """Return the bundle of a step at or below an address (a bundle, a training step's directory, a run's store).

    `step` None: the address itself if it is a bundle, else the last bad step. Lists everything
    below the address."""
    return read_bundle(_bundle_store(open_store(address), step))


def replay(bundle: Bundle, *, most_steps: int) -> Replayed:
    """Replay a bundle's step from the checkpoint before it, `most_steps` earlier at most. Prints where it begins."""
    root = open_store(bundle.root_uri)
    spec = from_json(bundle.note["specification"], root)
    return replay_step(bundle, root, spec, most_steps=most_steps, tell=print)


def _bundle_store(store: Store, step: int | None) -> Store:
    found = sorted(info.key.removesuffix(f"/{FIRST_RANK}") for info in store.list() if info.key.endswith(FIRST_RANK))
    if found == [FIRST_RANK] and step is None:
        return store
    bundles = [key for key in found if f"/{FOLDER}" in f"/{key}"]
    if not bundles:
        raise DataError(
            f"{store.uri}: no bundle of a bad step. Give a run's store, a training step's directory, or a bundle"
        )
    chosen = [key for key in bundles if step is None or _step_of(key) == step]
    if not chosen:
        steps = sorted({_step_of(key) for key in bundles})
        raise DataError(
            f"{store.uri}: no bundle of step {step}. There are bundles of steps {', '.join(map(str, steps))}"
        )
    return store.at(max(chosen, key=lambda key: (_step_of(key), key)))  # of several generations, the newest


def _step_of(key: str) -> int:
    return int(key.rpartition("-")[2])
