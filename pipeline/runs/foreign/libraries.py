"""The same weights through timm and transformers: tokens of their encoders, and scores of their classifiers.

A file in a library's own layout is read by that library's own loader from the file's tensors, so that nothing of ours is in
between. Other files go through our export. Neither library is needed to run a pipeline: where one is missing, or cannot hold the
encoder, the reason is returned instead.

Shapes: pixels [B, C, H, W] -> tokens [B, n + L, D] after the final norm, scores [B, classes]."""

import contextlib
import io
import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mae_core.config import ViTConfig
from mae_core.interop import hf_file_names, to_hf_vit, to_timm
from mae_core.vit import ViTEncoder, pooled
from pipeline.errors import ConfigError
from pipeline.weights import ForeignWeights, GivenWeights, read_foreign_weights


class Outputs(NamedTuple):
    """What a program makes of some images."""

    tokens: Tensor
    scores: Tensor | None
    through: str
    """Where its weights came from: the file itself, or our export."""


def our_outputs(given: GivenWeights, pixels: Tensor) -> Outputs:
    """Return what this project makes of them."""
    encoder = ViTEncoder(given.config)
    encoder.load_state_dict(given.weights)
    with torch.inference_mode():
        raw = encoder.eval().tokens(pixels)
        tokens = encoder.norm(raw)
        if given.head is None:
            return Outputs(tokens, None, "")
        read = {
            "cls": [(tokens, "cls")],
            "mean": [(tokens, "mean")],
            "mean of unnormalised": [(raw, "mean")],
            "cls and mean": [(tokens, "cls"), (tokens, "mean")],
        }[given.facts.head_reads or "cls"]
        features = torch.cat([pooled(part, pool=pool, config=given.config) for part, pool in read], dim=1)  # type: ignore[arg-type]
        return Outputs(tokens, given.head.logits(features, layer_norm_eps=given.config.layer_norm_eps), "")


def timm_outputs(path: Path, given: GivenWeights, pixels: Tensor, *, prefix: str | None) -> Outputs | str:
    """Return what timm makes of them, or why that could not be found out."""
    try:
        from timm.models import vision_transformer
    except ImportError:
        return "timm is not installed"
    config = given.config
    if given.facts.layout in ("timm", "official_mae"):
        found = read_foreign_weights(path, prefix=prefix)
        weights = {name: value.float() for name, value in found.state_dict.items() if not _is_decoders(name)}
        through = "timm's loader"
    else:
        try:
            weights, through = to_timm(given.weights, config), "our export"
        except ConfigError as reason:
            return str(reason)
    model = _timm_model(vision_transformer, config, weights, given)
    weights = vision_transformer.checkpoint_filter_fn(weights, model)
    with _quiet(), torch.inference_mode():
        model.load_state_dict(weights)
        tokens = model.forward_features(pixels)
        if "fc_norm.weight" in weights:  # ours stands in for the norm of the tokens, which timm does without
            tokens = model.fc_norm(tokens)
        scores = model(pixels) if given.head and "head.weight" in weights else None
        return Outputs(tokens, scores, through)


def _timm_model(library: Any, config: ViTConfig, weights: dict[str, Tensor], given: GivenWeights) -> Any:
    has_head = given.head is not None and "head.weight" in weights
    reads_mean = "fc_norm.weight" in weights or given.facts.head_reads == "mean"
    table = weights["pos_embed"].shape[1]
    with torch.random.fork_rng(devices=[]):  # its initial weights are drawn from the global generator
        model = library.VisionTransformer(
            img_size=config.image_size,
            patch_size=config.patch_size,
            in_chans=config.in_channels,
            embed_dim=config.embed_dim,
            depth=config.depth,
            num_heads=config.num_heads,
            mlp_ratio=config.mlp_ratio,
            num_classes=len(given.head.weight) if given.head and has_head else 0,
            global_pool="avg" if has_head and reads_mean else "token",
            fc_norm="fc_norm.weight" in weights,
            init_values=1.0 if any(name.endswith(".ls1.gamma") for name in weights) else None,
            reg_tokens=config.num_register_tokens,
            # DINOv2's own files, whose registers timm renames, become tables without a row for the class token
            no_embed_class="register_tokens" in weights or table == config.num_patches,
            norm_layer=partial(nn.LayerNorm, eps=config.layer_norm_eps),
        )
    return model.eval()


def transformers_outputs(path: Path, given: GivenWeights, pixels: Tensor, *, prefix: str | None) -> Outputs | str:
    """Return what transformers makes of them, or why that could not be found out."""
    with _quiet():
        try:
            import transformers
        except ImportError:
            return "transformers is not installed"
        config, layout = given.config, given.facts.layout
        settings = _hf_settings(config)
        if layout.startswith("hf_"):
            found = read_foreign_weights(path, prefix=prefix)
            weights, through = {name: value.float() for name, value in _whole(found).items()}, "transformers' loader"
        else:
            try:
                weights, through = hf_file_names(to_hf_vit(given.weights, config)), "our export"
            except ConfigError as reason:
                return str(reason)
        classes = {"num_labels": len(given.head.weight)} if given.head and layout.startswith("hf_") else {}
        if layout == "hf_dinov2":
            kind = "Dinov2WithRegisters" if config.num_register_tokens else "Dinov2"
            settings |= {"mlp_ratio": round(config.mlp_ratio)} | (
                {"num_register_tokens": config.num_register_tokens} if config.num_register_tokens else {}
            )
        else:
            kind = "ViTMAE" if layout == "hf_vitmae" else "ViT"
        made = getattr(transformers, f"{kind}Config")(**settings, **classes)
        suffix = "ForImageClassification" if classes else "Model"
        options = {"add_pooling_layer": False} if (kind, suffix) == ("ViT", "Model") else {}
        model = getattr(transformers, f"{kind}{suffix}").from_pretrained(
            None, config=made, state_dict=weights, **options
        )
        return _run_transformers(model.eval(), pixels, config, kind, through)


def _run_transformers(model: Any, pixels: Tensor, config: ViTConfig, kind: str, through: str) -> Outputs:
    with torch.inference_mode():
        if kind == "ViTMAE":
            model.config.mask_ratio = 0.0
            # ascending noise keeps the patches in their order
            noise = torch.arange(config.num_patches, dtype=torch.float32).expand(len(pixels), -1)
            return Outputs(model(pixel_values=pixels, noise=noise).last_hidden_state, None, through)
        if hasattr(model, "classifier"):
            tokens = model.base_model(pixel_values=pixels).last_hidden_state
            return Outputs(tokens, model(pixel_values=pixels).logits, through)
        return Outputs(model(pixel_values=pixels).last_hidden_state, None, through)


def _hf_settings(config: ViTConfig) -> dict[str, Any]:
    height, width = config.image_size
    return {
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.mlp_dim,
        "layer_norm_eps": config.layer_norm_eps,
        "image_size": height if height == width else (height, width),
        "patch_size": config.patch_size,
        "num_channels": config.in_channels,
    }


def _whole(found: ForeignWeights) -> dict[str, Tensor]:
    """Return the encoder's tensors and its head's under the names of a whole model."""
    heads = {name.rpartition("classifier")[1] + name.rpartition("classifier")[2]: v for name, v in found.beside.items()}
    heads = {name: value for name, value in heads.items() if name.startswith("classifier.")}
    return {**found.state_dict, **heads}


def _is_decoders(name: str) -> bool:
    return name.startswith("decoder_") or name == "mask_token"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the libraries' remarks on loading from the terminal: only what they compute is asked for."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)
