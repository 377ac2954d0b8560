"""Shapes of the encoder and of the autoencoder, as frozen dataclasses; named sizes are functions.

Shapes: grid = (rows, columns) of patches, L = rows * columns = num_patches.
Units:  image and patch sizes in pixels, ratios as fractions, pixel_mean and pixel_std on the 0..1 scale.
Errors: ConfigError naming field, value and what to write instead.
Source: He et al. 2022, arXiv 2111.06377, tables 1 and 8; sizes: Dosovitskiy et al. 2021, arXiv 2010.11929, table 1
(tiny and small: Touvron et al. 2021, arXiv 2012.12877, table 1)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, get_args

from mae_core.errors import ConfigError
from mae_core.masking import Masking, visible_count

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

ADDED_LATER: Mapping[str, Any] = {"added_later": True}
"""Metadata of a field that a config gained later, and whose default is what was done before: who makes an identity of a config
leaves it out at its default. Such a default never changes."""

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
    cls_tokens: int = field(default=1, metadata=ADDED_LATER)
    """Class tokens in front of the patches; the paper has one, Pixio eight."""
    positions: Positions = field(default="sine_cosine", metadata=ADDED_LATER)
    """`sine_cosine`, a fixed table recomputed for any grid; or `learned`, a parameter that starts as that table (fine-tuned
    encoders of the official code, supervised ones of others)."""
    pixel_mean: tuple[float, ...] = IMAGENET_MEAN
    """Mean of each channel on the 0..1 scale, subtracted from the pixels; ImageNet's by default."""
    pixel_std: tuple[float, ...] = IMAGENET_STD
    """Standard deviation of each channel on the 0..1 scale, dividing the pixels; ImageNet's by default."""

    def __post_init__(self) -> None:
        _check_positive(self, "patch_size", "in_channels", "embed_dim", "depth", "num_heads", "mlp_ratio")
        _check_positive(self, "layer_norm_eps", "cls_tokens")
        _check_choice(self, "positions", Positions)
        for side, pixels in zip(("height", "width"), self.image_size, strict=True):
            if pixels < 1 or pixels % self.patch_size:
                fitting = max(1, round(pixels / self.patch_size)) * self.patch_size
                raise ConfigError(
                    f"image_size={self.image_size}: {side} {pixels} is not a multiple of patch_size={self.patch_size}; "
                    f"write {fitting}"
                )
        _check_width("embed_dim", self.embed_dim, "num_heads", self.num_heads)
        for name in ("pixel_mean", "pixel_std"):
            values = getattr(self, name)
            if len(values) != self.in_channels:
                raise ConfigError(
                    f"{name}={values} has {len(values)} values for in_channels={self.in_channels}: write one a channel"
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
    decoder_mlp_ratio: float = field(default=4.0, metadata=ADDED_LATER)
    """Width of a decoder block's hidden MLP layer, in multiples of decoder_embed_dim."""
    mask_ratio: float = 0.75
    """Fraction of patches hidden from the encoder; at least one patch stays visible and one hidden."""
    masking: Masking = "random"
    """How hidden patches are chosen: `random` (each patch alike), `block` (few large rectangles), `grid` (visible ones regularly
    spaced), `cell` (whole cells of mask_cell x mask_cell patches)."""
    mask_cell: int = field(default=2, metadata=ADDED_LATER)
    """Side of a cell in patches; read by masking `cell` alone."""
    target: Target = "normalised"
    """What the decoder predicts: `raw` pixels, pixels `normalised` by each patch's own mean and deviation, or the first
    pca_components coefficients of a `pca` in patch space."""
    pca_components: int = field(default=96, metadata=ADDED_LATER)
    """Coefficients a patch; read by target `pca` alone."""
    encoder_input: EncoderInput = field(default="visible", metadata=ADDED_LATER)
    """`visible`: the encoder sees visible patches alone. `all`: it also sees mask tokens for the hidden ones, and the decoder
    adds none (the paper's ablation, at 3.3 times the operations)."""
    loss_on: LossOn = field(default="hidden", metadata=ADDED_LATER)
    """Patches that are predicted and judged: the `hidden` ones, or `all` (an ablation: 0.5 % worse in the paper)."""

    def __post_init__(self) -> None:
        _check_positive(self, "decoder_embed_dim", "decoder_depth", "decoder_num_heads", "decoder_mlp_ratio")
        _check_width("decoder_embed_dim", self.decoder_embed_dim, "decoder_num_heads", self.decoder_num_heads)
        _check_choice(self, "masking", Masking)
        _check_choice(self, "target", Target)
        _check_choice(self, "encoder_input", EncoderInput)
        _check_choice(self, "loss_on", LossOn)
        if not 1 <= self.mask_cell <= max(self.encoder.grid):
            raise ConfigError(
                f"mask_cell={self.mask_cell} is not in [1, {max(self.encoder.grid)}]: write 2 for 2 x 2 patches"
            )
        if self.target == "pca" and not 1 <= self.pca_components <= self.encoder.patch_dim:
            raise ConfigError(
                f"pca_components={self.pca_components} is not in [1, {self.encoder.patch_dim}], the numbers of a patch: write fewer"
            )
        visible_count(self.encoder.num_patches, self.mask_ratio)

    @property
    def visible_patches(self) -> int:
        """K, patches the encoder sees of each image."""
        return visible_count(self.encoder.num_patches, self.mask_ratio)

    @property
    def predicted_patches(self) -> int:
        """M, patches of each image that are predicted and judged."""
        hidden = self.encoder.num_patches - self.visible_patches
        return hidden if self.loss_on == "hidden" else self.encoder.num_patches

    @property
    def target_dim(self) -> int:
        """Numbers the decoder predicts for a patch."""
        return self.pca_components if self.target == "pca" else self.encoder.patch_dim

    @property
    def decoder_mlp_dim(self) -> int:
        """Width of the decoder's hidden MLP layer."""
        return int(self.decoder_embed_dim * self.decoder_mlp_ratio)


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
