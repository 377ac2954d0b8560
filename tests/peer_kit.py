"""Models of timm and transformers with weights moved well off their start, and official MAE files made from them: what imports
and exports of weights are compared with. Nothing is fetched; every number comes from a seeded generator."""

import re
from typing import Literal

import timm
import torch
import transformers
from torch import Tensor, nn

from mae_core import MAEConfig, ViTConfig


def moved(module: nn.Module, *, width: int, seed: int = 3) -> None:
    """Adds noise to every weight in place: sums over `width` terms stay about as large whatever the width."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1.2 / width**0.5 * torch.randn(parameter.shape, generator=generator))


def table_by_definition(grid: tuple[int, int], width: int) -> Tensor:
    """The fixed table [1, 1 + L, D] number by number: columns first, sines before cosines, a zero row for the class token."""
    rows, columns = grid
    steps = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    table = [torch.zeros(width, dtype=torch.float64)]
    for index in range(rows * columns):
        row, column = divmod(index, columns)
        table += [torch.cat([f(at * steps) for at in (column, row) for f in (torch.sin, torch.cos)])]
    return torch.stack(table)[None].float()


def timm_peer(
    config: ViTConfig, *, positions: Literal["fixed", "trained"], num_classes: int = 0, **options
) -> nn.Module:
    torch.manual_seed(0)
    peer = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=config.image_size,
        patch_size=config.patch_size,
        in_chans=config.in_channels,
        embed_dim=config.embed_dim,
        depth=config.depth,
        num_heads=config.num_heads,
        mlp_ratio=config.mlp_ratio,
        num_classes=num_classes,
        **options,
    )
    moved(peer, width=config.embed_dim)
    if positions == "fixed":
        peer.pos_embed.data.copy_(table_by_definition(config.grid, config.embed_dim))
    return peer.eval()


def hf_settings(config: ViTConfig) -> dict:
    return {
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.mlp_dim,
        "layer_norm_eps": config.layer_norm_eps,
        "image_size": config.image_size[0] if config.image_size[0] == config.image_size[1] else config.image_size,
        "patch_size": config.patch_size,
        "num_channels": config.in_channels,
    }


def hf_vit_peer(
    config: ViTConfig, *, kind: str = "ViTModel", positions: Literal["fixed", "trained"] = "trained"
) -> nn.Module:
    torch.manual_seed(0)
    peer = getattr(transformers, kind)(transformers.ViTConfig(**hf_settings(config)))
    moved(peer, width=config.embed_dim)
    if positions == "fixed":
        peer.base_model.embeddings.position_embeddings.data.copy_(table_by_definition(config.grid, config.embed_dim))
    return peer.eval()


def hf_vitmae_peer(config: MAEConfig) -> transformers.ViTMAEForPreTraining:
    torch.manual_seed(0)
    encoder = config.encoder
    peer = transformers.ViTMAEForPreTraining(
        transformers.ViTMAEConfig(
            **hf_settings(encoder),
            decoder_hidden_size=config.decoder_embed_dim,
            decoder_num_hidden_layers=config.decoder_depth,
            decoder_num_attention_heads=config.decoder_num_heads,
            decoder_intermediate_size=config.decoder_mlp_dim,
            mask_ratio=config.mask_ratio,
            norm_pix_loss=config.target == "normalised",
        )
    )
    moved(peer, width=encoder.embed_dim)
    # transformers 5.23 leaves the tables of a fresh model at zero, and computes square ones alone
    peer.vit.embeddings.position_embeddings.data.copy_(table_by_definition(encoder.grid, encoder.embed_dim))
    peer.decoder.decoder_pos_embed.data.copy_(table_by_definition(encoder.grid, config.decoder_embed_dim))
    return peer.eval()


def official_names(hf_vitmae: dict[str, Tensor]) -> dict[str, Tensor]:
    """A ViTMAEForPreTraining's weights as facebookresearch/mae names them: nothing builds that layout here but this."""
    renames = (
        (r"^vit\.embeddings\.position_embeddings", "pos_embed"),
        (r"^vit\.embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
        (r"^vit\.embeddings\.", ""),
        (r"^vit\.layernorm", "norm"),
        (r"^vit\.layers", "blocks"),
        (r"^decoder\.decoder_layers", "decoder_blocks"),
        (r"^decoder\.", ""),
        (r"layernorm_before", "norm1"),
        (r"layernorm_after", "norm2"),
        (r"attention\.o_proj", "attn.proj"),
    )

    def renamed(name: str) -> str:
        for old, new in renames:
            name = re.sub(old, new, name)
        return name

    found = {renamed(name): tensor for name, tensor in hf_vitmae.items() if not re.search(r"\.[qkv]_proj\.", name)}
    for name in (name for name in hf_vitmae if ".q_proj." in name):
        parts = [hf_vitmae[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
        found[renamed(name.replace("attention.q_proj", "attn.qkv"))] = torch.cat(parts)
    return found
