"""Weights at an address: a file or folder on this machine, objects of a bucket, or the directory of a finished step.

Errors: DataError if nothing is there; those of the store."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from pipeline.errors import DataError
from pipeline.graph.receipts import read_receipt
from pipeline.storage import Store, open_store
from pipeline.weights.own import CONFIG

_FETCHED = (".safetensors", ".bin", ".json", ".pth", ".pt", ".ckpt", ".tar")


@contextmanager
def weights_at(address: str) -> Iterator[Path]:
    """Yield the file or folder with the weights; what lies in a bucket is fetched into a temporary folder for as long."""
    store, name = _place(address)
    if (path := store.local_path(name) if name else store.local_path("x")) is not None:
        yield path if name else path.parent
        return
    with TemporaryDirectory(prefix="mae-weights-") as scratch:
        folder = Path(scratch)
        # our own weights are described by their neighbour
        neighbours = [CONFIG] if name and store.exists(CONFIG) else []
        for key in [name, *neighbours] if name else [key for key, _ in _objects(store)]:
            store.download(key, folder / key)
        yield folder / name if name else folder


def state_of(address: str) -> tuple[tuple[str, int, int], ...]:
    """Return names, sizes and times of the files there, without reading them: while these stay, so do the weights."""
    store, name = _place(address)
    keys = [name] if name else [key for key, _ in _objects(store)]
    sizes = dict(_objects(store)) if not name else {info.key: info.size for info in store.list(name)}
    times = {key: path.stat().st_mtime_ns for key in keys if (path := store.local_path(key))}
    return tuple((f"{store.uri}/{key}", sizes.get(key, 0), times.get(key, 0)) for key in keys)


def _place(address: str) -> tuple[Store, str]:
    """Return a store and the name of a file in it, or an empty name for the store's own folder."""
    whole = address.rstrip("/")
    folder, _, name = whole.rpartition("/")
    # a file first: no folder has its address
    if (
        name
        and not folder.endswith(":/")
        and (parent := open_store(folder or ("/" if "/" in whole else "."))).exists(name)
    ):
        return parent, name
    store = open_store(whole)
    if receipt := read_receipt(store):
        return receipt.as_input(store.uri).store, ""
    if next(_objects(store), None) is None:
        raise DataError(
            f"{address} does not exist or holds no files of weights: give a weight file, a folder with one, or the directory of a "
            "finished pretraining"
        )
    return store, ""


def _objects(store: Store) -> Iterator[tuple[str, int]]:
    """Yield name and size of what may belong to weights: files of the folder itself, not of those below it."""
    for info in store.list():
        if "/" not in info.key and info.key.endswith(_FETCHED):
            yield info.key, info.size
