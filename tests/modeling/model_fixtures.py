"""A tiny model of the real shape with loud random weights: default initialisation would hide errors."""

import math

import torch
from transformers import CLIPVisionConfig, WhisperConfig

from mixlora.modeling.configuration_mixlora import MixLoraConfig
from mixlora.modeling.modeling_mixlora import MixLoraForConditionalGeneration

VOCAB, IMAGE, AUDIO, PAD = 400, 1, 2, 0
WINDOW = 40  # mel frames
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def tiny_config(**changes) -> MixLoraConfig:
    text = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": PAD,
        "eos_token_id": 3,
    }
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    speech = WhisperConfig(
        d_model=16,
        encoder_layers=2,
        encoder_attention_heads=2,
        encoder_ffn_dim=24,
        num_mel_bins=8,
        max_source_positions=WINDOW // 2,
        vocab_size=10,
        decoder_layers=1,
        pad_token_id=0,
    )
    defaults = {
        "text_config": text | changes.pop("text", {}),
        "vision_config": vision,
        "speech_config": speech,
        "image_token_id": IMAGE,
        "audio_token_id": AUDIO,
        "vision_layers": [-2],
        "vision_tokens_per_side": 2,
        "speech_stack": 2,
        "adapters": {
            "vision": {"r": 4, "alpha": 8, "dropout": 0.0, "target_modules": PROJECTIONS},
            "speech": {"r": 2, "alpha": 4, "dropout": 0.0, "target_modules": PROJECTIONS},
        },
    }
    return MixLoraConfig(**(defaults | changes))


def make_loud(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Redraws every parameter, norms and biases included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() < 2:
                parameter.copy_((1.0 if "norm" in name and name.endswith("weight") else 0.0) + 0.3 * noise)
            else:
                parameter.copy_(noise * 1.3 / parameter[0].numel() ** 0.5)
    return model


def tiny_model(seed: int = 0, **changes) -> MixLoraForConditionalGeneration:
    torch.manual_seed(seed)
    return make_loud(MixLoraForConditionalGeneration(tiny_config(**changes)), seed).eval()


ROWS = ("text", "image", "speech", "both", "two_clips")


def row_inputs(kind: str, seed: int = 0) -> dict:
    """Ids and media of one row, unpadded."""
    generator = torch.Generator().manual_seed(seed + 100 * ROWS.index(kind))
    images = {"image": 1, "both": 1}.get(kind, 0)
    clips = {"speech": [37], "both": [12], "two_clips": [30, 55]}.get(kind, [])
    words = torch.randint(10, VOCAB, (6 + ROWS.index(kind),), generator=generator).tolist()
    ids = words[:2]
    for _ in range(images):
        ids += [IMAGE] * 4
    for frames in clips:
        ids += [AUDIO] * math.ceil(math.ceil(frames / 2) / 2)
    return {
        "ids": ids + words[2:],
        "pixels": torch.randn(images, 3, 8, 8, generator=generator),
        "mels": [torch.randn(frames, 8, generator=generator) for frames in clips],
    }


def batch_inputs(rows: list[dict], side: str = "left") -> dict:
    """Pads rows into one batch."""
    longest = max(len(row["ids"]) for row in rows)
    ids, mask = [], []
    for row in rows:
        pad = longest - len(row["ids"])
        before, after = (pad, 0) if side == "left" else (0, pad)
        ids.append([PAD] * before + row["ids"] + [PAD] * after)
        mask.append([0] * before + [1] * len(row["ids"]) + [0] * after)
    batch = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    pixels = torch.cat([row["pixels"] for row in rows])
    if len(pixels):
        batch["pixel_values"] = pixels
    mels = [clip for row in rows for clip in row["mels"]]
    if mels:
        frames = max(-(-len(clip) // WINDOW) * WINDOW for clip in mels)
        batch["input_features"] = torch.stack(
            [torch.nn.functional.pad(clip, (0, 0, 0, frames - len(clip))) for clip in mels]
        )
        batch["input_features_mask"] = torch.stack([(torch.arange(frames) < len(clip)).long() for clip in mels])
    return batch


def of_type(batch: dict, dtype: torch.dtype) -> dict:
    """A batch whose media are of `dtype`."""
    return {name: each.to(dtype) if each.is_floating_point() else each for name, each in batch.items()}
