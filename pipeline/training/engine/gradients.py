"""What DeepSpeed does with each gradient, done for many at once: copies out of a reduced bucket, norms, the search for overflows.

DeepSpeed starts kernels parameter by parameter, several thousand per step of a large model, and the GPU waits for the host.
The replacements are methods of the live optimiser, take the same arguments and leave the same values, bit for bit
(tests/pipeline/training/engine). docs/decisions/022-what-deepspeed-costs.md counts them. Everything here runs on the current
stream, so it is of no use with `overlap_comm` or an offloaded optimiser, whose copies have streams of their own."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

Key = tuple[int, int, int]
"""How DeepSpeed's buckets name a parameter: group, position in it, number."""


def use_known_norm(zero: Any, norm: Tensor, *, zero_stage: int) -> None:
    """Make the optimiser take `norm`, a CPU scalar that the caller fills, for the gradients' norm. Not finite: an overflow.

    In place of its own norm and its own search for overflows, with 13 kernels per parameter in bf16 and a wait for the GPU.
    """
    if zero_stage == 3:
        zero._get_norm_groups = lambda: [norm]
        return
    zero.scaled_global_norm = lambda: norm
    zero.has_overflow = lambda partition_gradients=True: not math.isfinite(norm)


def copy_by_bucket(zero: Any, *, zero_stage: int) -> None:
    """Make the optimiser take reduced gradients out of a bucket all at once. Needs `contiguous_gradients: false`."""
    if zero_stage == 3:
        zero.partition_grads = partial(_keep_partitions, zero)
        return
    zero.buffered_reduce_fallback = partial(_reduce_in_place, zero)
    zero._buffered_reduce_fallback_preserving_fp32 = partial(_reduce_into_float32, zero)


def _reduce_in_place(zero: Any, _: None, grads: list[Tensor], dtype: torch.dtype, elements_per_buffer: int) -> None:
    """ZeRO 1 and 2, summed in the compute precision: reduce a bucket, and copy this rank's gradients back."""
    if not grads:
        return
    reduced = zero.unflatten(zero.allreduce_bucket(grads, dtype), grads)
    own = [_parameter(zero, key)._hp_mapping is not None for key in zero.ipg_buckets[dtype].params]
    _copy_all(
        [grad for grad, mine in zip(grads, own, strict=True) if mine],
        [values for values, mine in zip(reduced, own, strict=True) if mine],
    )


def _reduce_into_float32(
    zero: Any, grads: list[Tensor], keys: Sequence[Key], dtype: torch.dtype, elements_per_buffer: int
) -> None:
    """ZeRO 1 and 2, bf16 gradients summed in float32: reduce a bucket, and add this rank's part to its flat buffer."""
    reduced = zero.unflatten(zero.allreduce_bucket(grads, dtype), grads)  # float32
    sums, parts = [], []
    for values, key in zip(reduced, keys, strict=True):
        parameter = _parameter(zero, key)
        parameter.grad = None  # DeepSpeed would keep it until the end of the backward pass
        mapping = parameter._hp_mapping
        if mapping is not None:
            source, target = mapping.lp_fragment_address, mapping.hp_fragment_address
            flat = zero._get_compact_grad_partition_buffer(key[0]).flat_partition
            sums.append(flat.narrow(0, target.start, target.numel))
            parts.append(values.view(-1).narrow(0, source.start, source.numel))
    if sums:
        torch._foreach_add_(sums, parts)


def _keep_partitions(zero: Any, parameters: Sequence[Any], partitions: Sequence[Tensor]) -> list[Tensor]:
    """ZeRO-3: put this rank's part of a bucket into the buffers in which gradients accumulate, and free the gradients."""
    buffers = zero._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
    kept, parts = [], []
    for parameter, part in zip(parameters, partitions, strict=True):
        parameter.grad = None
        # With many workers a small parameter leaves the last ones nothing but padding.
        if parameter.partition_numel() * zero._get_param_partition_rank(parameter) < parameter.ds_numel:
            kept.append(buffers[parameter.ds_id].narrow(0, 0, part.numel()))
            parts.append(part)
    if zero.micro_step_id == 0:
        _copy_all(kept, parts)
    elif kept:
        torch._foreach_add_(kept, parts)
    return kept


def _parameter(zero: Any, key: Key) -> Any:
    group, position, _ = key
    return zero.bit16_groups[group][position]


def _copy_all(targets: list[Tensor], sources: list[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(targets, sources)
