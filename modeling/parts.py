"""Builds a model from parts: decoder, vision tower, speech tower; each a folder, a hub id, a config or a model."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from .configuration_mixlora import MixLoraTextConfig

Part: TypeAlias = str | Path | PreTrainedConfig | PreTrainedModel
PROJECTION = re.compile(r"\.((?:q|k|v|o|qkv|gate|up|gate_up|down)_proj|c_fc|c_proj)\.")
# Decoders that ours can be -> what its config says in other words; fields of the same name are taken over.
FAMILIES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "llama": lambda config: {"attention_output_bias": config.attention_bias},
    "mistral": lambda config: {},
    "qwen2": lambda config: {"attention_bias": True},
    "qwen3": lambda config: {"qk_norm": True, "attention_output_bias": config.attention_bias},
    "phi3": lambda config: {"fused_projections": True, "residual_dropout": config.resid_pdrop},
    "starcoder2": lambda config: {
        "is_gated_act": False,
        "attention_bias": config.use_bias,
        "attention_output_bias": config.use_bias,
        "mlp_bias": config.use_bias,
    },
}


def translate_text_config(config: PreTrainedConfig) -> MixLoraTextConfig:
    """The decoder config of a family in our terms.

    Raises:
        ValueError: the model type is not one of [`FAMILIES`], or the attention window slides in some layers only.
    """
    if isinstance(config, MixLoraTextConfig):
        return config
    if config.model_type not in FAMILIES:
        raise ValueError(f"decoder: model type {config.model_type!r} is not one of {sorted(FAMILIES)}")
    names = set(MixLoraTextConfig.__dataclass_fields__) - {"dtype", "architectures"}
    same = {name: value for name, value in config.to_dict().items() if name in names and value is not None}
    kinds = set(getattr(config, "layer_types", None) or ())
    window = same.pop("sliding_window", None)
    if window is not None and window < config.max_position_embeddings:  # else it is too wide to act
        if len(kinds) > 1:
            raise ValueError(f"decoder: layers of different kinds ({sorted(kinds)}) are not supported")
        same["sliding_window"] = window
    return MixLoraTextConfig(**(same | FAMILIES[config.model_type](config)))


def decoder_key(name: str) -> str:
    """A tensor's name in a Llama-like checkpoint -> its name in ours."""
    name = PROJECTION.sub(r".\1.base_layer.", name)
    return name if name.startswith("lm_head") else name.replace("model.", "model.language_model.", 1)


def resolve(
    part: Part, loader: Any = AutoModel, inner: str = ""
) -> tuple[PreTrainedConfig, dict[str, torch.Tensor] | None]:
    """Config and weights of a part; weights are None where only a config is given.

    Args:
        inner: field of the config that is wanted where a folder or hub id holds more, such as a whole CLIP.
    """
    if isinstance(part, PreTrainedConfig):
        return part, None
    if isinstance(part, PreTrainedModel):
        return part.config, part.state_dict()
    config = AutoConfig.from_pretrained(part)
    config = getattr(config, inner, config) if inner else config
    loader = WhisperEncoder if config.model_type == "whisper" else loader
    return config, loader.from_pretrained(part, config=config, dtype=torch.float32).state_dict()


def load_tower(tower: nn.Module, state: dict[str, torch.Tensor] | None, what: str) -> None:
    """Copies weights into a tower.

    Raises:
        ValueError: the tower has tensors that `state` lacks. What `state` has beyond them is not used: layers behind
            the last feature layer are pruned on purpose.
    """
    if state is None:
        return
    missing, _ = tower.encoder.load_state_dict(state, strict=False)
    if missing:
        raise ValueError(f"{what}: the checkpoint lacks {missing[:5]}{' ...' if len(missing) > 5 else ''}")


def build(model_class: Any, decoder: Part, vision: Part | None, speech: Part | None, options: dict[str, Any]) -> Any:
    """See [`MixLoraForConditionalGeneration.from_parts`]."""
    text_config, text_state = resolve(decoder, AutoModelForCausalLM)
    vision_config, vision_state = (None, None) if vision is None else resolve(vision, inner="vision_config")
    speech_config, speech_state = (None, None) if speech is None else resolve(speech, inner="audio_config")
    config = model_class.config_class(
        text_config=translate_text_config(text_config).to_dict(),
        vision_config=vision_config,
        speech_config=speech_config,
        **options,
    )
    model = model_class(config)
    if text_state is not None:
        state = {decoder_key(name): value for name, value in text_state.items()}
        missing, unexpected = model.load_state_dict(state, strict=False)
        missing = [
            n for n in missing if (n.startswith("model.language_model") or n == "lm_head.weight") and "lora_" not in n
        ]
        if missing or unexpected:
            raise ValueError(f"decoder: missing {missing[:5]}, not understood {unexpected[:5]}")
        model.tie_weights()
    if vision is not None:
        load_tower(model.model.vision_tower, vision_state, "vision_tower")
    if speech is not None:
        load_tower(model.model.speech_tower, speech_state, "speech_tower")
    return model
