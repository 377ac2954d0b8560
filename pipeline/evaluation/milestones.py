"""Scores of an encoder while its pretraining runs: quick ones, on a fixed sample, that show whether it still gets better.

    held_out_loss   the MAE loss of held-out images under fixed masks, which no crop and no luck of a batch moves
    knn, ridge      accuracy of a vote of neighbours and of ridge classification, from labelled training images to held-out ones
    probe           accuracy of a linear probe between the same images, trained for a few epochs; only where they are asked for
    rankme          how many dimensions the features of the held-out images use; needs no labels

The sample is the same for every checkpoint and every run of a dataset: at most `images` in all, half of them to learn from if there
are labels. Without a held-out split, loss and rankme are of training images.
Errors: DataError for a sample that cannot be read."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from mae_core.classification.neighbours import nearest, votes
from mae_core.classification.rankme import rankme
from mae_core.classification.ridge import fit_ridge, ridge_scores
from mae_core.config import MAEConfig
from mae_core.mae import MaskedAutoencoder
from mae_core.patches import normalise_pixels
from mae_core.randomness import mask_noise
from mae_core.targets import PatchBasis
from pipeline.cluster.resources import Resources
from pipeline.data.dataset.address import DatasetAddress
from pipeline.data.dataset.manifest import Manifest
from pipeline.data.feed.batch import Batch
from pipeline.data.feed.selection import Selection, select
from pipeline.evaluation.features import Features, evaluation_loader, standardisation
from pipeline.evaluation.protocols.linear import LinearSettings, fit
from pipeline.storage import open_store
from pipeline.training.checkpoints.format import open_checkpoint
from pipeline.training.spec.recipe import fitting_warmup

SEED = 0
"""Of the sample and its masks: one for all runs, so that their curves can be compared."""
NEIGHBOURS, TEMPERATURE = 20, 0.07
PENALTIES = tuple(10.0**power for power in range(-2, 5))
PROBE_BATCH = 256
"""Images per update of the probe: the default of `linear` would give few images a single update per epoch."""


class _Encoded(NamedTuple):
    features: Tensor  # [n, D]
    labels: Tensor  # [n]
    losses: Tensor  # [n]


@dataclass(frozen=True, kw_only=True)
class MilestoneScores:
    """Scores checkpoints of a pretraining, in a task."""

    model: MAEConfig
    basis: PatchBasis | None
    """For target `pca`."""
    dataset: DatasetAddress
    images: int
    """The most images that are read, over all splits."""
    probe_epochs: int = 0
    """Epochs of the linear probe; 0 for none."""
    resources: Resources

    def __call__(self, root_uri: str, key: str, device: Literal["cuda", "cpu"]) -> dict[str, float]:
        """Return the scores of a checkpoint."""
        with open_checkpoint(open_store(root_uri), key) as checkpoint:
            weights = {name.removeprefix("model."): value for name, value in checkpoint.weights().items()}
        model = MaskedAutoencoder(self.model, generator=torch.Generator().manual_seed(SEED), basis=self.basis)
        model.load_state_dict(weights)
        model.eval().to(device)
        manifest = self.dataset.open()
        held_out = "test" if "test" in manifest.splits else "train"
        queries = self._encoded(model, sample(manifest, held_out, self.images // 2))
        scores = {"held_out_loss": float(queries.losses.mean()), "rankme": rankme(queries.features)}
        if held_out == "test" and len(manifest.classes) > 1:
            bank = self._encoded(model, sample(manifest, "train", self.images // 2))
            scores |= accuracies(
                _labelled(queries),
                _labelled(bank),
                num_classes=len(manifest.classes),
                probe_epochs=self.probe_epochs,
            )
        return scores

    def _encoded(self, model: MaskedAutoencoder, selection: Selection) -> _Encoded:
        """Return features, labels and losses of the selected images."""
        config, device = self.model.encoder, next(model.parameters()).device
        parts = []
        with torch.inference_mode():
            for batch in self._batches(selection):
                pixels = normalise_pixels(batch.images.to(device), mean=config.pixel_mean, std=config.pixel_std)
                ids = batch.sample_ids.numpy()
                # Epoch 0 for every checkpoint: each image keeps its mask.
                noise = torch.as_tensor(mask_noise(SEED, np.zeros_like(ids), ids, config.num_patches))
                loss = model(pixels, noise.to(device)).loss
                features = model.encoder.encode(pixels, pool="cls")
                parts.append(_Encoded(features.float().cpu(), batch.labels.clone(), loss.float().cpu()))
        return _Encoded(*(torch.cat(columns) for columns in zip(*parts, strict=True)))

    def _batches(self, selection: Selection) -> Iterator[Batch]:
        loader = evaluation_loader(selection, self.dataset, self.resources, image_size=self.model.encoder.image_size)
        with closing(loader.evaluation_batches(self.resources.micro_batch)) as batches:
            yield from batches


def accuracies(queries: _Encoded, bank: _Encoded, *, num_classes: int, probe_epochs: int) -> dict[str, float]:
    """Return top-1 of the neighbours' vote, ridge classification and the probe; nothing without labels on both sides."""
    found: dict[str, Tensor] = {}
    if len(queries.labels) and len(bank.labels) > 1:
        neighbours = nearest(queries.features, bank.features, bank.labels, count=NEIGHBOURS)
        found["knn"] = votes(neighbours, k=NEIGHBOURS, temperature=TEMPERATURE, num_classes=num_classes)
        ridge = fit_ridge(bank.features, bank.labels, num_classes=num_classes, penalties=PENALTIES)
        found["ridge"] = ridge_scores(ridge, queries.features)
        if probe_epochs:
            found["probe"] = _probed(queries.features, bank, num_classes=num_classes, epochs=probe_epochs)
    return {name: float((scores.argmax(dim=1) == queries.labels).double().mean()) for name, scores in found.items()}


def _probed(queries: Tensor, bank: _Encoded, *, num_classes: int, epochs: int) -> Tensor:
    """Return the logits [n, classes] of a linear probe that has learnt from the bank."""
    mean, deviation = standardisation(bank.features)
    settings = LinearSettings(
        epochs=epochs, batch=PROBE_BATCH, warmup_epochs=fitting_warmup(epochs, default=10.0, of_epochs=90)
    )
    learnt = Features((bank.features - mean) / deviation, bank.labels, torch.arange(len(bank.labels)))
    head = fit(learnt, settings, num_classes=num_classes, seed=SEED)
    with torch.inference_mode():
        return cast("Tensor", head((queries - mean) / deviation))


def _labelled(encoded: _Encoded) -> _Encoded:
    return _Encoded(*(column[encoded.labels >= 0] for column in encoded))


def sample(manifest: Manifest, split: str, count: int) -> Selection:
    """Return at most `count` images of a split: labelled ones, balanced over the classes, or, without labels, whole shards."""
    labelled = int(select(manifest, split, "labelled", seed=SEED).counts.sum())
    if labelled:
        return Selection.balanced(manifest, split, count=min(count, labelled), seed=SEED)
    return Selection.drawn(manifest, split, count=count, seed=SEED, by="shards")
