"""Masked autoencoder pretraining: shards in, an encoder out (He et al. 2021, arXiv 2111.06377).

Output: encoder.safetensors, model.safetensors, config.json, basis.safetensors (only for target `pca`), history.jsonl, and
reconstructions.npz (images uint8 [N, 4, H, W, 3]: original, visible patches, reconstruction before training, and after;
sample_ids int64 [N]). Its images are the same in every run of a dataset, whatever its seed or image size.
Errors: those of training; DataError if there is nothing to train on."""

import io
import json
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from mae_core.config import MAEConfig
from mae_core.mae import MAEOutput, MaskedAutoencoder
from mae_core.patches import denormalise_pixels, normalise_pixels, patchify, unpatchify
from mae_core.randomness import mask_noise
from mae_core.targets import PatchBasis, patch_basis
from pipeline.data.dataset.address import dataset_address
from pipeline.data.dataset.facts import DatasetFacts
from pipeline.data.feed.order import OrderConfig
from pipeline.errors import DataError
from pipeline.evaluation.milestones import MilestoneScores
from pipeline.graph.step import Attempt, StageInput, StageResult
from pipeline.training.checkpoints.format import open_checkpoint
from pipeline.training.facts import PretrainFacts, incident_fields
from pipeline.training.launch import run_training
from pipeline.training.spec.tasks import BASIS, START, MAETask
from pipeline.training.spec.train_spec import PretrainConfig, TrainSpec
from pipeline.training.world import World
from pipeline.weights import starting_weights, write_weights

VERSION = 1
PANEL_IMAGES = 8
"""Images in reconstructions.npz."""
BASIS_IMAGES = 512
"""Images from whose patches target `pca` takes its components: at 224 px, 100,352 patches of 768 values each."""
MILESTONE_OPTIONS = MILESTONE_IMAGES, MILESTONE_PROBE_EPOCHS = "milestone_images", "milestone_probe_epochs"
"""Options of the step, as in the configuration: how checkpoints are scored along the way."""
START_ADDRESS, START_DECODER = "start", "start_decoder"
"""Options of the step: where the weights to start from are, and `pretrain.start_decoder`."""
HISTORY = "history.jsonl"
RECONSTRUCTIONS = "reconstructions.npz"


def pretrain(config: PretrainConfig, inputs: Mapping[str, StageInput], attempt: Attempt) -> StageResult:
    """Train the autoencoder and write its weights, history and reconstructions."""
    dataset = dataset_address(inputs["shards"])
    task = MAETask(model=config.model, weight_decay=config.recipe.weight_decay, seed=config.seed)
    if config.start_sha256:
        _import_start(config, attempt)
        task = replace(task, start_uri=attempt.root_uri)
    spec = TrainSpec(
        task=task,
        recipe=config.recipe,
        order=OrderConfig(seed=config.seed),
        image_size=config.model.encoder.image_size,
        dataset=dataset,
        train_samples="all",
        evaluation_split="",
        resources=attempt.resources,
        start=config.start,
    )
    if config.model.target == "pca":
        task = replace(task, basis=_basis(spec, config.model, attempt))
        spec = replace(spec, task=task)
    if images := attempt.options.get(MILESTONE_IMAGES, 0):
        scores = MilestoneScores(
            model=config.model,
            basis=task.basis,
            dataset=dataset,
            images=images,
            probe_epochs=attempt.options.get(MILESTONE_PROBE_EPOCHS, 0),
            resources=attempt.resources,
        )
        spec = replace(spec, milestones=scores)
    trained = run_training(spec, attempt)
    with open_checkpoint(attempt.root, trained.checkpoint_key) as checkpoint:
        weights = {name.removeprefix("model."): value for name, value in checkpoint.weights().items()}
        history, substitutions = checkpoint.history(), checkpoint.manifest.substitutions
        guard = checkpoint.manifest.guard
    files = write_weights(attempt.store, weights, config.model)
    attempt.store.write(HISTORY, "".join(json.dumps(row) + "\n" for row in history).encode())
    if task.basis:
        attempt.store.write(BASIS, save(task.basis._asdict()))
        files = (*files, BASIS)
    packed = io.BytesIO()
    ids, panel = _panel(config, spec, inputs["shards"], task, weights)
    np.savez(packed, images=panel, sample_ids=ids)
    attempt.store.write(RECONSTRUCTIONS, packed.getvalue())
    return StageResult(
        facts=PretrainFacts(
            global_step=trained.global_step,
            loss=trained.loss,
            ids_digest=str(trained.ids_digest),
            images_seen=(trained.global_step - guard.untrained_before(trained.global_step))
            * config.recipe.global_batch,
            dataset_digest=dataset.digest,
            **incident_fields(substitutions, guard),
        ).as_json(),
        files=(*files, RECONSTRUCTIONS),
        notes={"checkpoint": trained.checkpoint_key},
    )


def _import_start(config: PretrainConfig, attempt: Attempt) -> None:
    """Put the weights to start from into the step's directory. Later attempts, and workers elsewhere, need no more than these."""
    if attempt.root.exists(START):
        return
    address = attempt.options[START_ADDRESS]
    start = starting_weights(address, config.model, decoder=attempt.options[START_DECODER])
    if start.summary.sha256 != config.start_sha256:
        raise DataError(f"{address} changed while the run began: run the same command again")
    for line in start.summary.lines():
        attempt.progress.say(line)
    attempt.root.write(START, save(dict(start.weights)))


def _basis(spec: TrainSpec, model: MAEConfig, attempt: Attempt) -> PatchBasis:
    """The components of target `pca`. The first attempt computes them for all later ones, which must train on the same targets."""
    if not attempt.root.exists(BASIS):
        # as the only rank: the components must not depend on the number of workers
        single = World(0, 1, torch.device("cpu"), None)
        with closing(
            _here(spec)
            .loader(spec.dataset.open(), "train", single)
            .evaluation_batches(BASIS_IMAGES, unreadable="substitute")
        ) as batches:
            images = next(batches).images
        pixels = normalise_pixels(images, mean=model.encoder.pixel_mean, std=model.encoder.pixel_std)
        patches = patchify(pixels, model.encoder.patch_size).flatten(0, 1)
        attempt.root.create(BASIS, save(patch_basis(patches, components=model.pca_components)._asdict()))
    return PatchBasis(**load(attempt.root.read(BASIS)))  # read back: another attempt may have been quicker


def _here(spec: TrainSpec) -> TrainSpec:
    """Return the spec for reading a few images in this process."""
    return replace(spec, resources=spec.resources.model_copy(update={"decode_workers": 0}))


def _panel(
    config: PretrainConfig, spec: TrainSpec, shards: StageInput, task: MAETask, weights: Mapping[str, Tensor]
) -> "tuple[np.typing.NDArray[np.int64], np.typing.NDArray[np.uint8]]":
    """Sample ids int64 [N] and uint8 [N, 4, H, W, 3]: images, visible patches, and reconstructions before and after training.

    The images are the first of the split in the manifest's order, held out if any are: no seed enters, so runs can be compared."""
    split = DatasetFacts.read(shards.facts).panel_split
    single = World(0, 1, torch.device("cpu"), None)
    with closing(
        _here(spec).loader(spec.dataset.open(), split, single).evaluation_batches(PANEL_IMAGES, unreadable="substitute")
    ) as batches:
        batch = next(batches)
    encoder = config.model.encoder
    pixels = normalise_pixels(batch.images, mean=encoder.pixel_mean, std=encoder.pixel_std)
    ids = batch.sample_ids.numpy()
    # epoch 0: one fixed mask per image, so that the pictures of two runs can be compared
    noise = torch.as_tensor(mask_noise(config.seed, np.zeros_like(ids), ids, encoder.num_patches))
    model = task.build().module.get_submodule("model").eval()
    assert isinstance(model, MaskedAutoencoder)  # noqa: S101 - for the type checker
    with torch.inference_mode():
        before = model(pixels, noise)
        model.load_state_dict(dict(weights))
        after = model(pixels, noise)
    pictures = [
        pixels,
        _only_visible(pixels, after, encoder.patch_size, encoder.grid),
        model.reconstruct(pixels, before),
        model.reconstruct(pixels, after),
    ]
    shown = [denormalise_pixels(p, mean=encoder.pixel_mean, std=encoder.pixel_std).clamp(0, 1) for p in pictures]
    stacked = torch.stack(shown, dim=1).permute(0, 1, 3, 4, 2)  # [N, 4, H, W, C]
    return ids, (stacked * 255).round().to(torch.uint8).numpy()


def _only_visible(pixels: Tensor, output: MAEOutput, patch_size: int, grid: tuple[int, int]) -> Tensor:
    """Show hidden patches in the mean colour, which is zero after normalisation."""
    patches = patchify(pixels, patch_size) * (1 - output.masked.mask)[..., None]
    return unpatchify(patches, grid=grid, patch_size=patch_size)
