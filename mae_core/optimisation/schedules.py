"""The learning rate as a pure function of the images seen: it can be plotted without training, and it resumes exactly.

With a warmup, the first update happens at 0 images, has rate 0 and changes nothing. A parameter group's rate is the
schedule's multiplied by its lr_scale (see `ParameterGroup`), and so is its floor: with layer decay, early layers end below
min_lr.

Units: learning rates are absolute. Warmup, decay, total and position are in images, so that a change of batch size or
world size keeps the curve.

Source: Loshchilov and Hutter 2017, arXiv 1608.03983 (half-cycle cosine); Goyal et al. 2017, arXiv 1706.02677 (warmup and
linear scaling); He et al. 2022, arXiv 2111.06377, table 8; Hägele et al. 2024, arXiv 2405.18392 (constant, then decay)."""

import math

from mae_core.errors import ConfigError


def warmup_cosine(
    images_seen: int, *, peak_lr: float, warmup_images: int, total_images: int, min_lr: float = 0.0
) -> float:
    """Return the learning rate after `images_seen` images: a linear warmup to peak_lr, then half a cosine to min_lr.

    Beyond total_images the rate stays at min_lr. With a warmup, the rate at 0 images is 0.

    Source: arXiv 1608.03983, with the warmup of arXiv 1706.02677.

    Raises:
        ConfigError: images_seen is negative, the warmup does not end before total_images, or min_lr is not in
            [0, peak_lr].
    """
    _check(images_seen, peak_lr=peak_lr, warmup_images=warmup_images, total_images=total_images, min_lr=min_lr)
    if images_seen < warmup_images:
        return peak_lr * images_seen / warmup_images
    # clipped: beyond the end the cosine would rise again
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
    """Return the learning rate after `images_seen` images: a linear warmup, a constant peak_lr, then a decay to min_lr.

    The decay takes the last decay_images of total_images and follows 1 - sqrt(progress). Before it, the rate does not
    depend on total_images, so one long constant run serves several training lengths: each is a decay that continues from
    one of its checkpoints. Beyond total_images the rate stays at min_lr. With a warmup, the rate at 0 images is 0.

    Source: arXiv 2405.18392, section 3, in its 1-sqrt form.

    Raises:
        ConfigError: images_seen is negative, min_lr is not in [0, peak_lr], or warmup and decay do not fit into
            total_images.
    """
    _check(images_seen, peak_lr=peak_lr, warmup_images=warmup_images, total_images=total_images, min_lr=min_lr)
    if not 1 <= decay_images <= total_images - warmup_images:
        raise ConfigError(
            f"decay_images={decay_images} is not in [1, {total_images - warmup_images}], the images after warmup: "
            f"write {max(1, (total_images - warmup_images) // 5)} for a fifth of them"
        )
    if images_seen < warmup_images:
        return peak_lr * images_seen / warmup_images
    progress = min(1.0, max(0, images_seen - (total_images - decay_images)) / decay_images)
    # steepest where the decay begins, unlike a cosine, which is flat there
    return min_lr + (peak_lr - min_lr) * (1.0 - math.sqrt(progress))


def scaled_lr(base_lr: float, global_batch: int) -> float:
    """Return the absolute learning rate for a global batch: base_lr * global_batch / 256.

    `global_batch` is the number of images per update, over all ranks and accumulation steps.

    Source: arXiv 1706.02677, section 2.1.

    Raises:
        ConfigError: global_batch is not positive.
    """
    if global_batch < 1:
        raise ConfigError(f"global_batch={global_batch} is not positive: write the number of images per update")
    # 256 is the batch for which Goyal et al. tuned their rate; MAE states its base_lr for it too
    return base_lr * global_batch / 256


def _check(images_seen: int, *, peak_lr: float, warmup_images: int, total_images: int, min_lr: float) -> None:
    if not 0 <= warmup_images < total_images:
        raise ConfigError(
            f"warmup_images={warmup_images} is not in [0, total_images={total_images}): train longer, or warm up for fewer images"
        )
    if not 0.0 <= min_lr <= peak_lr:
        raise ConfigError(f"min_lr={min_lr} is not in [0, peak_lr={peak_lr}]: write a floor no higher than the peak")
    if images_seen < 0:
        raise ConfigError(f"images_seen={images_seen} is negative: count from 0")
