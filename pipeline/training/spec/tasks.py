"""What the loop trains: a Task defines the module, its parameter groups and its inputs. Masked autoencoding and classification.

A Task is a small frozen value that travels to the workers. Its module's forward takes what `inputs` makes of a batch and
returns per-sample losses, float32 [b]. All randomness is keyed by (seed, epoch, sample id), so it is the same at any world
size. Letters: b samples of a micro-batch, H x W pixels, C channels, L patches."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mae_core.classification.heads import Classifier, drop_path_scales, freeze_below
from mae_core.classification.metrics import TopK, best_classes, topk_counts
from mae_core.classification.mixing import MIX_UNIFORMS, mix_plan, mixed, mixed_labels
from mae_core.config import MAEConfig, ViTConfig
from mae_core.cost import classifier_training_flops, training_flops
from mae_core.losses import cross_entropy_per_sample
from mae_core.mae import MaskedAutoencoder
from mae_core.optimisation.parameter_groups import ParameterGroup, parameter_groups
from mae_core.patches import PixelScale
from mae_core.randomness import mask_noise, uniform_rows
from mae_core.targets import PatchBasis
from mae_core.vit import ViTEncoder, initialise
from pipeline.data.feed.batch import Batch, Int64s
from pipeline.storage import open_store
from pipeline.training.engine.plain_engine import MakeOptimizer
from pipeline.training.world import World
from pipeline.weights import read_encoder_as, read_weights

BASIS = "basis.safetensors"
"""The patch basis of target `pca`, in the training step's directory."""
START = "start.safetensors"
"""The imported weights that a pretraining starts from, in the training step's directory. What they lack is drawn from the seed."""


class Built(NamedTuple):
    """A module ready for the engine."""

    module: nn.Module
    groups: list[ParameterGroup]


class BuiltHeads(NamedTuple):
    """Small heads on a frozen encoder, for the plain engine."""

    module: nn.Module
    groups: list[ParameterGroup]
    optimizer: MakeOptimizer


class Task(Protocol):
    """What the loop needs to know of what it trains."""

    def build(self) -> Built | BuiltHeads:
        """Return the module with its initial weights, equal on every worker, and its optimiser groups."""
        ...

    def noise(self, epochs: Int64s, sample_ids: Int64s) -> npt.NDArray[np.float32]:
        """Return the random numbers of samples, [b, ...]; the feed puts them into its batches. No row depends on another."""
        ...

    def inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        """Return the arguments of the module's forward, each with first dimension b; the first is the images.

        They are tensors of the batch: what has to be computed is made by `noise`, outside the loop's thread.
        """
        ...

    def training_flops(self) -> int:
        """Return the FLOPs that the model needs to train on one image, without recomputation."""
        ...

    def evaluate(self, module: nn.Module, batches: Iterator[Batch], world: World) -> Mapping[str, Any]:
        """Return the scores of the trained module over all workers, or an empty mapping if there is nothing to score.

        They are plain JSON values, equal on every worker, but for tensors under `predicted`: what this rank predicts.
        """
        ...


class MAELosses(nn.Module):
    """Reconstruction loss per sample, from uint8 images and mask noise."""

    def __init__(self, model: MaskedAutoencoder) -> None:
        super().__init__()
        self.model = model
        self.scale = PixelScale(model.config.encoder.pixel_mean, model.config.encoder.pixel_std)

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        """images uint8 [b, H, W, C], noise [b, L] -> losses float32 [b].

        Pixels become float32 here, on the device, so that a quarter of the bytes are copied to it; targets stay float32.
        """
        return cast("Tensor", self.model(self.scale.normalise(images), noise).loss)


@dataclass(frozen=True, kw_only=True)
class MAETask:
    """Masked autoencoding (He et al. 2021, arXiv 2111.06377)."""

    model: MAEConfig
    weight_decay: float
    seed: int
    basis: PatchBasis | None = None
    """For target `pca`; None for the other targets."""
    start_uri: str = ""
    """Folder with the weights to start from, START; empty for initial weights."""

    def build(self) -> Built:
        """Return the autoencoder, initialised from the seed, with the weights to start from in place of those they replace."""
        generator = torch.Generator().manual_seed(self.seed)
        model = MaskedAutoencoder(self.model, generator=generator, basis=self.basis)
        if self.start_uri:
            model.load_state_dict({**model.state_dict(), **read_weights(open_store(self.start_uri), START)})
        return Built(MAELosses(model), parameter_groups(model, weight_decay=self.weight_decay))

    def noise(self, epochs: Int64s, sample_ids: Int64s) -> npt.NDArray[np.float32]:
        """Return each sample's own mask noise for its epoch, [b, L]."""
        # On the CPU and keyed by sample: a device's own generator would tie masks to rank and world size.
        return mask_noise(self.seed, epochs, sample_ids, self.model.encoder.num_patches)

    def inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        """Return the images and their mask noise."""
        return batch.images, batch.noise

    def training_flops(self) -> int:
        """Count the encoder on visible patches, the decoder and its head."""
        return training_flops(self.model)

    def evaluate(self, module: nn.Module, batches: Iterator[Batch], world: World) -> Mapping[str, Any]:
        """Return nothing: the quality of an encoder is measured by the evaluation stages."""
        return {}


class ClassifierLosses(nn.Module):
    """Cross entropy per sample, from uint8 images, labels and a task's noise; logits without labels."""

    def __init__(
        self,
        model: Classifier,
        config: ViTConfig,
        *,
        drop_path: float,
        label_smoothing: float,
        frozen_branches: int = 0,
    ) -> None:
        super().__init__()
        self.model = model
        self.scale = PixelScale(config.pixel_mean, config.pixel_std)
        self.depth = config.depth
        self.drop_path, self.label_smoothing, self.frozen_branches = drop_path, label_smoothing, frozen_branches

    def forward(self, images: Tensor, labels: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        """images uint8 [b, H, W, C], labels int64 [b], noise of `ClassificationTask` -> losses float32 [b], or logits
        [b, classes]."""
        pixels = self.scale.normalise(images)
        # Evaluation asks for logits; the same module serves both, so ZeRO-3 gathers its weights as in training.
        if labels is None or noise is None:
            return cast("Tensor", self.model(pixels))
        numbers = noise.flatten(1)
        branches, plan = numbers[:, : 2 * self.depth], numbers[:, 2 * self.depth :]
        if plan.shape[1]:
            pixels = mixed(pixels, plan)
            labels = mixed_labels(labels, plan, num_classes=self.model.head.out_features)
        scales = drop_path_scales(branches.reshape(-1, self.depth, 2), drop_path=self.drop_path)
        scales.view(len(scales), -1)[:, : self.frozen_branches] = 1.0  # frozen features are the same at every step
        logits = self.model(pixels, scales)
        return cross_entropy_per_sample(logits, labels, label_smoothing=self.label_smoothing)


def _with_gradient(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Make a block's tokens require a gradient, although nothing below the block takes it.

    Where no input of a block requires one, DeepSpeed's ZeRO-3 takes the block's backward pass for done as soon as its output has
    a gradient, and releases the weights that the pass is about to use.
    """
    tokens, *rest = inputs
    return (tokens.detach().requires_grad_() if torch.is_grad_enabled() else tokens, *rest)


@dataclass(frozen=True, kw_only=True)
class ClassificationTask:
    """Fine-tuning with layer-wise decay of the learning rate, of all weights or of those of the last blocks."""

    encoder: ViTConfig
    encoder_uri: str
    """Folder of a pretrained `encoder.safetensors`; empty for a randomly initialised encoder."""
    num_classes: int
    weight_decay: float
    layer_decay: float
    drop_path: float
    label_smoothing: float
    seed: int
    mixup: float = 0.0
    cutmix: float = 0.0
    trained_blocks: float | None = None
    """How many of the encoder's last blocks are trained; None for all of its weights."""

    def build(self) -> Built:
        """Return the encoder, pretrained or not, with a new head; both are initialised from the seed."""
        generator = torch.Generator().manual_seed(self.seed)
        encoder = ViTEncoder(self.encoder)
        # Even if weights are loaded next: the generator then draws the same head with and without them.
        initialise(encoder, generator=generator)
        if self.encoder_uri:
            encoder.load_state_dict(read_encoder_as(open_store(self.encoder_uri), self.encoder))
        model = Classifier(encoder, num_classes=self.num_classes, generator=generator)
        # Frozen parameters are in no group, so the engine holds no gradient and no state of them.
        frozen = 0 if self.trained_blocks is None else freeze_below(model, trained_blocks=self.trained_blocks)
        if 0 < frozen < 2 * self.encoder.depth:
            model.encoder.blocks[frozen // 2].register_forward_pre_hook(_with_gradient)
        groups = parameter_groups(
            model, weight_decay=self.weight_decay, layer_decay=self.layer_decay, depth=self.encoder.depth
        )
        losses = ClassifierLosses(
            model,
            self.encoder,
            drop_path=self.drop_path,
            label_smoothing=self.label_smoothing,
            frozen_branches=frozen,
        )
        return Built(losses, groups)

    def noise(self, epochs: Int64s, sample_ids: Int64s) -> npt.NDArray[np.float32]:
        """Return each sample's own drop path noise for its epoch, [b, depth, 2].

        With mixup or CutMix, [b, 2 * depth + PLAN]: the same, then how the pair is mixed whose first image the sample is.
        """
        depth = self.encoder.depth
        # One number for each of a block's two branches. In float32 it may round up to 1.0, which a comparison allows.
        uniforms = uniform_rows(self.seed, epochs, sample_ids, "drop_path", 2 * depth)
        branches = uniforms.astype(np.float32)
        if not (self.mixup or self.cutmix):
            return branches.reshape(-1, depth, 2)
        drawn = uniform_rows(self.seed, epochs, sample_ids, "mixup", MIX_UNIFORMS)
        plan = mix_plan(drawn, mixup=self.mixup, cutmix=self.cutmix, size=self.encoder.image_size)
        return np.concatenate([branches, plan], axis=1)

    def inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        """Return images, labels and noise."""
        return batch.images, batch.labels, batch.noise

    def training_flops(self) -> int:
        """Count the encoder on all patches and the head; branches that drop path drops are computed, so they count.

        Frozen blocks have no backward pass.
        """
        return classifier_training_flops(self.encoder, num_classes=self.num_classes, trained_blocks=self.trained_blocks)

    def evaluate(self, module: nn.Module, batches: Iterator[Batch], world: World) -> Mapping[str, Any]:
        """Return top-1 and top-5 accuracy and the mean loss: counts are summed over samples and workers, and divided once.

        `predicted` holds sample_ids and labels, int64 [n], and best, the five best classes of each labelled image, int64 [n, 5].
        """
        counts = TopK()
        predicted: list[tuple[Tensor, ...]] = []  # every rank has batches, if only of padding
        module.eval()
        with torch.inference_mode():
            for batch in batches:
                logits = module(batch.images.to(world.device)).cpu()
                counts += topk_counts(logits, batch.labels)
                real = batch.labels >= 0
                predicted.append((batch.sample_ids[real], batch.labels[real], best_classes(logits[real], 5)))
        module.train()
        # Sums and not means: ranks hold parts of different sizes, and padding counts on none.
        totals: Any = world.total([counts.correct_top1, counts.correct_top5, counts.count, counts.loss_sum])
        over_workers = TopK(
            correct_top1=int(totals[0]), correct_top5=int(totals[1]), count=int(totals[2]), loss_sum=totals[3]
        )
        columns = map(torch.cat, zip(*predicted, strict=True))
        return {
            "top1": over_workers.top1,
            "top5": over_workers.top5,
            "loss": over_workers.loss,
            "images": over_workers.count,
            "predicted": dict(zip(("sample_ids", "labels", "best"), columns, strict=True)),
        }
