"""Conversion between our weights and those of other projects: pure mappings from state dict to state dict.

`layouts` declares what other projects call their tensors, `infer` reads a config off the shapes, and `mapping` converts
weights in both directions."""

from mae_core.interop.infer import infer_autoencoder_config as infer_autoencoder_config
from mae_core.interop.infer import infer_encoder_config as infer_encoder_config
from mae_core.interop.layouts import LayoutName as LayoutName
from mae_core.interop.layouts import detect_layout as detect_layout
from mae_core.interop.layouts import encoder_prefixes as encoder_prefixes
from mae_core.interop.layouts import hf_file_names as hf_file_names
from mae_core.interop.layouts import without_wrappers as without_wrappers
from mae_core.interop.mapping import Imported as Imported
from mae_core.interop.mapping import autoencoder_from as autoencoder_from
from mae_core.interop.mapping import check_autoencoder as check_autoencoder
from mae_core.interop.mapping import check_encoder as check_encoder
from mae_core.interop.mapping import encoder_from as encoder_from
from mae_core.interop.mapping import from_hf_vitmae as from_hf_vitmae
from mae_core.interop.mapping import to_hf_vit as to_hf_vit
from mae_core.interop.mapping import to_hf_vitmae as to_hf_vitmae
from mae_core.interop.mapping import to_official_mae as to_official_mae
from mae_core.interop.mapping import to_timm as to_timm
