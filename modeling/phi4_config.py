"""Phi-4-Multimodal's two configs, Microsoft's (`phi4mm`) and transformers' own (`phi4_multimodal`), to ours and back.

Microsoft's code fixes the sizes of the vision tower and the ids of both placeholders; where ours differ, they are
written into its config under the names of the other layout, and read from there.

Transformers' config is imported inside functions: this module is loaded in the middle of transformers' own import.
"""

import copy
import re
from typing import Any

LAYOUTS = ("phi4mm", "phi4_multimodal")
PROJECTIONS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
SHARED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps"),
    *("use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "attention_dropout"),
)
"""Fields of the decoder that have one name in all three."""
SAME_AS_NATIVE = (
    *("rope_scaling", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"),
    *("sliding_window", "resid_pdrop", "embd_pdrop"),
)
"""Further fields that the other two have alike."""
OURS_ALONE = ("rope_mode",)
"""Fields of the decoder that neither layout has; written where they are not the default, under the same name."""
AUDIO_NAMES = {
    "attention_dim": "hidden_size",
    "attention_heads": "num_attention_heads",
    "linear_units": "intermediate_size",
    "depthwise_seperable_out_channel": "depthwise_separable_out_channel",
}
"""Microsoft's name -> transformers', where they differ."""
AUDIO_SAME = (
    *("activation", "chunk_size", "conv_activation", "conv_glu_type", "depthwise_multiplier", "dropout_rate"),
    *("ext_pw_out_channel", "input_size", "kernel_size", "left_chunk", "num_blocks", "time_reduction"),
)
FIXED_AUDIO = {
    "activation_checkpointing": {"interval": 1, "module": "transformer", "offload": False},
    "batch_norm": False,
    "bias_in_glu": True,
    "causal": True,
    "cnn_layer_norm": True,
    "ext_pw_kernel_size": 1,
    "input_layer": "nemo_conv",
}
IMAGE_EMBEDDING = {
    "embedding_cls": "tune_image",
    "enable_gradient_checkpointing": True,
    "hd_transform_order": "sub_glb",
    "image_token_compression_cls": "avg_pool_2d",
    "projection_cls": "mlp",
    "use_hd_transform": True,
    "with_learnable_separator": True,
}
AUDIO_EMBEDDING = {
    "compression_rate": 8,
    "embedding_cls": "audio",
    "enable_gradient_checkpointing": True,
    "projection_cls": "mlp",
    "use_conv_downsample": False,
    "use_qformer": False,
}
FIXED_VISION = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size"),
    *("num_channels", "hidden_act", "layer_norm_eps"),
)
TARGETS = {
    "vision": r"layers.*((self_attn\.(qkv_proj|o_proj))|(mlp\.(gate_up|down)_proj))",
    "speech": r"((layers.*self_attn\.(qkv|o)_proj)|(layers.*mlp\.(gate_up|down)_proj))",
}
"""Microsoft's patterns of the projections that an adapter sits on."""


def is_phi4(config: dict[str, Any]) -> bool:
    """Whether a config is in one of Phi-4's layouts, not yet in ours."""
    return config.get("model_type") in LAYOUTS and "text_config" not in config


def from_phi4(config: dict[str, Any]) -> dict[str, Any]:
    """A config of either layout in our terms; any other one is given back as it is.

    Raises:
        ValueError: something that the released model does not have and we do not build; it is named.
    """
    if not is_phi4(config):
        return config
    if config["model_type"] == "phi4_multimodal":
        return _from_native(config, {})
    adapters = {name: _read_adapter(name, config[f"{name}_lora"]) for name in TARGETS if config.get(f"{name}_lora")}
    return _from_native(_native_from_phi4mm(config), adapters)


def _native_from_phi4mm(config: dict[str, Any]) -> dict[str, Any]:
    """Microsoft's config under transformers' names."""
    audio = config["audio_processor"]["config"]
    image, clip = config["embd_layer"]["image_embd_layer"], config["embd_layer"]["audio_embd_layer"]
    for place, given, wanted in (
        ("audio_processor.config", audio, {k: v for k, v in FIXED_AUDIO.items() if k != "activation_checkpointing"}),
        ("embd_layer.image_embd_layer", image, IMAGE_EMBEDDING),
        ("embd_layer.audio_embd_layer", clip, AUDIO_EMBEDDING),
    ):
        for field, value in wanted.items():
            if field != "enable_gradient_checkpointing" and given.get(field, value) != value:
                raise ValueError(f"{place}.{field} is {given[field]!r}, only {value!r} is supported")
    bias = audio["relative_attention_bias_args"]
    native = {name: config[name] for name in SHARED if name in config}
    native |= {name: config[name] for name in (*SAME_AS_NATIVE, *OURS_ALONE) if config.get(name) is not None}
    if native.get("eos_token_id") == 199999:  # its generation_config adds the end of a turn
        native["eos_token_id"] = [199999, 200020]
    native["dtype"] = config.get("dtype", config.get("torch_dtype"))
    vision = {"crop_size": image["crop_size"]} | config.get("vision_config", {})
    if "image_token_id" in config:
        vision["image_token_id"] = config["image_token_id"]
    native["vision_config"] = vision
    native["audio_config"] = (
        {new: audio[old] for old, new in AUDIO_NAMES.items()}
        | {name: audio[name] for name in AUDIO_SAME if name in audio}
        | {
            "bias_max_distance": bias["t5_bias_max_distance"],
            "bias_symmetric": bias.get("t5_bias_symmetric", False),
            "nemo_conv_channels": audio["nemo_conv_settings"]["conv_channels"],
            "downsample_rate": clip["downsample_rate"],
        }
        | ({"audio_token_id": config["audio_token_id"]} if "audio_token_id" in config else {})
    )
    return native


def _read_adapter(name: str, spec: dict[str, Any]) -> dict[str, Any]:
    """An entry of `config.adapters` from Microsoft's `vision_lora` or `speech_lora`."""
    places = {p: f"layers.0.{'mlp' if p in ('gate_up_proj', 'down_proj') else 'self_attn'}.{p}" for p in PROJECTIONS}
    targets = [p for p, place in places.items() if re.fullmatch(spec["layer"], place)]
    if not targets:
        raise ValueError(f"{name}_lora.layer {spec['layer']!r} fits none of {PROJECTIONS}")
    return {"r": spec["r"], "alpha": spec["lora_alpha"], "dropout": spec["dp"], "target_modules": targets}


def _from_native(config: dict[str, Any], adapters: dict[str, Any]) -> dict[str, Any]:
    """Transformers' config in our terms."""
    from transformers.models.phi4_multimodal.configuration_phi4_multimodal import Phi4MultimodalConfig

    left_out = ("model_type", "auto_map", *OURS_ALONE)
    fields = copy.deepcopy({k: v for k, v in config.items() if k not in left_out})  # it is changed
    native: Any = Phi4MultimodalConfig(**fields)
    vision, audio = native.vision_config, native.audio_config
    window = native.sliding_window
    if window is not None and window < native.max_position_embeddings:
        raise ValueError(f"sliding_window {window} is below max_position_embeddings {native.max_position_embeddings}")
    if native.resid_pdrop or native.embd_pdrop:
        raise ValueError(f"resid_pdrop {native.resid_pdrop} and embd_pdrop {native.embd_pdrop} must be 0")
    rope = dict(native.rope_parameters)
    if rope["rope_type"] == "longrope":
        rope["original_max_position_embeddings"] = native.original_max_position_embeddings
    rope.pop("type", None)
    patches = vision.image_size // vision.patch_size
    return {
        "model_type": "mixlora",
        "dtype": config.get("dtype", config.get("torch_dtype")),
        "text_config": {name: getattr(native, name) for name in SHARED}
        | {name: config[name] for name in OURS_ALONE if name in config}
        | {"rope_parameters": rope, "fused_projections": True},
        "vision_config": vision.to_dict(),
        "speech_config": audio.to_dict(),
        "image_token_id": vision.image_token_id,
        "audio_token_id": audio.audio_token_id,
        "vision_layers": [vision.feature_layer],
        "vision_tokens_per_side": (patches + 1) // 2,
        "speech_stack": audio.downsample_rate,
        "projector_norm": False,
        "adapters": adapters,
    }


def to_native(config: Any) -> dict[str, Any]:
    """Our config as transformers' `phi4_multimodal`, adapters left out.

    Raises:
        ValueError: the model is not built like Phi-4-Multimodal; what differs is named.
    """
    from transformers.models.phi4_multimodal.configuration_phi4_multimodal import Phi4MultimodalConfig

    _require_phi4(config)
    text, vision, speech = config.text_config, config.vision_config.to_dict(), config.speech_config.to_dict()
    native = Phi4MultimodalConfig(
        **{name: getattr(text, name) for name in SHARED},
        rope_parameters=dict(text.rope_parameters),
        original_max_position_embeddings=text.rope_parameters.get("original_max_position_embeddings"),
        sliding_window=None,
        vision_config=vision | {"image_token_id": config.image_token_id, "feature_layer": config.vision_layers[0]},
        audio_config=speech | {"audio_token_id": config.audio_token_id, "downsample_rate": config.speech_stack},
        architectures=["Phi4MultimodalForCausalLM"],
        dtype=config.dtype,
    )
    return native.to_dict() | _ours_alone(text)


def _ours_alone(text: Any) -> dict[str, Any]:
    """Fields of a decoder's config that the layouts do not have, where they are not the default."""
    usual = type(text)
    return {name: getattr(text, name) for name in OURS_ALONE if getattr(text, name) != getattr(usual, name)}


def to_phi4mm(config: Any) -> dict[str, Any]:
    """Our config as Microsoft's `phi4mm`.

    Raises:
        ValueError: the model is not built like Phi-4-Multimodal, or its adapters are not its two; the cause is named.
    """
    _require_phi4(config)
    if set(config.adapters) != set(TARGETS):
        raise ValueError(f"the layout holds adapters {sorted(TARGETS)}, this model has {sorted(config.adapters)}")
    native = to_native(config)
    text, audio, vision = config.text_config, native["audio_config"], native["vision_config"]
    rope = dict(text.rope_parameters)
    eos = text.eos_token_id
    result = {name: getattr(text, name) for name in SHARED} | {
        "model_type": "phi4mm",
        "architectures": ["Phi4MMForCausalLM"],
        "auto_map": {
            "AutoConfig": "microsoft/Phi-4-multimodal-instruct--configuration_phi4mm.Phi4MMConfig",
            "AutoModelForCausalLM": "microsoft/Phi-4-multimodal-instruct--modeling_phi4mm.Phi4MMForCausalLM",
        },
        "eos_token_id": eos[0] if isinstance(eos, list) else eos,
        "torch_dtype": str(native["dtype"]).removeprefix("torch.") if native.get("dtype") else None,
        "attention_bias": False,
        "mlp_bias": False,
        "lm_head_bias": False,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "full_attn_mod": 1,
        "interpolate_factor": 1,
        "sliding_window": 2 * text.max_position_embeddings,  # as released: too long to act
        "rope_theta": rope["rope_theta"],
        "partial_rotary_factor": rope.get("partial_rotary_factor", 1.0),
        "original_max_position_embeddings": rope.get("original_max_position_embeddings", text.max_position_embeddings),
        "img_processor": None,
        "audio_processor": {"name": "cascades", "config": _phi4mm_audio(audio)},
        "embd_layer": {
            "embedding_cls": "image_audio",
            "image_embd_layer": IMAGE_EMBEDDING | {"crop_size": vision["crop_size"]},
            "audio_embd_layer": AUDIO_EMBEDDING | {"downsample_rate": config.speech_stack},
        },
    }
    if rope["rope_type"] == "longrope":
        result["rope_scaling"] = {"type": "longrope"} | {k: rope[k] for k in ("long_factor", "short_factor")}
    for name, pattern in TARGETS.items():
        spec = config.adapters[name]
        _require_uniform(name, spec)
        result[f"{name}_lora"] = {
            "r": spec["r"],
            "lora_alpha": spec["alpha"],
            "dp": spec["dropout"],
            "layer": pattern if _acts_everywhere(spec) else _pattern_of(spec["target_modules"]),
        }
    return result | _ours_alone(text) | hard_coded_differences(config)


def _phi4mm_audio(audio: dict[str, Any]) -> dict[str, Any]:
    """`audio_processor.config` from transformers' audio config."""
    return (
        FIXED_AUDIO
        | {old: audio[new] for old, new in AUDIO_NAMES.items()}
        | {name: audio[name] for name in AUDIO_SAME}
        | {
            "encoder_embedding_config": {"input_size": audio["input_size"]},
            "nemo_conv_settings": {"conv_channels": audio["nemo_conv_channels"]},
            "relative_attention_bias_args": {"t5_bias_max_distance": audio["bias_max_distance"], "type": "t5"}
            | ({"t5_bias_symmetric": True} if audio["bias_symmetric"] else {}),
        }
    )


def hard_coded_differences(config: Any) -> dict[str, Any]:
    """What differs from the sizes and ids that Microsoft's code and vLLM fix, as further fields of its config."""
    from transformers.models.phi4_multimodal import configuration_phi4_multimodal as phi4

    usual, vision = phi4.Phi4MultimodalVisionConfig(), config.vision_config
    result: dict[str, Any] = {}
    if changed := {n: getattr(vision, n) for n in FIXED_VISION if getattr(vision, n) != getattr(usual, n)}:
        result["vision_config"] = changed
    if config.vision_layers != [usual.feature_layer]:
        result.setdefault("vision_config", {})["feature_layer"] = config.vision_layers[0]
    if config.image_token_id != usual.image_token_id:
        result["image_token_id"] = config.image_token_id
    if config.audio_token_id != phi4.Phi4MultimodalAudioConfig().audio_token_id:
        result["audio_token_id"] = config.audio_token_id
    return result


def _acts_everywhere(spec: dict[str, Any]) -> bool:
    targets = spec["target_modules"]
    return targets is None or set(targets) == set(PROJECTIONS)


def _require_uniform(name: str, spec: dict[str, Any]) -> None:
    """Raises ValueError for an adapter of several ranks or alphas, or in some layers only."""
    paths = [target for target in spec["target_modules"] or () if "." in target]
    if differs := paths or spec.get("rank_pattern") or spec.get("alpha_pattern"):
        raise ValueError(f"the layout holds one rank and alpha an adapter, in all layers; {name!r} has {differs}")


def _pattern_of(targets: list[str]) -> str:
    """A pattern of Microsoft's kind for some of the projections."""
    return rf"layers.*\.({'|'.join(targets)})"


def _require_phi4(config: Any) -> None:
    """Raises ValueError for a model that the layouts cannot express."""
    kinds = {name: getattr(getattr(config, name), "model_type", None) for name in ("vision_config", "speech_config")}
    text = config.text_config
    rope = text.rope_parameters["rope_type"]
    for what, given, wanted in (
        ("vision_config.model_type", kinds["vision_config"], "phi4_multimodal_vision"),
        ("speech_config.model_type", kinds["speech_config"], "phi4_multimodal_audio"),
        ("text_config.fused_projections", text.fused_projections, True),
        ("text_config.attention_bias", text.attention_bias, False),
        ("text_config.attention_output_bias", text.attention_output_bias, False),
        ("text_config.mlp_bias", text.mlp_bias, False),
        ("text_config.qk_norm", text.qk_norm, False),
        ("text_config.is_gated_act", text.is_gated_act, True),
        ("text_config.norm_epsilon", text.norm_epsilon, None),
        ("text_config.sliding_window", text.sliding_window, None),
        ("text_config.head_dim", text.head_dim, text.hidden_size // text.num_attention_heads),
        ("projector_norm", config.projector_norm, False),
        ("projector_hidden_size", config.projector_hidden_size or text.hidden_size, text.hidden_size),
        ("speech_context", config.speech_context, None),
        ("speech_letters", config.speech_letters, None),
        ("vision_detail", config.vision_detail, None),
        ("vision_letters", config.vision_letters, None),
        ("vision_names", config.vision_names, None),
        ("number of vision_layers", len(config.vision_layers), 1),
        ("base_model", config.base_model or None, None),
        ("merged_adapter", config.merged_adapter, None),
        ("rope_type", rope if rope in ("default", "longrope") else None, rope),
    ):
        if given != wanted:
            raise ValueError(f"Phi-4's layouts cannot hold this model: {what} is {given!r}, expected {wanted!r}")
