"""Features of a frozen encoder, computed once and shared by every protocol, seed and run of a store.

    <store>/features/<key>/part-0000-of-0012.safetensors    values float32 [n, D], labels int64 [n], sample_ids int64 [n]
    <store>/features/<key>/computed_from.json               what `mae store gc` asks: whether these still exist

The key covers the encoder (shape and weights), the dataset, the split, the chosen samples and the pooling, but neither the device
nor the number of tasks: both compute in float32, so that values differ by rounding only. Features are a cache, not an input of a
step: they change no fingerprint, and deleting the folder costs only time. Each part is written by the task that computed it, so
that an interrupted evaluation continues where it was.
Two steps that need the same features at the same time: one computes, and the other waits and reads. On different machines, or
after too long a wait, both may compute a part, and the later write replaces the earlier one with the same values.
Images are read as in any evaluation: each once, centre crop, no augmentation.
Errors: DataError for a sample or a part that cannot be read."""

import fcntl
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from mae_core.config import ViTConfig
from mae_core.patches import normalise_pixels
from mae_core.vit import ViTEncoder, pooled
from pipeline.cluster.device import local_gpu_count
from pipeline.cluster.progress import Progress
from pipeline.cluster.resources import Resources
from pipeline.cluster.tasks import ONE_CPU, map_tasks
from pipeline.data.dataset.address import DatasetAddress, dataset_address
from pipeline.data.dataset.digests import json_digest
from pipeline.data.dataset.manifest import MANIFEST_FILES
from pipeline.data.feed.loader import Loader
from pipeline.data.feed.order import OrderConfig, SampleOrder, plain_slice
from pipeline.data.feed.selection import Samples, Selection, select
from pipeline.data.images.pictures import AugmentConfig
from pipeline.errors import DataError
from pipeline.evaluation.encoders import EncoderSource, Pretrained, encoder_source
from pipeline.evaluation.protocol import ProtocolConfig
from pipeline.graph.step import Attempt, StageInput, canonical
from pipeline.storage import Store, open_store
from pipeline.training.spec.train_spec import node_cache
from pipeline.weights import ENCODER

FEATURES_VERSION = 1
"""Part of every key. Raise it when the computation changes, for example to another crop."""
FOLDER = "features/"
COMPUTED_FROM = "computed_from.json"
"""In a folder of features: the time, and the files of the store, the encoder's and the dataset's, from which they were computed."""
IMAGES_PER_TASK = 2048
"""Size of a part: 10 MiB at ViT-H's width, and little work to repeat if a task is lost."""
PARTS_PER_GPU_TASK = 16
"""Most parts of a task with a GPU. Its process ends with the task and takes seconds to start, longer than a part takes."""

WAIT_S = 3600.0
"""How long a step waits for another one that computes the same features, before it computes those that are missing itself."""
SAY_AFTER_S, POLL_S = 10.0, 0.2

Pool = Literal["cls", "mean"]
"""The feature of an image: its class token, or the mean of its patch tokens."""
TokenPool = Literal["cls", "mean", "mean of unnormalised"]
"""The same, and the mean of the patch tokens before the encoder's final norm, which some classifiers' heads read."""


class Features(NamedTuple):
    """Features of some images, in the plain order of the split."""

    values: Tensor  # [n, D] float32
    labels: Tensor  # [n] int64, index into the dataset's classes
    sample_ids: Tensor  # [n] int64


@dataclass(frozen=True, kw_only=True)
class FeatureRequest:
    """Which features: of which encoder, for which images."""

    encoder: EncoderSource
    dataset: DatasetAddress
    split: str
    samples: Samples
    seed: int
    """Decides which samples are chosen if `samples` is a number."""
    pool: TokenPool
    at_most: int | None = None
    """If given, of `all` samples only this many, drawn by the seed."""

    def selection(self) -> Selection:
        """Open the chosen samples."""
        if self.at_most is not None and self.samples == "all":
            return Selection.drawn(self.dataset.open(), self.split, count=self.at_most, seed=self.seed)
        return select(self.dataset.open(), self.split, self.samples, seed=self.seed)


def extract_splits(
    config: ProtocolConfig, inputs: Mapping[str, StageInput], attempt: Attempt, *, pool: Pool
) -> tuple[Features, Features]:
    """Return the features of an evaluation step: of the labelled images of `train` that it may learn from, and of all of the
    split that is scored."""

    def features(split: str, samples: Samples) -> Features:
        request = FeatureRequest(
            encoder=encoder_source(config, inputs),
            dataset=dataset_address(inputs["shards"]),
            split=split,
            samples=samples,
            seed=config.seed,
            pool=pool,
        )
        return extract_features(request, attempt)

    return features("train", config.train_labels or "labelled"), features(config.split, "all")


def standardisation(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the deviation [D] by which features [n, D] are standardised.

    The deviation is that of the biased variance, by which BatchNorm normalises a batch. Features that never vary are divided by
    1e-6 and stay at zero."""
    return features.mean(dim=0), features.std(dim=0, correction=0).clamp_min(1e-6)


def extract_features(request: FeatureRequest, attempt: Attempt) -> Features:
    """Return the features. Parts that the store lacks are computed first, as tasks."""
    selection = request.selection()
    total = int(selection.counts.sum())
    parts = max(1, -(-total // IMAGES_PER_TASK))  # rounded up; one empty part for an empty split
    run_store = open_store(attempt.root_uri.rpartition("/")[0])
    store = run_store.at(f"{FOLDER}{_key(request, selection)}")
    with _alone(store.uri, attempt.progress):
        # One listing instead of a request per part. Writes are atomic, so a part that is there is whole.
        present = {info.key for info in store.list()}
        if COMPUTED_FROM not in present:
            body = {"files": _computed_from(request, run_store), "time": time.time()}
            store.write(COMPUTED_FROM, json.dumps(body).encode())
        missing = [index for index in range(parts) if _part_name(index, parts) not in present]
        _compute_parts(request, attempt, store, missing, parts=parts, total=total)
    return _read_parts(store, parts=parts, total=total)


@contextmanager
def _alone(uri: str, progress: Progress) -> Iterator[None]:
    """Keep other processes of this machine from computing the same features meanwhile, but wait for none longer than WAIT_S.

    The kernel releases the lock of a process that is killed, so that nothing waits for a holder that is gone. Steps of one run
    are coordinated on one machine; beyond it, and after the wait, computing a part twice costs time only."""
    folder = Path(tempfile.gettempdir()) / f"mae-features-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / hashlib.sha256(uri.encode()).hexdigest()
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        holds_lock = _acquire(descriptor, uri, progress)
        yield
        if holds_lock:
            # Whoever waits still holds the old file, and the next comer makes another: both find all features there.
            path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)  # releases the lock


def _acquire(descriptor: int, uri: str, progress: Progress) -> bool:
    """Return whether the lock was free within WAIT_S. Polls, because only a signal could end a blocking flock."""
    began, said = time.monotonic(), False
    while True:
        with suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        waited = time.monotonic() - began
        if waited > WAIT_S:
            progress.say(
                f"another step has been computing the features in {uri} for {WAIT_S:g} s; not waiting any longer"
            )
            return False
        if waited > SAY_AFTER_S and not said:
            said = True
            progress.say(f"waiting up to {WAIT_S:g} s for another step that is computing the features in {uri}")
        time.sleep(POLL_S)


def _compute_parts(
    request: FeatureRequest, attempt: Attempt, store: Store, missing: Sequence[int], *, parts: int, total: int
) -> None:
    resources = attempt.resources
    on_gpu = resources.use_gpu is True
    done = total - sum(len(plain_slice(total, index, parts)) for index in missing)

    def on_done(_: int, images: int) -> None:
        nonlocal done
        done += images
        attempt.progress.update(done, total, unit=f"{request.split} images")

    # on GPUs a task for each worker, so that all GPUs are busy; on CPUs one for each part
    size = min(PARTS_PER_GPU_TASK, -(-len(missing) // resources.worker_range[1])) if on_gpu else 1
    tasks = [tuple(missing[start : start + size]) for start in range(0, len(missing), size or 1)]
    # Only numbers of images come back: features go through the store, not through Ray's object memory.
    map_tasks(
        partial(_write_parts, request, parts, store.uri, resources),
        tasks,
        executor=attempt.executor,
        need=resources.per_worker if on_gpu else ONE_CPU,
        on_done=on_done,
    )


def _read_parts(store: Store, *, parts: int, total: int) -> Features:
    """Return all parts as one, without a moment at which both are in memory."""
    first = _read_part(store, _part_name(0, parts))
    whole = Features(*(column.new_empty(total, *column.shape[1:]) for column in first))
    start = 0
    for index in range(parts):
        part = _read_part(store, _part_name(index, parts)) if index else first
        for column, values in zip(whole, part, strict=True):
            column[start : start + len(values)] = values
        start += len(part.labels)
    return whole


def _computed_from(request: FeatureRequest, store: Store) -> list[str]:
    """Return the keys of the files in the store that the features were computed from."""
    used = [f"{request.dataset.manifest_uri}/{MANIFEST_FILES[0]}"]
    if isinstance(request.encoder, Pretrained):
        used.append(f"{request.encoder.uri}/{ENCODER}")
    return [uri.removeprefix(f"{store.uri}/") for uri in used if uri.startswith(f"{store.uri}/")]


def _key(request: FeatureRequest, selection: Selection) -> str:
    encoder = request.encoder.load()
    # The ids themselves: `samples` and `seed` may name the same images in different ways.
    ids = [selection.rows(shard).sample_ids.tolist() for shard in range(len(selection.shards))]
    return json_digest(
        {
            "version": FEATURES_VERSION,
            # in addition to the weights: with another number of heads, equal weights compute other features
            "encoder": canonical(encoder.config),
            "weights": encoder.digest,
            "dataset": request.dataset.digest,
            "split": request.split,
            "samples": json_digest(ids),
            "pool": request.pool,
        }
    )


def _write_parts(
    request: FeatureRequest, parts: int, store_uri: str, resources: Resources, indices: Sequence[int]
) -> int:
    """Compute and write some parts. Returns their number of images."""
    encoder, selection, store = request.encoder.load(), request.selection(), open_store(store_uri)
    # not by what is visible: a run on the CPU leaves a GPU alone that others may be using
    on_gpu = resources.use_gpu is True and local_gpu_count() > 0
    device = torch.device("cuda" if on_gpu else "cpu")
    module, total, images = encoder.build().to(device), int(selection.counts.sum()), 0
    for index in indices:
        images += len(plain_slice(total, index, parts))
        if store.exists(_part_name(index, parts)):  # another machine was quicker, or this task is being repeated
            continue
        loader = evaluation_loader(
            selection,
            request.dataset,
            resources,
            image_size=encoder.config.image_size,
            part=(index, parts),
            decode_workers=resources.decode_processes if on_gpu else 0,  # a task on CPUs has one
            pin_memory=on_gpu,
        )
        features = _compute(module, loader, encoder.config, request.pool, batch=resources.micro_batch, device=device)
        content = save({key: value.contiguous() for key, value in features._asdict().items()})
        store.write(_part_name(index, parts), content)
    return images


def evaluation_loader(
    selection: Selection,
    dataset: DatasetAddress,
    resources: Resources,
    *,
    image_size: tuple[int, int],
    part: tuple[int, int] = (0, 1),
    decode_workers: int = 0,
    pin_memory: bool = False,
) -> Loader:
    """Return a reader of the selected samples, each cropped from the centre. `part`: (index, number) of those in plain order."""
    return Loader(
        selection,
        # No effect on evaluation_batches, which splits the plain order among the ranks: the order, global_batch and seed.
        SampleOrder(selection.counts, OrderConfig(seed=0)),
        global_batch=1,
        rank=part[0],
        world_size=part[1],
        # Features are cached for all epochs, so a random crop would be frozen in them.
        augment=AugmentConfig(kind="center", flip=False),
        image_size=image_size,
        seed=0,
        cache=node_cache(dataset, resources),
        decode_workers=decode_workers,
        pin_memory=pin_memory,
    )


def _compute(
    module: ViTEncoder, loader: Loader, config: ViTConfig, pool: TokenPool, *, batch: int, device: torch.device
) -> Features:
    def batches() -> Iterator[Features]:
        with closing(loader.evaluation_batches(batch)) as read:
            for one in read:
                images = one.images.to(device, non_blocking=True)
                pixels = normalise_pixels(images, mean=config.pixel_mean, std=config.pixel_std)
                values = _encode(module, pixels, pool)
                # .cpu() waits, so that the loader may use the batch's memory again
                yield Features(values.cpu(), one.labels.clone(), one.sample_ids.clone())

    # Gives the columns their types and shapes where a part has no images.
    nothing = Features(torch.empty(0, config.embed_dim), *(torch.empty(0, dtype=torch.int64) for _ in range(2)))
    with torch.inference_mode():
        return Features(*(torch.cat(columns) for columns in zip(nothing, *batches(), strict=True)))


def _encode(module: ViTEncoder, pixels: Tensor, pool: TokenPool) -> Tensor:
    if pool == "mean of unnormalised":
        return pooled(module.tokens(pixels), pool="mean", config=module.config)
    return module.encode(pixels, pool=pool)


def _part_name(index: int, parts: int) -> str:
    return f"part-{index:04d}-of-{parts:04d}.safetensors"


def _read_part(store: Store, name: str) -> Features:
    data = store.read(name)
    try:
        return Features(**load(data))
    except (SafetensorError, TypeError) as error:
        raise DataError(
            f"{store.uri}/{name}: cached features are damaged ({error}). Delete the file and run the same command again"
        ) from error
