"""The autoencoder as the paper's "simple implementation" describes it: slow, short, and the reference for the fast path.

It embeds every patch, shuffles them and drops the tail, encodes, appends mask tokens and unshuffles, decodes every patch,
and weights the error of every patch by the mask.

Shapes: pixels [B, C, H, W], noise [B, L] -> MAEOutput; L patches, K visible, n class tokens, widths D and Dd.

Source: He et al. 2022, arXiv 2111.06377, section 3 ("Simple implementation")."""

import torch
from torch import Tensor

from mae_core.mae import MAEOutput, MaskedAutoencoder
from mae_core.patches import gather_patches, patchify
from mae_core.targets import target_of


def reference_forward(model: MaskedAutoencoder, pixels: Tensor, noise: Tensor) -> MAEOutput:
    """Compute `model(pixels, noise)` in the paper's order of operations, with the same weights.

    The result is the same up to rounding. It exists to test the fast path and to measure what the fast path saves.
    Arguments, result and errors are those of `MaskedAutoencoder.forward`.
    """
    config, encoder, decoder = model.config, model.encoder, model.decoder
    n, count = config.encoder.prefix_tokens, config.visible_patches
    masked = model.mask(pixels, noise)
    shuffle = torch.cat([masked.ids_visible, masked.ids_hidden], dim=1)  # [B, L]
    unshuffle = shuffle.argsort(dim=1)  # [B, L]

    patches = patchify(pixels, config.encoder.patch_size)  # [B, L, N]
    x = encoder.patch_embed(patches)  # [B, L, D]
    if config.encoder_input == "all":
        x = torch.where(masked.mask[..., None] == 1.0, model.mask_token, x)
    x = x + encoder.positions
    if config.encoder_input == "visible":
        x = gather_patches(x, shuffle)[:, :count]  # [B, K, D]
    if config.encoder.num_register_tokens:
        x = torch.cat([encoder.register_tokens.expand(len(x), -1, -1), x], dim=1)
    x = torch.cat([encoder.cls_token.expand(len(x), -1, -1), x], dim=1)
    for block in encoder.blocks:
        x = block(x)
    x = decoder.embed(encoder.norm(x))

    prefix, x = x[:, :n], x[:, n:]
    if config.encoder_input == "visible":
        hidden = decoder.mask_token.expand(len(x), masked.ids_hidden.shape[1], -1)  # [B, L - K, Dd]
        x = gather_patches(torch.cat([x, hidden], dim=1), unshuffle)  # [B, L, Dd]
    x = torch.cat([prefix, x + decoder.positions], dim=1)
    for block in decoder.blocks:
        x = block(x)
    prediction = decoder.head(decoder.norm(x))[:, n:]  # [B, L, T]

    target = target_of(patches, target=config.target, basis=model.basis_on(pixels.device))
    error = (prediction - target).square().mean(dim=2)  # [B, L]
    weight = masked.mask if config.loss_on == "hidden" else torch.ones_like(masked.mask)
    loss = (error * weight).sum(dim=1) / weight.sum(dim=1)
    return MAEOutput(loss, gather_patches(prediction, masked.ids_hidden), masked)
