"""A tiny Phi-4-Multimodal with loud random weights: transformers' model, and its checkpoint in both layouts."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.functional import set_adapter
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from transformers import Phi4MultimodalConfig, Phi4MultimodalForCausalLM

from mixlora.modeling.key_maps import NATIVE, PHI4MM, renamer
from tests.modeling.model_fixtures import make_loud

IMAGE, AUDIO, EOS = 100, 101, 102
CROP, PATCHES = 56, 4
MELS = 16
TARGETS = r"model.layers.\d+.((self_attn.(qkv|o)_proj)|(mlp.(gate_up|down)_proj))"
RANKS = {"vision": (4, 8, 0.0), "speech": (3, 12, 0.25)}
LONG = [1.0, 1.5, 2.0, 3.0, 5.0, 8.0]


def native_config(**changes: Any) -> Phi4MultimodalConfig:
    """Transformers' config at a tiny size, LongRoPE and partial rotation as released."""
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": CROP,
        "crop_size": CROP,
        "image_token_id": IMAGE,
    }
    audio = {
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_blocks": 2,
        "num_attention_heads": 2,
        "ext_pw_out_channel": 24,
        "depthwise_separable_out_channel": 24,
        "nemo_conv_channels": 8,
        "input_size": MELS,
        "bias_max_distance": 40,
        "audio_token_id": AUDIO,
    }
    fields = {
        "vocab_size": 120,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 1024,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.75,
            "short_factor": [1.0] * 6,
            "long_factor": LONG,
            "original_max_position_embeddings": 1024,
        },
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": [EOS, 103],
        "vision_config": vision,
        "audio_config": audio,
    }
    return Phi4MultimodalConfig(**(fields | changes))


def native_model(seed: int) -> Phi4MultimodalForCausalLM:
    """Transformers' model, every parameter and buffer redrawn, eager attention (which is right)."""
    torch.manual_seed(seed)
    model = make_loud(Phi4MultimodalForCausalLM._from_config(native_config(), attn_implementation="eager"), seed)
    norm = model.model.embed_tokens_extend.audio_embed.encoder.encoder_embedding
    norm.global_mean.copy_(0.3 * torch.randn(MELS))
    norm.global_invstd.copy_(1 + 0.3 * torch.rand(MELS))
    return model.eval()


def add_adapters(model: Phi4MultimodalForCausalLM, seed: int) -> None:
    """Adds both adapters, loud.

    By PEFT's own functions: transformers' method asks for PEFT 0.22 from 5.24 on.
    """
    for name, (rank, alpha, dropout) in RANKS.items():
        config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=TARGETS)
        inject_adapter_in_model(config, model, name)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.7 / parameter.shape[1] ** 0.5)
    model.eval()


def use_adapter(model: Phi4MultimodalForCausalLM, name: str | None) -> None:
    """Lets one adapter act on all rows, or none."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.enable_adapters(name is not None)
    if name is not None:
        set_adapter(model, name)


def write_native(model: Phi4MultimodalForCausalLM, folder: Path, seed: int) -> None:
    """Transformers' layout: weights, then adapter folders, the keys of the first without the usual prefix.

    The model has its adapters afterwards.
    """
    model.save_pretrained(folder)
    add_adapters(model, seed)
    for adapter, prefix in (("vision", ""), ("speech", "base_model.model.")):
        ending = f".{adapter}.weight"
        tensors = {
            prefix + name.replace(ending, ".weight"): value.detach().clone()
            for name, value in model.named_parameters()
            if ".lora_" in name and name.endswith(ending)
        }
        place = folder / f"{adapter}-lora"
        place.mkdir()
        save_file(tensors, place / "adapter_model.safetensors")
        rank, alpha, dropout = RANKS[adapter]
        LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=TARGETS).save_pretrained(place)


def phi4mm_tensors(model: Phi4MultimodalForCausalLM) -> dict[str, torch.Tensor]:
    """The weights of a model with adapters under Microsoft's names."""
    to_ours, to_theirs = renamer(NATIVE, to_ours=True), renamer(PHI4MM, to_ours=False)
    tensors = {}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        if ".lora_" not in name and ".base_layer." not in name:
            name = to_theirs(to_ours(name))
        tensors[name] = value.detach().clone()
    return tensors


def picture(size: tuple[int, int], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """A picture of `size` pixels (height, width), as the processor gives it: global view, crops, mask, padded size."""
    rows, columns = -(-size[0] // CROP), -(-size[1] // CROP)
    real = torch.zeros(rows * PATCHES, columns * PATCHES)
    real[: -(-size[0] // 14), : -(-size[1] // 14)] = 1
    crops = real.reshape(rows, PATCHES, columns, PATCHES).transpose(1, 2).reshape(-1, PATCHES, PATCHES)
    return {
        "pixels": torch.randn(1 + rows * columns, 3, CROP, CROP, generator=generator),
        "mask": torch.cat([torch.ones(1, PATCHES, PATCHES), crops]),
        "size": torch.tensor([rows * CROP, columns * CROP]),
    }


def picture_tokens(item: dict[str, torch.Tensor]) -> int:
    """Tokens of a picture, counted from the masked patches."""
    rows, columns = (item["size"] // CROP).tolist()
    real = item["mask"][1:].reshape(rows, columns, PATCHES, PATCHES).transpose(1, 2).reshape(rows * PATCHES, -1)
    height, width = int(real[::2, 0].sum()), int(real[0, ::2].sum())
    side = PATCHES // 2
    return height * (width + 1) + 1 + side * (side + 1)


def make_row(
    sizes: list[tuple[int, int]] = (), frames: list[int] = (), seed: int = 0, words: int = 7
) -> dict[str, Any]:
    """One unpadded row: ids, pictures of `sizes`, clips of `frames` mel frames."""
    generator = torch.Generator().manual_seed(seed)
    pictures = [picture(size, generator) for size in sizes]
    clips = [torch.randn(count, MELS, generator=generator) for count in frames]
    ids = torch.randint(1, 100, (words,), generator=generator).tolist()
    media = [token for item in pictures for token in [IMAGE] * picture_tokens(item)]
    media += [token for clip in clips for token in [AUDIO] * -(-len(clip) // 8)]
    return {"ids": ids[:2] + media + ids[2:], "pictures": pictures, "clips": clips}


def peer_inputs(row: dict[str, Any]) -> dict[str, torch.Tensor]:
    """A row as transformers' model takes it: a picture's crops padded to the largest, one clip without a mask."""
    inputs = {"input_ids": torch.tensor([row["ids"]])}
    if row["pictures"]:
        most = max(len(item["pixels"]) for item in row["pictures"])
        pad = torch.nn.functional.pad
        pixels = [pad(p["pixels"], (0, 0, 0, 0, 0, 0, 0, most - len(p["pixels"]))) for p in row["pictures"]]
        masks = [pad(p["mask"], (0, 0, 0, 0, 0, most - len(p["mask"])), value=1) for p in row["pictures"]]
        inputs["image_pixel_values"] = torch.stack(pixels)
        inputs["image_attention_mask"] = torch.stack(masks)
        inputs["image_sizes"] = torch.stack([p["size"] for p in row["pictures"]])
    if row["clips"]:
        inputs["audio_input_features"] = torch.stack(row["clips"])
        inputs["audio_embed_sizes"] = torch.tensor([-(-len(clip) // 8) for clip in row["clips"]])
    return inputs


def our_inputs(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Rows as our model takes them: flat crops, left padding, clips padded to the longest with a mask."""
    longest = max(len(row["ids"]) for row in rows)
    pads = [longest - len(row["ids"]) for row in rows]
    inputs = {
        "input_ids": torch.tensor([[0] * pad + row["ids"] for pad, row in zip(pads, rows, strict=True)]),
        "attention_mask": torch.tensor([[0] * pad + [1] * (longest - pad) for pad in pads]),
    }
    if pictures := [item for row in rows for item in row["pictures"]]:
        inputs["pixel_values"] = torch.cat([item["pixels"] for item in pictures])
        inputs["image_attention_mask"] = torch.cat([item["mask"] for item in pictures])
        inputs["image_sizes"] = torch.stack([item["size"] for item in pictures])
    if clips := [clip for row in rows for clip in row["clips"]]:
        inputs["input_features"] = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True)
        lengths = torch.tensor([len(clip) for clip in clips])
        inputs["input_features_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    return inputs
