"""transformers' ViTModel, ViTMAEForPreTraining and, for a fine-tuned classifier, BeitForImageClassification.

ViTForImageClassification reads the class token, while the classifiers here read the mean of the patch tokens through a norm of
its own. Of transformers' plain ViTs, Beit computes exactly that (`use_mean_pooling`), once its options are switched off. Its keys
have no bias; ours can be left out, because it adds the same number to all scores of a query, and softmax ignores that.
Errors: ConfigError for a config that transformers cannot represent."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from safetensors.torch import save
from torch import Tensor

from mae_core.config import MAEConfig, ViTConfig
from mae_core.interop import hf_file_names, to_hf_vit, to_hf_vitmae
from pipeline.errors import ConfigError
from pipeline.storage import Store
from pipeline.weights.exports.card import README, Origin, Usage, card, normalised_pixels
from pipeline.weights.exports.classifier_tensors import as_encoder, head_of
from pipeline.weights.own import CONFIG, MODEL

PREPROCESSOR = "preprocessor_config.json"
_BICUBIC = 3  # PIL.Image.Resampling.BICUBIC


def write_hf_encoder(store: Store, weights: Mapping[str, Tensor], config: ViTConfig, origin: Origin) -> tuple[str, ...]:
    """Write a ViTModel; return the keys of the files."""
    code = (
        'from transformers import ViTModel\n\nmodel = ViTModel.from_pretrained(".", add_pooling_layer=False).eval()\n'
        "tokens = model(pixel_values=pixels).last_hidden_state  # class token first"
    )
    settings = {**_hf_config(config), "architectures": ["ViTModel"], "model_type": "vit"}
    readme = card(config, _usage("encoder", code, config), origin)
    return _write(store, hf_file_names(to_hf_vit(weights, config)), settings, readme, config)


def write_hf_autoencoder(
    store: Store, weights: Mapping[str, Tensor], config: MAEConfig, origin: Origin
) -> tuple[str, ...]:
    """Write a ViTMAEForPreTraining; return the keys of the files."""
    encoder = config.encoder
    if encoder.image_size[0] != encoder.image_size[1]:
        raise ConfigError(
            f"image_size={encoder.image_size}: ViTMAEForPreTraining takes only square images. Export the encoder instead"
        )
    code = (
        'from transformers import ViTMAEForPreTraining\n\nmodel = ViTMAEForPreTraining.from_pretrained(".").eval()\n'
        "prediction = model(pixel_values=pixels).logits"
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
    readme = card(encoder, _usage("masked autoencoder", code, encoder), origin)
    return _write(store, hf_file_names(to_hf_vitmae(weights, config)), settings, readme, encoder)


def write_hf_classifier(
    store: Store, weights: Mapping[str, Tensor], config: ViTConfig, classes: Sequence[str], origin: Origin
) -> tuple[str, ...]:
    """Write a BeitForImageClassification; return the keys of the files."""
    if config.image_size[0] != config.image_size[1]:
        raise ConfigError(
            f"image_size={config.image_size}: BeitForImageClassification takes only square images. Export it for timm instead"
        )
    named = hf_file_names(to_hf_vit(as_encoder(weights), config))
    tensors = {
        f"beit.{name.replace('layernorm.', 'pooler.layernorm.') if name.startswith('layernorm.') else name}": value
        for name, value in named.items()
        if not name.endswith(".attention.attention.key.bias")
    } | {f"classifier.{name}": value for name, value in head_of(weights).items()}
    settings = {
        **_hf_config(config),
        "architectures": ["BeitForImageClassification"],
        "model_type": "beit",
        "use_mean_pooling": True,
        "use_absolute_position_embeddings": True,
        "use_relative_position_bias": False,
        "use_shared_relative_position_bias": False,
        "use_mask_token": False,
        "layer_scale_init_value": 0.0,
        "drop_path_rate": 0.0,
        "id2label": {str(number): name for number, name in enumerate(classes)},
        "label2id": {name: number for number, name in enumerate(classes)},
    }
    code = (
        "from transformers import AutoModelForImageClassification\n\n"
        'model = AutoModelForImageClassification.from_pretrained(".").eval()\n'
        "logits = model(pixel_values=pixels).logits  # model.config.id2label has the names"
    )
    notes = (
        "The class is BeitForImageClassification, because that of ViT reads the class token and this model the mean of the patch "
        "tokens."
    )
    readme = card(config, _usage("image classifier", code, config, notes), origin, classes=classes)
    return _write(store, tensors, settings, readme, config)


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


def _usage(what: str, code: str, config: ViTConfig, notes: str = "") -> Usage:
    return Usage(library="transformers", what=what, code=code, pixels=normalised_pixels(config), notes=notes)


def _write(
    store: Store, tensors: Mapping[str, Tensor], settings: Mapping[str, Any], readme: bytes, config: ViTConfig
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
    named = {name: value.contiguous() for name, value in tensors.items()}
    # From the tensors themselves, so that config.json states the type that the file holds.
    dtype = str(next(iter(named.values())).dtype).removeprefix("torch.")
    store.write(MODEL, save(named, metadata={"format": "pt"}))  # transformers 4 refuses files without this metadata
    store.write(PREPROCESSOR, _json(preprocessor))
    store.write(README, readme)
    store.write(CONFIG, _json({**settings, "torch_dtype": dtype}))
    return MODEL, PREPROCESSOR, README, CONFIG


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True).encode()
