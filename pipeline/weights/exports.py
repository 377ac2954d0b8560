"""Export weights for other programs: one folder per export, with a README on how to load them and scale the pixels.

    timm         model.safetensors, config.json (for timm.create_model("local-dir:...")), README.md
    huggingface  model.safetensors, config.json, preprocessor_config.json, README.md; tensors under the names in transformers'
                 files, which versions 4 and 5 read
    safetensors  encoder.safetensors (or all three files of a pretraining) and config.json: our own names, read by import_encoder
The weights are written first and config.json last, each file atomically. Position embeddings are stored as tables where the
other program expects tables. Errors: ConfigError for a config that the other program cannot represent."""

import json
from collections.abc import Mapping
from typing import Any, Literal

from safetensors.torch import save
from torch import Tensor

from mae_core.config import SIZES, MAEConfig, ViTConfig
from mae_core.interop import hf_file_names, to_hf_vit, to_hf_vitmae, to_timm
from pipeline.errors import ConfigError
from pipeline.graph.step import canonical
from pipeline.storage import Store
from pipeline.weights.own import CONFIG, ENCODER, MODEL, write_weights

PREPROCESSOR = "preprocessor_config.json"
README = "README.md"

TIMM_NAMES = {
    "tiny": "vit_tiny_patch16_224",
    "small": "vit_small_patch16_224",
    "base": "vit_base_patch16_224",
    "large": "vit_large_patch16_224",
    "huge": "vit_huge_patch14_224",
}
"""timm's names for the named sizes of mae_core."""
TIMM_LAYER_NORM_EPS = 1e-6
_BICUBIC = 3  # PIL.Image.Resampling.BICUBIC


def export_encoder(
    store: Store,
    weights: Mapping[str, Tensor],
    config: ViTConfig,
    *,
    to: Literal["timm", "huggingface", "safetensors"],
) -> tuple[str, ...]:
    """Write the weights of ViTEncoder(config) to a folder; return the keys of its files."""
    match to:
        case "timm":
            return _export_to_timm(store, weights, config)
        case "huggingface":
            card = _card(
                config,
                "from transformers import ViTModel\n\n"
                'model = ViTModel.from_pretrained(".", add_pooling_layer=False)\n'
                "tokens = model(pixel_values=pixels).last_hidden_state  # class token first",
            )
            settings = {**_hf_config(config), "architectures": ["ViTModel"], "model_type": "vit"}
            return _write_hf(store, to_hf_vit(weights, config), settings, card, config)
        case "safetensors":
            # safetensors refuses views with strides.
            store.write(ENCODER, save({name: value.contiguous() for name, value in weights.items()}))
            store.write(CONFIG, _json({"encoder": canonical(config)}))
            return ENCODER, CONFIG
    raise _unknown_target(to, "timm, huggingface, safetensors")


def export_autoencoder(
    store: Store,
    weights: Mapping[str, Tensor],
    config: MAEConfig,
    *,
    to: Literal["huggingface", "safetensors"],
) -> tuple[str, ...]:
    """Write the weights of MaskedAutoencoder(config) to a folder; return the keys of its files."""
    match to:
        case "huggingface":
            encoder = config.encoder
            if encoder.image_size[0] != encoder.image_size[1]:
                raise ConfigError(
                    f"image_size={encoder.image_size}: ViTMAEForPreTraining takes only square images. Export the encoder instead"
                )
            card = _card(
                encoder,
                "from transformers import ViTMAEForPreTraining\n\n"
                'model = ViTMAEForPreTraining.from_pretrained(".")\n'
                "prediction = model(pixel_values=pixels).logits",
            )
            settings = {
                **_hf_config(encoder),
                "architectures": ["ViTMAEForPreTraining"],
                "model_type": "vit_mae",
                "decoder_hidden_size": config.decoder_embed_dim,
                "decoder_num_hidden_layers": config.decoder_depth,
                "decoder_num_attention_heads": config.decoder_num_heads,
                "decoder_intermediate_size": config.decoder_mlp_dim,
                "mask_ratio": config.mask_ratio,
                "norm_pix_loss": config.target == "normalised",
            }
            return _write_hf(store, to_hf_vitmae(weights, config), settings, card, encoder)
        case "safetensors":
            return write_weights(store, weights, config)
    raise _unknown_target(to, "huggingface, safetensors")


def _export_to_timm(store: Store, weights: Mapping[str, Tensor], config: ViTConfig) -> tuple[str, ...]:
    if config.layer_norm_eps != TIMM_LAYER_NORM_EPS:
        raise ConfigError(
            f"layer_norm_eps={config.layer_norm_eps}: timm builds these models with {TIMM_LAYER_NORM_EPS}. If that small "
            f"difference is acceptable, export with replace(config, layer_norm_eps={TIMM_LAYER_NORM_EPS})"
        )
    name, arguments = timm_model(config)
    settings = {
        "architecture": name,
        "num_classes": 0,
        "num_features": config.embed_dim,
        "global_pool": "token",
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [config.in_channels, *config.image_size],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "mean": list(config.pixel_mean),
            "std": list(config.pixel_std),
            "num_classes": 0,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    keywords = "".join(f", {key}={value!r}" for key, value in arguments.items())
    card = _card(
        config,
        "import timm\n\n"
        'model = timm.create_model("local-dir:.", pretrained=True)\n'
        "tokens = model.forward_features(pixels)  # class token first\n",
        f"With an older timm:\n\n"
        f"```python\n"
        f"import timm\n"
        f"from safetensors.torch import load_file\n\n"
        f'model = timm.create_model("{name}", num_classes=0{keywords})\n'
        f'model.load_state_dict(load_file("{MODEL}"))\n'
        f"```\n",
    )
    # config.json comes last: a folder that has one is complete
    store.write(MODEL, save({key: value.contiguous() for key, value in to_timm(weights, config).items()}))
    store.write(README, card.encode())
    store.write(CONFIG, _json(settings))
    return MODEL, README, CONFIG


def timm_model(config: ViTConfig) -> tuple[str, dict[str, Any]]:
    """Return the name and keyword arguments with which timm.create_model builds a model of this shape.

    A named size at 224 pixels needs no arguments."""
    images = {"img_size": list(config.image_size), "in_chans": config.in_channels}
    for size, name in TIMM_NAMES.items():
        named = SIZES[size]()
        if _blocks(named) == _blocks(config):
            standard = {"img_size": list(named.image_size), "in_chans": named.in_channels}
            return name, {key: value for key, value in images.items() if value != standard[key]}
    # Any model will do as a template once its sizes are all given as arguments.
    return TIMM_NAMES["base"], {**images, **_blocks(config)}


def _blocks(config: ViTConfig) -> dict[str, Any]:
    """Return the part of a model's shape that does not depend on its images, in timm's terms."""
    return {
        "patch_size": config.patch_size,
        "embed_dim": config.embed_dim,
        "depth": config.depth,
        "num_heads": config.num_heads,
        "mlp_ratio": config.mlp_ratio,
    }


def _hf_config(config: ViTConfig) -> dict[str, Any]:
    height, width = config.image_size
    return {
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.mlp_dim,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": config.layer_norm_eps,
        "image_size": height if height == width else [height, width],
        "patch_size": config.patch_size,
        "num_channels": config.in_channels,
        "qkv_bias": True,
    }


def _write_hf(
    store: Store, tensors: Mapping[str, Tensor], settings: Mapping[str, Any], card: str, config: ViTConfig
) -> tuple[str, ...]:
    preprocessor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": config.image_size[0], "width": config.image_size[1]},
        "resample": _BICUBIC,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.pixel_mean),
        "image_std": list(config.pixel_std),
    }
    named = {name: value.contiguous() for name, value in hf_file_names(tensors).items()}
    # From the tensors themselves, so that config.json states the type that the file holds.
    dtype = str(next(iter(named.values())).dtype).removeprefix("torch.")
    store.write(MODEL, save(named, metadata={"format": "pt"}))  # transformers 4 refuses files without this metadata
    store.write(PREPROCESSOR, _json(preprocessor))
    store.write(README, card.encode())
    store.write(CONFIG, _json({**settings, "torch_dtype": dtype}))
    return MODEL, PREPROCESSOR, README, CONFIG


def _card(config: ViTConfig, code: str, appendix: str = "") -> str:
    height, width = config.image_size
    return (
        f"# Vision Transformer, {config.depth} blocks of width {config.embed_dim}, {height} x {width} pixels\n\n"
        f"In this folder:\n\n```python\n{code.rstrip()}\n```\n\n"
        f"`pixels` is float32 [batch, {config.in_channels}, {height}, {width}]: (image / 255 - mean) / std with mean "
        f"{list(config.pixel_mean)}, std {list(config.pixel_std)}.\n" + (f"\n{appendix}" if appendix else "")
    )


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True).encode()


def _unknown_target(to: str, known: str) -> ConfigError:
    return ConfigError(f"to={to!r} is unknown: write one of {known}")
