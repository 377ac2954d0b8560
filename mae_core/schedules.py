"""Learning rate as a function of the images consumed: it can be plotted without training, and resumes exactly.

Units:  rates absolute; warmup, decay, total and position in images, so that a change of batch or world size keeps the curve.
Errors: ConfigError when the numbers describe no schedule.
Source: Loshchilov and Hutter 2017, arXiv 1608.03983 (half-cycle cosine); Goyal et al. 2017, arXiv 1706.02677 (warmup and
linear scaling); He et al. 2022, arXiv 2111.06377, table 8; Hägele et al. 2024, arXiv 2405.18392 (constant, then decay).

With a warmup the first update, at 0 images, has rate 0 and moves nothing. A parameter group's rate is the schedule's times
its lr_scale (mae_core.optim), and so is its floor: under layer decay early layers end below min_lr."""

import math

from mae_core.errors import ConfigError


def warmup_cosine(
    images_seen: int, *, peak_lr: float, warmup_images: int, total_images: int, min_lr: float = 0.0
) -> float:
    """Learning rate after `images_seen` images: linear from 0 to peak_lr, then half a cosine down to min_lr.

    Units: images and absolute rates. The first update has rate 0 (when there is a warmup); after total_images the rate
    stays min_lr, which a group's lr_scale multiplies too. Errors: ConfigError. Source: see the module.
    """
    _check(images_seen, peak_lr=peak_lr, warmup_images=warmup_images, total_images=total_images, min_lr=min_lr)
    if images_seen < warmup_images:
        return peak_lr * images_seen / warmup_images
    progress = min(1.0, (images_seen - warmup_images) / (total_images - warmup_images))
    return min_lr + (peak_lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))


def warmup_stable_decay(
    images_seen: int,
    *,
    peak_lr: float,
    warmup_images: int,
    decay_images: int,
    total_images: int,
    min_lr: float = 0.0,
) -> float:
    """Learning rate after `images_seen` images: linear from 0 to peak_lr, constant, then down to min_lr by 1 - sqrt.

    Until the decay, which takes the last decay_images of total_images, the rate does not depend on total_images: one
    constant run serves several lengths, each a decay that continues from a checkpoint of it.
    Units: images and absolute rates. The first update has rate 0 (when there is a warmup); after total_images the rate
    stays min_lr, which a group's lr_scale multiplies too. Errors: ConfigError, also unless decay_images is at least 1 and
    fits behind the warmup. Source: arXiv 2405.18392, section 3, in its 1-sqrt form.
    """
    _check(images_seen, peak_lr=peak_lr, warmup_images=warmup_images, total_images=total_images, min_lr=min_lr)
    if not 1 <= decay_images <= total_images - warmup_images:
        raise ConfigError(
            f"decay_images={decay_images} is not in [1, {total_images - warmup_images}], the images after the warmup: "
            f"write {max(1, (total_images - warmup_images) // 5)} for a fifth of them"
        )
    if images_seen < warmup_images:
        return peak_lr * images_seen / warmup_images
    progress = min(1.0, max(0, images_seen - (total_images - decay_images)) / decay_images)
    return min_lr + (peak_lr - min_lr) * (1.0 - math.sqrt(progress))


def scaled_lr(base_lr: float, global_batch: int) -> float:
    """Absolute rate for a global batch: base_lr * global_batch / 256.

    Units: global_batch in images an update, over all ranks and accumulation. Errors: ConfigError when global_batch is
    below 1. Source: arXiv 1706.02677, section 2.1.
    """
    if global_batch < 1:
        raise ConfigError(f"global_batch={global_batch} is not positive: write the images of one update")
    return base_lr * global_batch / 256


def _check(images_seen: int, *, peak_lr: float, warmup_images: int, total_images: int, min_lr: float) -> None:
    if not 0 <= warmup_images < total_images:
        raise ConfigError(
            f"warmup_images={warmup_images} is not in [0, total_images={total_images}): train longer or warm up less"
        )
    if not 0.0 <= min_lr <= peak_lr:
        raise ConfigError(f"min_lr={min_lr} is not in [0, peak_lr={peak_lr}]: write a floor below the peak")
    if images_seen < 0:
        raise ConfigError(f"images_seen={images_seen} is negative: count from 0")
