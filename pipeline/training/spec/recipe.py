"""How a task is optimised: batch size, schedule, optimiser, precision, augmentation, guard.

A recipe decides results, so all of it enters the fingerprint; a field that is added later stays out of it at its default
(ADDED_LATER). Units: epochs, steps and images; learning rates are per global batch of 256 (`base_lr`) or absolute.
Errors: ConfigError names the field, its value and what to write."""

from dataclasses import dataclass, field, fields
from functools import partial
from typing import Literal

from mae_core.config import ADDED_LATER
from mae_core.optimisation.schedules import scaled_lr, warmup_cosine, warmup_stable_decay
from pipeline.data.images.pictures import AugmentConfig
from pipeline.errors import ConfigError
from pipeline.training.guard import GuardConfig


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a task is optimised. Defaults are MAE's for pretraining (arXiv 2111.06377, table 8)."""

    global_batch: int = 4096
    """Samples per optimiser step, over all workers; micro-batch and accumulation are derived."""
    epochs: int = 800
    """How often every training image is seen."""
    base_lr: float = 1.5e-4
    """Learning rate at a global batch of 256; the absolute rate is base_lr * global_batch / 256."""
    warmup_epochs: float = 40.0
    """Epochs over which the learning rate rises from zero to its peak. A default that is not shorter than the epochs becomes the
    same share of them."""
    schedule: Literal["cosine", "warmup_stable_decay"] = field(default="cosine", metadata=ADDED_LATER)
    """After the warmup: half a cosine, or constant and then falling over the last `decay_share`."""
    decay_share: float = field(default=0.2, metadata=ADDED_LATER)
    """Share of the epochs over which `warmup_stable_decay` falls; `cosine` ignores it."""
    min_lr: float = 0.0
    """Absolute learning rate at the end."""
    weight_decay: float = 0.05
    """AdamW's, for matrices; biases, norms and tokens do not decay."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of its two moments."""
    max_grad_norm: float | None = field(default=None, metadata=ADDED_LATER)
    """Gradients whose norm over all parameters exceeds this are scaled down to it; null, as in the paper, for no clipping."""
    precision: Literal["bf16", "fp32", "tf32"] = "bf16"
    """What the model computes in; targets, softmax and loss are always float32. `tf32` is `fp32` whose matrix products a GPU rounds
    to 10 bits of mantissa before it multiplies, for several times the speed; on a CPU it is `fp32`."""
    gradient_precision: Literal["bf16", "fp32"] | None = field(default=None, metadata=ADDED_LATER)
    """What gradients are summed in, over micro-batches and over workers: null for the same as `precision`. fp32 beside
    `precision: bf16` does not round the sums; it takes 2 bytes more per weight, spread over the workers, and twice the traffic."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """How a training picture is cut out of a stored image."""
    guard: GuardConfig = field(default=GuardConfig(), metadata=ADDED_LATER)
    """When a step is skipped, rolled back, or ends the training."""

    def __post_init__(self) -> None:
        for name in ("global_batch", "epochs", "base_lr"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)} is not positive: write a number above 0")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ConfigError(f"max_grad_norm={self.max_grad_norm} is not positive: write 1.0, or null for no clipping")
        if self.gradient_precision == "bf16" and self.precision != "bf16":
            raise ConfigError(
                f"gradient_precision=bf16 is coarser than precision={self.precision}: leave it out, or write precision: bf16"
            )
        if not 0 <= self.warmup_epochs < self.epochs:
            raise ConfigError(f"warmup_epochs={self.warmup_epochs} is not in [0, epochs={self.epochs}): write fewer")
        for name in ("weight_decay", "min_lr"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)} is not 0 or more: write 0 for none")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas={self.betas} are not both in [0, 1): write [0.9, 0.95]")
        most = 1 - self.warmup_epochs / self.epochs
        if self.schedule == "warmup_stable_decay" and not 0 < self.decay_share <= most:
            raise ConfigError(
                f"decay_share={self.decay_share} is not in (0, {most:.2g}], the share that the warmup leaves: write less"
            )

    @property
    def samples_together(self) -> int:
        """How many neighbours of a global batch are in the same micro-batch, because the loss of one depends on the others."""
        return 1

    @property
    def average_decay(self) -> float:
        """Share of the average of the weights that is kept at each step; 0 for no average."""
        return 0.0

    def learning_rate(self, global_step: int, samples_per_epoch: int) -> float:
        """Return the absolute rate of a step: a pure function of the images seen, so a resumed run gets the same one."""
        total_images = self.epochs * samples_per_epoch
        warmup_images = round(self.warmup_epochs * samples_per_epoch)
        curve = warmup_cosine
        if self.schedule == "warmup_stable_decay":
            # Rounded one by one, warmup and decay may exceed the total by an image, and a tiny share may round to none.
            decay_images = min(round(self.decay_share * total_images), total_images - warmup_images)
            curve = partial(warmup_stable_decay, decay_images=max(1, decay_images))
        return curve(
            global_step * self.global_batch,
            peak_lr=scaled_lr(self.base_lr, self.global_batch),
            warmup_images=warmup_images,
            total_images=total_images,
            min_lr=self.min_lr,
        )


@dataclass(frozen=True, kw_only=True)
class PretrainRecipe(Recipe):
    """How the autoencoder is trained, and from which weights."""

    start: str | None = None
    """Weights to start from instead of random ones: a file, folder or s3:// address that `mae model inspect` reads, or the
    directory of a finished pretraining. Their SHA-256 is in the fingerprint, not their address."""
    start_decoder: Literal["auto", "fresh"] = "auto"
    """`auto` takes the decoder too, if these weights have one; `fresh` starts the decoder from random weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start is not None and not self.start.strip():
            raise ConfigError("start is empty: write the address of a weight file, or leave it out")
        if self.start_decoder != "auto" and self.start is None:
            raise ConfigError(f"start_decoder={self.start_decoder} needs weights to start from: write start")

    @property
    def recipe(self) -> Recipe:
        """What is left without the weights to start from."""
        return Recipe(**{one.name: getattr(self, one.name) for one in fields(Recipe)})


@dataclass(frozen=True, kw_only=True)
class FinetuneRecipe(Recipe):
    """Fine-tuning of all weights. Defaults are MAE's (arXiv 2111.06377, table 9, ViT-B)."""

    global_batch: int = 1024
    epochs: int = 100
    base_lr: float = 1e-3
    warmup_epochs: float = 5.0
    min_lr: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.999)
    layer_decay: float = 0.75
    """The learning rate of each layer is this times that of the layer above."""
    drop_path: float = 0.1
    """Probability that a residual branch of the last block is dropped; it grows from 0 in the first."""
    label_smoothing: float = 0.1
    """Share of the target distribution that is spread over all classes."""
    mixup: float = field(default=0.0, metadata=ADDED_LATER)
    """Parameter of the Beta distribution by which an image and its neighbour in the batch are blended; 0 for no mixup."""
    cutmix: float = field(default=0.0, metadata=ADDED_LATER)
    """The same for CutMix, which replaces a box of an image by its neighbour's; 0 for none. With both, each is chosen half of the
    time."""
    ema: float = field(default=0.0, metadata=ADDED_LATER)
    """Scores are those of an exponential moving average of the weights, of which this share is kept at each step, such as 0.9999;
    0 for the weights themselves. Costs 4 bytes per weight."""

    @property
    def samples_together(self) -> int:
        """A pair of images that are mixed is never parted."""
        return 2 if self.mixup or self.cutmix else 1

    @property
    def average_decay(self) -> float:
        """As in the configuration."""
        return self.ema

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("mixup", "cutmix"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)} is negative: write 0 for none")
        if self.global_batch % self.samples_together:
            raise ConfigError(
                f"global_batch={self.global_batch} is odd, but mixup and cutmix mix pairs: write {self.global_batch + 1}"
            )
        for name in ("drop_path", "label_smoothing", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} is not in [0, 1): write 0 for none")
        if not 0 < self.layer_decay <= 1:
            raise ConfigError(
                f"layer_decay={self.layer_decay} is not in (0, 1]: write 1 for the same rate in all layers"
            )


def fitting_warmup(epochs: object, *, default: float, of_epochs: int) -> float:
    """Return a default warm-up, or if it is not shorter than the epochs, the share of them that it has of `of_epochs`.

    A warm-up that fits is left alone: it is part of the fingerprints of finished trainings. `epochs` need not be checked yet.
    """
    # not isinstance: `true` is an int too, and refused later
    if type(epochs) is not int or not 0 < epochs <= default:
        return default
    return epochs * default / of_epochs
