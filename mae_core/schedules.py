"""Learning rate as a function of the images consumed: it can be plotted without training, and resumes exactly.

Units:  rates absolute; warmup, total and position in images, so that a change of batch or world size keeps the curve.
Errors: ConfigError when the numbers describe no schedule.
Source: Loshchilov and Hutter 2017, arXiv 1608.03983 (half-cycle cosine); Goyal et al. 2017, arXiv 1706.02677 (warmup and
linear scaling); He et al. 2022, arXiv 2111.06377, table 8."""

import math

from mae_core.errors import ConfigError


def warmup_cosine(
    images_seen: int, *, peak_lr: float, warmup_images: int, total_images: int, min_lr: float = 0.0
) -> float:
    """Learning rate after `images_seen` images: linear from 0 to peak_lr, then half a cosine down to min_lr.

    Units: images and absolute rates. The first update has rate 0 (when there is a warmup); after total_images the rate
    stays min_lr. Errors: ConfigError. Source: see the module.
    """
    if not 0 <= warmup_images < total_images:
        raise ConfigError(
            f"warmup_images={warmup_images} is not in [0, total_images={total_images}): train longer or warm up less"
        )
    if not 0.0 <= min_lr <= peak_lr:
        raise ConfigError(f"min_lr={min_lr} is not in [0, peak_lr={peak_lr}]: write a floor below the peak")
    if images_seen < 0:
        raise ConfigError(f"images_seen={images_seen} is negative: count from 0")
    if images_seen < warmup_images:
        return peak_lr * images_seen / warmup_images
    progress = min(1.0, (images_seen - warmup_images) / (total_images - warmup_images))
    return min_lr + (peak_lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))


def scaled_lr(base_lr: float, global_batch: int) -> float:
    """Absolute rate for a global batch: base_lr * global_batch / 256.

    Units: global_batch in images an update, over all ranks and accumulation. Errors: ConfigError when global_batch is
    below 1. Source: arXiv 1706.02677, section 2.1.
    """
    if global_batch < 1:
        raise ConfigError(f"global_batch={global_batch} is not positive: write the images of one update")
    return base_lr * global_batch / 256
