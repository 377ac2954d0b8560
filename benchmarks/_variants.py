"""Our autoencoder with one of its savings undone, to see whether that saving pays. Every variant has the loss of the model itself.

Shapes: pixels [B, C, H, W], noise [B, L] -> mean loss, a scalar; K visible and M hidden of L patches, n class tokens.
Source: He et al. 2022, arXiv 2111.06377, section 3 ("Simple implementation")."""

from typing import Literal

import torch
from torch import Tensor

from mae_core import MaskedAutoencoder, patchify, target_of
from mae_core.masking import Masked
from mae_core.patches import gather_patches


def mean_loss(
    model: MaskedAutoencoder,
    pixels: Tensor,
    noise: Tensor,
    *,
    embed: Literal["visible", "all"] = "visible",
    order: Literal["shuffled", "image"] = "shuffled",
    head: Literal["hidden", "all"] = "hidden",
) -> Tensor:
    """Return the loss of `model`, with all patches embedded, the decoder in image order, or all patches predicted if asked for.

    Valid for encoder_input "visible" and loss_on "hidden".
    """
    masked = model.mask(pixels, noise)
    encode = _encode_visible_embedded if embed == "visible" else _encode_all_embedded
    tokens = encode(model, pixels, masked)  # [B, n + K, D]
    decoded = _decode(model, tokens, masked, order=order)  # [B, n + L, Dd]
    patches = patchify(pixels, model.config.encoder.patch_size)  # [B, L, N]
    if head == "hidden":
        patches = gather_patches(patches, masked.ids_hidden)
        decoded = _hidden(decoded[:, model.config.encoder.prefix_tokens :], masked, order=order)  # [B, M, Dd]
        prediction = model.decoder.head(model.decoder.norm(decoded))
    else:
        prediction = model.decoder.head(model.decoder.norm(decoded))[:, model.config.encoder.prefix_tokens :]
        if order == "shuffled":
            patches = gather_patches(patches, _shuffle(masked))
    target = target_of(patches, target=model.config.target, basis=model.basis_on(pixels.device))
    error = (prediction.float() - target).square().mean(dim=2, keepdim=True)  # [B, M or L, 1]
    if head == "all":
        error = _hidden(error, masked, order=order)  # [B, M, 1]
    loss: Tensor = error.mean()
    return loss


def _shuffle(masked: Masked) -> Tensor:
    return torch.cat([masked.ids_visible, masked.ids_hidden], dim=1)  # [B, L]


def _hidden(of_patches: Tensor, masked: Masked, *, order: Literal["shuffled", "image"]) -> Tensor:
    if order == "image":
        return gather_patches(of_patches, masked.ids_hidden)
    return of_patches[:, -masked.ids_hidden.shape[1] :]


def _encode_visible_embedded(model: MaskedAutoencoder, pixels: Tensor, masked: Masked) -> Tensor:
    tokens: Tensor = model.encoder(pixels, masked.ids_visible)
    return tokens


def _encode_all_embedded(model: MaskedAutoencoder, pixels: Tensor, masked: Masked) -> Tensor:
    encoder = model.encoder
    x = encoder.patch_embed(patchify(pixels, encoder.config.patch_size)) + encoder.positions  # [B, L, D]
    x = gather_patches(x, masked.ids_visible)  # [B, K, D]
    x = torch.cat([encoder.cls_token.expand(len(x), -1, -1), x], dim=1)
    for block in encoder.blocks:
        x = block(x)
    normed: Tensor = encoder.norm(x)
    return normed


def _decode(model: MaskedAutoencoder, tokens: Tensor, masked: Masked, *, order: Literal["shuffled", "image"]) -> Tensor:
    decoder, n = model.decoder, model.config.encoder.prefix_tokens
    x: Tensor = decoder.embed(tokens)  # [B, n + K, Dd]
    classes, x = x[:, :n], x[:, n:]
    hidden = decoder.mask_token.to(x.dtype).expand(len(x), masked.ids_hidden.shape[1], -1)
    x = torch.cat([x, hidden], dim=1)  # [B, L, Dd]
    positions = decoder.positions.to(x.dtype).expand(len(x), -1, -1)
    if order == "shuffled":
        x = x + gather_patches(positions, _shuffle(masked))
    else:
        x = gather_patches(x, _shuffle(masked).argsort(dim=1)) + positions
    x = torch.cat([classes, x], dim=1)
    for block in decoder.blocks:
        x = block(x)
    return x
