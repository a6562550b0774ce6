"""The two models that are compared, tiny and with one set of loud random weights, and how each takes rows."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from differences import likeness
from peft import LoraConfig, get_peft_model
from transformers import Phi4MultimodalForCausalLM

from mixlora.modeling.modeling_mixlora import MixLoraForConditionalGeneration
from tests.modeling.model_fixtures import make_loud
from tests.modeling.phi4_fixtures import (
    TARGETS,
    add_adapters,
    make_row,
    native_config,
    native_model,
    our_inputs,
    peer_inputs,
    write_native,
)

Inputs = dict[str, Any]
Row = dict[str, Any]
SWITCH = 64
GREEDY = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
PLAIN = make_row()
PICTURE = make_row(sizes=[(56, 56)])
CLIP = make_row(frames=[61])
BOTH = make_row(sizes=[(56, 56)], frames=[61], seed=2)


# ---------------------------------------------------------------------------------------------------- the models


@cache
def theirs() -> Any:
    """Transformers' model under its default attention."""
    model = native_model(0)
    model.set_attn_implementation("sdpa")
    return model


@cache
def ours() -> MixLoraForConditionalGeneration:
    """Ours with the same weights and two adapters, under its default attention."""
    with TemporaryDirectory() as folder:
        write_native(native_model(0), Path(folder), 0)
        return MixLoraForConditionalGeneration.from_pretrained(folder).eval()


def both_models(switch: int | None, rope: dict[str, Any]) -> tuple[Any, MixLoraForConditionalGeneration]:
    """Theirs and ours with the same weights and this rotation, without adapters."""
    config = native_config(original_max_position_embeddings=switch, rope_parameters=rope)
    model = make_loud(Phi4MultimodalForCausalLM(config)).eval()
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return model, MixLoraForConditionalGeneration.from_pretrained(folder).eval()


@cache
def with_a_near_switch() -> tuple[Any, MixLoraForConditionalGeneration]:
    """Both models with LongRoPE's switch at 64 tokens."""
    return both_models(SWITCH, native_config().rope_parameters | {"original_max_position_embeddings": SWITCH})


@cache
def without_a_switch() -> tuple[Any, MixLoraForConditionalGeneration]:
    """Both models with plain rotation, and no length at which anything changes."""
    return both_models(None, {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75})


def with_adapters() -> Any:
    """Transformers' model after both adapters were loaded."""
    model = native_model(0)
    add_adapters(model, 0)
    return model


@cache
def peft_model() -> Any:
    """The same as a `PeftModel`."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS)
    model = get_peft_model(native_model(0), config, adapter_name="vision")
    model.add_adapter("speech", config)
    return make_loud(model).eval()


# ---------------------------------------------------------------------------------------------------- their inputs


def their_inputs(rows: list[Row]) -> Inputs:
    """Rows as transformers' model takes them: left padding, crops and clips padded to the largest."""
    clips = [clip for row in rows for clip in row["clips"]]
    padded = list(torch.nn.utils.rnn.pad_sequence(clips, batch_first=True)) if clips else []
    pictures = [item for row in rows for item in row["pictures"]]
    inputs = peer_inputs({"ids": [], "pictures": pictures, "clips": padded})
    if clips:
        lengths = torch.tensor([len(clip) for clip in clips])
        inputs["audio_embed_sizes"] = -(-lengths // 8)
        if len(clips) > 1:  # as its processor does
            inputs["audio_attention_mask"] = torch.arange(int(lengths.max())) < lengths[:, None]
    inputs |= {name: our_inputs(rows)[name] for name in ("input_ids", "attention_mask")}
    return inputs | {"position_ids": (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)}


def for_generate(inputs: Inputs) -> Inputs:
    """Without positions, which `generate` makes."""
    return {name: value for name, value in inputs.items() if name != "position_ids"}


def row_of_batch(call: Callable[[list[Row]], torch.Tensor], row: Row, *others: Row) -> str:
    """A row's logits in a batch against those alone."""
    return likeness(call([row, *others])[0, -len(row["ids"]) :], call([row])[0])


def their_logits(rows: list[Row], model: Any = None) -> torch.Tensor:
    return (model or theirs())(**their_inputs(rows)).logits


def our_logits(rows: list[Row], model: Any = None) -> torch.Tensor:
    return (model or ours())(**our_inputs(rows)).logits
