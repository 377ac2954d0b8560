"""Configuration of the encoder and of the autoencoder: frozen dataclasses, and a function per named size.

Shapes: grid is (rows, columns) of patches; L = rows * columns = num_patches.

Units: image and patch sizes are in pixels, ratios are fractions, and pixel_mean and pixel_std are on the 0..1 scale.

Errors: every config checks itself on construction and raises a ConfigError that names the field, its value and what to
write instead.

Source: He et al. 2022, arXiv 2111.06377, tables 1 and 8. The sizes are those of Dosovitskiy et al. 2021, arXiv 2010.11929,
table 1; tiny and small come from Touvron et al. 2021, arXiv 2012.12877, table 1."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, get_args

from mae_core.errors import ConfigError
from mae_core.masking import Masking, visible_count

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

ADDED_LATER: Mapping[str, Any] = {"added_later": True}
"""Metadata for a field that was added after configs were first fingerprinted, and whose default keeps the old behaviour.

A fingerprint leaves such a field out while it holds its default, so that adding the field does not change the identity of
existing runs. The default must therefore never change."""

Positions = Literal["sine_cosine", "learned"]
Target = Literal["raw", "normalised", "pca"]
EncoderInput = Literal["visible", "all"]
LossOn = Literal["hidden", "all"]


def _check_positive(config: object, *fields: str) -> None:
    for name in fields:
        value = getattr(config, name)
        if not value > 0:
            raise ConfigError(f"{name}={value} is not positive: write a number above 0")


def _check_choice(config: object, name: str, choices: object) -> None:
    value = getattr(config, name)
    if value not in get_args(choices):
        raise ConfigError(f"{name}={value!r} is unknown: write one of {', '.join(get_args(choices))}")


def _check_width(width_field: str, width: int, heads_field: str, heads: int) -> None:
    if width % heads:
        raise ConfigError(
            f"{width_field}={width} is not divisible by {heads_field}={heads}: all heads have the same width, so write a "
            f"multiple of {heads}"
        )
    if width % 4:
        raise ConfigError(
            f"{width_field}={width} is not divisible by 4: sine-cosine positions need a sine and a cosine for each of the "
            f"two axes; write {width // 4 * 4 + 4}"
        )


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """Describe a Vision Transformer encoder: its sizes, and the scale of the pixels it reads.

    The encoder takes images of shape [B, in_channels, *image_size].

    Raises:
        ConfigError: A size is not positive, or two sizes do not fit together.
    """

    image_size: tuple[int, int] = (224, 224)
    """(height, width) of an image in pixels; each side must be a multiple of patch_size. In YAML one number is both."""
    patch_size: int = 16
    """Side of a square patch in pixels."""
    in_channels: int = 3
    """Number of channels in an image."""
    embed_dim: int
    """Width of a token; must be a multiple of num_heads and of 4."""
    depth: int
    """Number of Transformer blocks."""
    num_heads: int
    """Number of attention heads per block."""
    mlp_ratio: float = 4.0
    """Width of a block's hidden MLP layer, in multiples of embed_dim."""
    layer_norm_eps: float = 1e-6
    """Added to the variance in every LayerNorm."""
    cls_tokens: int = field(default=1, metadata=ADDED_LATER)
    """Number of class tokens in front of the patch tokens. The paper uses one, Pixio eight."""
    num_register_tokens: int = field(default=0, metadata=ADDED_LATER)
    """Number of register tokens between class and patch tokens: blocks use them as scratch space, and no feature reads them (Darcet
    et al. 2023, arXiv 2309.16588). DINOv2's encoders with registers have four."""
    positions: Positions = field(default="sine_cosine", metadata=ADDED_LATER)
    """`sine_cosine` is a fixed table, recomputed for any grid. `learned` is a parameter that starts as that table; encoders
    fine-tuned with the official code and most supervised encoders need it."""
    pixel_mean: tuple[float, ...] = IMAGENET_MEAN
    """Mean of each channel on the 0..1 scale, subtracted from the pixels. The default is ImageNet's."""
    pixel_std: tuple[float, ...] = IMAGENET_STD
    """Standard deviation of each channel on the 0..1 scale, by which the pixels are divided. The default is ImageNet's."""

    def __post_init__(self) -> None:
        _check_positive(self, "patch_size", "in_channels", "embed_dim", "depth", "num_heads", "mlp_ratio")
        _check_positive(self, "layer_norm_eps", "cls_tokens")
        if self.num_register_tokens < 0:
            raise ConfigError(f"num_register_tokens={self.num_register_tokens} is negative: write 0 for none")
        _check_choice(self, "positions", Positions)
        for side, pixels in zip(("height", "width"), self.image_size, strict=True):
            # Tested first: for a patch larger than the image, the nearest multiple would be the wrong advice.
            if 0 < pixels < self.patch_size:
                raise ConfigError(
                    f"patch_size={self.patch_size} is larger than the {side} in image_size={self.image_size}: write a "
                    f"patch_size that divides {pixels}, or a larger image_size"
                )
            if pixels < 1 or pixels % self.patch_size:
                fitting = max(1, round(pixels / self.patch_size)) * self.patch_size  # the nearest size that would do
                raise ConfigError(
                    f"image_size={self.image_size}: {side} {pixels} is not a multiple of patch_size={self.patch_size}; "
                    f"write {fitting}"
                )
        _check_width("embed_dim", self.embed_dim, "num_heads", self.num_heads)
        for name in ("pixel_mean", "pixel_std"):
            values = getattr(self, name)
            if len(values) != self.in_channels:
                raise ConfigError(
                    f"{name}={values} has {len(values)} values for in_channels={self.in_channels}: write one per channel"
                )
        if not all(std > 0 for std in self.pixel_std):
            raise ConfigError(
                f"pixel_std={self.pixel_std} holds a value that is not positive: write 1.0 to leave a channel unscaled"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches in an image."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def num_patches(self) -> int:
        """L, the number of patches in an image."""
        return self.grid[0] * self.grid[1]

    @property
    def prefix_tokens(self) -> int:
        """n, the number of tokens in front of the patches: class tokens, then registers."""
        return self.cls_tokens + self.num_register_tokens

    @property
    def patch_dim(self) -> int:
        """P * P * C, the number of values in a patch."""
        return self.patch_size**2 * self.in_channels

    @property
    def mlp_dim(self) -> int:
        """Width of a block's hidden MLP layer."""
        return int(self.embed_dim * self.mlp_ratio)


@dataclass(frozen=True, kw_only=True)
class MAEConfig:
    """Describe a Masked Autoencoder: the encoder, the decoder that serves its pretraining, and the task.

    The task is which patches are hidden and what is predicted for them. The defaults are the paper's.

    Raises:
        ConfigError: A value is unknown or out of range, or no patch would stay visible or be hidden.
    """

    encoder: ViTConfig
    """The encoder. The decoder shares its grid, its pixel scale and its layer_norm_eps."""
    decoder_embed_dim: int = 512
    """Width of a token in the decoder; must be a multiple of decoder_num_heads and of 4."""
    decoder_depth: int = 8
    """Number of decoder blocks."""
    decoder_num_heads: int = 16
    """Number of attention heads per decoder block."""
    decoder_mlp_ratio: float = field(default=4.0, metadata=ADDED_LATER)
    """Width of a decoder block's hidden MLP layer, in multiples of decoder_embed_dim."""
    mask_ratio: float = 0.75
    """Fraction of patches hidden from the encoder. At least one patch must stay visible and at least one must be hidden."""
    masking: Masking = "random"
    """How hidden patches are chosen: `random` (every patch is equally likely), `block` (a few large rectangles), `grid` (the
    visible patches are regularly spaced) or `cell` (whole cells of mask_cell x mask_cell patches)."""
    mask_cell: int = field(default=2, metadata=ADDED_LATER)
    """Side of a cell in patches; only masking `cell` reads it."""
    target: Target = "normalised"
    """What the decoder predicts: `raw` pixels, pixels `normalised` by each patch's own mean and standard deviation, or the
    first pca_components coefficients of a `pca` in patch space."""
    pca_components: int = field(default=96, metadata=ADDED_LATER)
    """Number of coefficients per patch; only target `pca` reads it."""
    encoder_input: EncoderInput = field(default="visible", metadata=ADDED_LATER)
    """`visible` gives the encoder the visible patches only. `all` also gives it mask tokens in place of the hidden patches,
    and the decoder then adds none (the paper's ablation, at 3.3 times the operations)."""
    loss_on: LossOn = field(default="hidden", metadata=ADDED_LATER)
    """Which patches are predicted and enter the loss: the `hidden` ones, or `all` (an ablation, 0.5 % worse in the paper)."""

    def __post_init__(self) -> None:
        _check_positive(self, "decoder_embed_dim", "decoder_depth", "decoder_num_heads", "decoder_mlp_ratio")
        _check_width("decoder_embed_dim", self.decoder_embed_dim, "decoder_num_heads", self.decoder_num_heads)
        _check_choice(self, "masking", Masking)
        _check_choice(self, "target", Target)
        _check_choice(self, "encoder_input", EncoderInput)
        _check_choice(self, "loss_on", LossOn)
        if not 1 <= self.mask_cell <= max(self.encoder.grid):
            raise ConfigError(
                f"mask_cell={self.mask_cell} is not in [1, {max(self.encoder.grid)}]: write 2 for cells of 2 x 2 patches"
            )
        if self.target == "pca" and not 1 <= self.pca_components <= self.encoder.patch_dim:
            raise ConfigError(
                f"pca_components={self.pca_components} is not in [1, {self.encoder.patch_dim}], the number of values in a "
                f"patch: write a number in that range"
            )
        # the count itself is not needed here: a mask_ratio that cannot work is refused now rather than at the first batch
        visible_count(self.encoder.num_patches, self.mask_ratio)

    @property
    def visible_patches(self) -> int:
        """K, the number of patches per image that the encoder sees."""
        return visible_count(self.encoder.num_patches, self.mask_ratio)

    @property
    def predicted_patches(self) -> int:
        """M, the number of patches per image that are predicted and enter the loss."""
        hidden = self.encoder.num_patches - self.visible_patches
        return hidden if self.loss_on == "hidden" else self.encoder.num_patches

    @property
    def target_dim(self) -> int:
        """Number of values the decoder predicts per patch."""
        return self.pca_components if self.target == "pca" else self.encoder.patch_dim

    @property
    def decoder_mlp_dim(self) -> int:
        """Width of a decoder block's hidden MLP layer."""
        return int(self.decoder_embed_dim * self.decoder_mlp_ratio)


def tiny(**overrides: Any) -> ViTConfig:
    """Return ViT-Tiny/16 (5.5 M parameters), with any field of ViTConfig overridden."""
    # One dict, in which overrides win; as keywords, a field given twice would be a TypeError.
    return ViTConfig(**{"embed_dim": 192, "depth": 12, "num_heads": 3, **overrides})


def small(**overrides: Any) -> ViTConfig:
    """Return ViT-Small/16 (21.6 M parameters), with any field of ViTConfig overridden."""
    return ViTConfig(**{"embed_dim": 384, "depth": 12, "num_heads": 6, **overrides})


def base(**overrides: Any) -> ViTConfig:
    """Return ViT-Base/16 (85.6 M parameters), with any field of ViTConfig overridden."""
    return ViTConfig(**{"embed_dim": 768, "depth": 12, "num_heads": 12, **overrides})


def large(**overrides: Any) -> ViTConfig:
    """Return ViT-Large/16 (303 M parameters), with any field of ViTConfig overridden."""
    return ViTConfig(**{"embed_dim": 1024, "depth": 24, "num_heads": 16, **overrides})


def huge(**overrides: Any) -> ViTConfig:
    """Return ViT-Huge/14 (630 M parameters), with any field of ViTConfig overridden."""
    return ViTConfig(**{"embed_dim": 1280, "depth": 32, "num_heads": 16, "patch_size": 14, **overrides})


SIZES: Mapping[str, Callable[..., ViTConfig]] = MappingProxyType(
    {"tiny": tiny, "small": small, "base": base, "large": large, "huge": huge}
)
"""The named sizes, for configs that say `model.size: base`."""


def size_name(config: ViTConfig) -> str:
    """Return `ViT-B/16`, or width x depth / patch size of a size without a name: `ViT 192x6/4`."""
    for name, make in SIZES.items():
        known = make()
        if (known.embed_dim, known.depth, known.num_heads) == (config.embed_dim, config.depth, config.num_heads):
            return f"ViT-{'Ti' if name == 'tiny' else name[0].upper()}/{config.patch_size}"
    return f"ViT {config.embed_dim}x{config.depth}/{config.patch_size}"
