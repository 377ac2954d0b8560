"""Parts of other encoders that the encoder here does not have, told by the names of their tensors.

Source: the names found in files of timm, transformers, DeiT, BEiT, DINOv3, OpenCLIP and of quantised models."""

import re
from collections.abc import Iterable

_UNSUPPORTED_PARTS = (
    (r"reg_token|register_tokens", "register tokens"),
    (r"dist_token|distillation_token|head_dist\.", "a distillation token"),
    (r"\.ls[12]\.gamma$|\.gamma_[12]$|layer_scale", "LayerScale"),
    (r"\b[qk]_norm\.|inner_attn_ln", "normalised queries and keys"),
    (r"\.mlp\.(w\d+|fc1_[gx]|weights_in|weights_out)\.", "a gated MLP"),
    (r"relative_position|rel_pos|(^|[._])rope|freqs_cis", "relative or rotary positions"),
    (r"norm_pre\.|pre_?layrnorm|\bln_pre\.", "a norm in front of the blocks"),
    (r"attn_pool\.", "attention pooling"),
    (r"lora_|adapter", "adapters such as LoRA, which have to be merged first"),
    (r"\bSCB$|absmax|quant_|weight_scale|zero_points?$|_packed_params|qweight|qzeros", "quantised weights"),
    (r"patch_embed\.(?!proj\.)|patch_embeddings\.(?!projection\.)", "another patch embedding"),
)
"""What other encoders have and ours does not: regular expressions of the names, and what to call it. They only explain a refusal:
unknown names are refused whether or not they are listed here."""


def unsupported_parts(unknown: Iterable[str]) -> str:
    """Return what unknown names stand for, with an example of each, or an empty string if none is recognised."""
    unknown = sorted(unknown)
    found = []
    for pattern, what in _UNSUPPORTED_PARTS:
        # one example of each kind is enough to find it in the file
        if name := next((name for name in unknown if re.search(pattern, name)), None):
            found.append(f"{what} ({name})")
    return ", ".join(found)
