"""The mathematics of Masked Autoencoders: models, masking, targets, schedules and metrics, on torch and numpy alone.

Everything here is a function of its arguments. Nothing reads or writes files, looks at the clock or the environment, or
draws from a global random generator.

This module lists the public names. The shape letters in their documentation are those of the module that defines them; the
common ones are B images, C channels, H x W pixels, P the side of a patch, L patches per image, K of them visible, N values
per patch, D the width of a token, n class tokens."""

from mae_core.classification.heads import Classifier as Classifier
from mae_core.classification.heads import drop_path_scales as drop_path_scales
from mae_core.classification.metrics import TopK as TopK
from mae_core.classification.metrics import best_classes as best_classes
from mae_core.classification.metrics import topk_counts as topk_counts
from mae_core.classification.probes import AttentiveProbe as AttentiveProbe
from mae_core.classification.probes import LinearProbe as LinearProbe
from mae_core.config import ADDED_LATER as ADDED_LATER
from mae_core.config import SIZES as SIZES
from mae_core.config import MAEConfig as MAEConfig
from mae_core.config import Target as Target
from mae_core.config import ViTConfig as ViTConfig
from mae_core.config import base as base
from mae_core.config import huge as huge
from mae_core.config import large as large
from mae_core.config import small as small
from mae_core.config import tiny as tiny
from mae_core.cost import Recompute as Recompute
from mae_core.cost import activation_bytes as activation_bytes
from mae_core.cost import classifier_training_flops as classifier_training_flops
from mae_core.cost import decoder_flops as decoder_flops
from mae_core.cost import encoder_activation_bytes as encoder_activation_bytes
from mae_core.cost import encoder_flops as encoder_flops
from mae_core.cost import forward_flops as forward_flops
from mae_core.cost import parameter_count as parameter_count
from mae_core.cost import training_flops as training_flops
from mae_core.errors import ConfigError as ConfigError
from mae_core.interop import Imported as Imported
from mae_core.interop import LayoutName as LayoutName
from mae_core.interop import autoencoder_from as autoencoder_from
from mae_core.interop import detect_layout as detect_layout
from mae_core.interop import encoder_from as encoder_from
from mae_core.interop import from_hf_vitmae as from_hf_vitmae
from mae_core.interop import hf_file_names as hf_file_names
from mae_core.interop import infer_autoencoder_config as infer_autoencoder_config
from mae_core.interop import infer_encoder_config as infer_encoder_config
from mae_core.interop import to_hf_vit as to_hf_vit
from mae_core.interop import to_hf_vitmae as to_hf_vitmae
from mae_core.interop import to_official_mae as to_official_mae
from mae_core.interop import to_timm as to_timm
from mae_core.losses import cross_entropy_per_sample as cross_entropy_per_sample
from mae_core.losses import mse_per_sample as mse_per_sample
from mae_core.mae import MAEOutput as MAEOutput
from mae_core.mae import MaskedAutoencoder as MaskedAutoencoder
from mae_core.masking import Masked as Masked
from mae_core.masking import mask_patches as mask_patches
from mae_core.masking import random_mask as random_mask
from mae_core.masking import visible_count as visible_count
from mae_core.optimisation.lars import LARS as LARS
from mae_core.optimisation.parameter_groups import ParameterGroup as ParameterGroup
from mae_core.optimisation.parameter_groups import parameter_groups as parameter_groups
from mae_core.optimisation.schedules import scaled_lr as scaled_lr
from mae_core.optimisation.schedules import warmup_cosine as warmup_cosine
from mae_core.optimisation.schedules import warmup_stable_decay as warmup_stable_decay
from mae_core.patches import PixelScale as PixelScale
from mae_core.patches import denormalise_pixels as denormalise_pixels
from mae_core.patches import gather_patches as gather_patches
from mae_core.patches import normalise_pixels as normalise_pixels
from mae_core.patches import patchify as patchify
from mae_core.patches import unpatchify as unpatchify
from mae_core.positions import interpolate_positions as interpolate_positions
from mae_core.positions import resized_encoder as resized_encoder
from mae_core.positions import sine_cosine_2d as sine_cosine_2d
from mae_core.randomness import hash64 as hash64
from mae_core.randomness import key64 as key64
from mae_core.randomness import mask_noise as mask_noise
from mae_core.randomness import permutation as permutation
from mae_core.randomness import uniform_rows as uniform_rows
from mae_core.randomness import uniforms as uniforms
from mae_core.reference import reference_forward as reference_forward
from mae_core.targets import PatchBasis as PatchBasis
from mae_core.targets import patch_basis as patch_basis
from mae_core.targets import patches_of as patches_of
from mae_core.targets import target_of as target_of
from mae_core.vit import Block as Block
from mae_core.vit import MaskTokens as MaskTokens
from mae_core.vit import ViTEncoder as ViTEncoder
from mae_core.vit import initialise as initialise
