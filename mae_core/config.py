"""Shapes of the encoder and of the autoencoder, as frozen dataclasses; named sizes are functions.

Shapes: grid = (rows, columns) of patches, L = rows * columns = num_patches.
Units:  image and patch sizes in pixels, ratios as fractions, pixel_mean and pixel_std on the 0..1 scale.
Errors: ConfigError naming field, value and what to write instead.
Source: He et al. 2022, arXiv 2111.06377, tables 1 and 8; sizes: Dosovitskiy et al. 2021, arXiv 2010.11929, table 1
(tiny and small: Touvron et al. 2021, arXiv 2012.12877, table 1)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, get_args

from mae_core.errors import ConfigError
from mae_core.masking import visible_count

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Masking = Literal["random"]
Target = Literal["raw", "normalised"]


def _check_positive(config: object, *fields: str) -> None:
    for field in fields:
        value = getattr(config, field)
        if not value > 0:
            raise ConfigError(f"{field}={value} is not positive: write a number above 0")


def _check_width(width_field: str, width: int, heads_field: str, heads: int) -> None:
    if width % heads:
        raise ConfigError(f"{width_field}={width} is not divisible by {heads_field}={heads}: every head needs as many")
    if width % 4:
        raise ConfigError(
            f"{width_field}={width} is not divisible by 4: sine-cosine positions need a sine and a cosine for each "
            f"axis; write {width // 4 * 4 + 4}"
        )


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """Shape of a Vision Transformer encoder and the scale of the pixels it reads.

    Shapes: images [B, in_channels, *image_size]. Units and source: the module's. Errors: ConfigError.
    """

    image_size: tuple[int, int] = (224, 224)
    """(height, width) of an image in pixels; each side a multiple of patch_size."""
    patch_size: int = 16
    """Side of a square patch in pixels."""
    in_channels: int = 3
    """Channels of an image."""
    embed_dim: int
    """Width of a token; a multiple of num_heads and of 4."""
    depth: int
    """Number of blocks."""
    num_heads: int
    """Attention heads in a block."""
    mlp_ratio: float = 4.0
    """Width of a block's hidden MLP layer, in multiples of embed_dim."""
    layer_norm_eps: float = 1e-6
    """Added to the variance in every LayerNorm."""
    pixel_mean: tuple[float, ...] = IMAGENET_MEAN
    """Mean of each channel on the 0..1 scale, subtracted from the pixels; ImageNet's by default."""
    pixel_std: tuple[float, ...] = IMAGENET_STD
    """Standard deviation of each channel on the 0..1 scale, dividing the pixels; ImageNet's by default."""

    def __post_init__(self) -> None:
        _check_positive(self, "patch_size", "in_channels", "embed_dim", "depth", "num_heads", "mlp_ratio")
        _check_positive(self, "layer_norm_eps")
        for side, pixels in zip(("height", "width"), self.image_size, strict=True):
            if pixels < 1 or pixels % self.patch_size:
                fitting = max(1, round(pixels / self.patch_size)) * self.patch_size
                raise ConfigError(
                    f"image_size={self.image_size}: {side} {pixels} is not a multiple of patch_size={self.patch_size}; "
                    f"write {fitting}"
                )
        _check_width("embed_dim", self.embed_dim, "num_heads", self.num_heads)
        for field in ("pixel_mean", "pixel_std"):
            values = getattr(self, field)
            if len(values) != self.in_channels:
                raise ConfigError(
                    f"{field}={values} has {len(values)} values for in_channels={self.in_channels}: write one a channel"
                )
        if not all(std > 0 for std in self.pixel_std):
            raise ConfigError(f"pixel_std={self.pixel_std} is not positive throughout: write 1.0 to leave a channel")

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches in an image."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def num_patches(self) -> int:
        """L, patches in an image."""
        return self.grid[0] * self.grid[1]

    @property
    def patch_dim(self) -> int:
        """P * P * C, numbers in a patch."""
        return self.patch_size**2 * self.in_channels

    @property
    def mlp_dim(self) -> int:
        """Width of the hidden MLP layer."""
        return int(self.embed_dim * self.mlp_ratio)


@dataclass(frozen=True, kw_only=True)
class MAEConfig:
    """An encoder, the decoder that serves its pretraining, and the task: what is hidden and what is predicted.

    Units and source: the module's. Errors: ConfigError.
    """

    encoder: ViTConfig
    """The encoder; the decoder shares its grid, pixels and layer_norm_eps."""
    decoder_embed_dim: int = 512
    """Width of a token in the decoder; a multiple of decoder_num_heads and of 4."""
    decoder_depth: int = 8
    """Number of decoder blocks."""
    decoder_num_heads: int = 16
    """Attention heads in a decoder block."""
    mask_ratio: float = 0.75
    """Fraction of patches hidden from the encoder; at least one patch stays visible and one hidden."""
    masking: Masking = "random"
    """How hidden patches are chosen: `random`, each patch alike."""
    target: Target = "normalised"
    """What the decoder predicts: `raw` pixels, or pixels `normalised` by each patch's own mean and deviation."""

    def __post_init__(self) -> None:
        _check_positive(self, "decoder_embed_dim", "decoder_depth", "decoder_num_heads")
        _check_width("decoder_embed_dim", self.decoder_embed_dim, "decoder_num_heads", self.decoder_num_heads)
        for field, choices in (("masking", get_args(Masking)), ("target", get_args(Target))):
            if getattr(self, field) not in choices:
                raise ConfigError(f"{field}={getattr(self, field)!r} is unknown: write one of {', '.join(choices)}")
        visible_count(self.encoder.num_patches, self.mask_ratio)

    @property
    def visible_patches(self) -> int:
        """K, patches the encoder sees of each image."""
        return visible_count(self.encoder.num_patches, self.mask_ratio)


def tiny(**overrides: Any) -> ViTConfig:
    """ViT-Tiny/16, 5.5 M parameters; `overrides` are fields of ViTConfig. Errors and source: the module's."""
    return ViTConfig(**{"embed_dim": 192, "depth": 12, "num_heads": 3, **overrides})


def small(**overrides: Any) -> ViTConfig:
    """ViT-Small/16, 21.6 M parameters; `overrides` are fields of ViTConfig. Errors and source: the module's."""
    return ViTConfig(**{"embed_dim": 384, "depth": 12, "num_heads": 6, **overrides})


def base(**overrides: Any) -> ViTConfig:
    """ViT-Base/16, 85.6 M parameters; `overrides` are fields of ViTConfig. Errors and source: the module's."""
    return ViTConfig(**{"embed_dim": 768, "depth": 12, "num_heads": 12, **overrides})


def large(**overrides: Any) -> ViTConfig:
    """ViT-Large/16, 303 M parameters; `overrides` are fields of ViTConfig. Errors and source: the module's."""
    return ViTConfig(**{"embed_dim": 1024, "depth": 24, "num_heads": 16, **overrides})


def huge(**overrides: Any) -> ViTConfig:
    """ViT-Huge/14, 630 M parameters; `overrides` are fields of ViTConfig. Errors and source: the module's."""
    return ViTConfig(**{"embed_dim": 1280, "depth": 32, "num_heads": 16, "patch_size": 14, **overrides})


SIZES: Mapping[str, Callable[..., ViTConfig]] = MappingProxyType(
    {"tiny": tiny, "small": small, "base": base, "large": large, "huge": huge}
)
"""Named sizes, for configs that say `model.size: base`."""
