"""Helpers of stages that follow a teacher: models, batches, logs, and log-probabilities from all logits."""

import json
from pathlib import Path
from typing import Any

import torch

from mixlora.modeling.modeling_mixlora import MixLoraForConditionalGeneration
from mixlora.modeling.processing_mixlora import MixLoraProcessor
from mixlora.training.data.collate import Collator, Tokenizer
from mixlora.training.data.media import Media
from mixlora.training.data.rows import read_rows

TRAINED = ["adapter.vision", "adapter.speech", "vision_projector", "speech_projector.speech"]


def load(folder: str) -> MixLoraForConditionalGeneration:
    return MixLoraForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)


def louder(folder: str, to: Path) -> str:
    """The same model with other adapters, projectors and decoder."""
    model = load(folder)
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "tower" not in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(to)
    MixLoraProcessor.from_pretrained(folder).save_pretrained(to)
    return str(to)


def batch(folder: str, path: Path) -> dict[str, Any]:
    """All rows of a file in one batch, media as tensors."""
    processor = MixLoraProcessor.from_pretrained(folder)
    media = Media(load(folder), processor)
    examples = Tokenizer(processor, media, 512)(read_rows(path))
    return Collator(media, processor.tokenizer.pad_token_id)(examples)


def log(folder: Path, name: str) -> list[float]:
    return [point[name] for point in json.loads((folder / "log.json").read_text()) if name in point]


def naive_log_probs(model: MixLoraForConditionalGeneration, inputs: dict[str, Any]) -> torch.Tensor:
    """Summed log-probability of each row's labelled tokens, from all logits."""
    rest = {name: value for name, value in inputs.items() if name != "labels"}
    log_p, labels = model(**rest).logits[:, :-1].log_softmax(-1), inputs["labels"][:, 1:]
    return (log_p.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1) * (labels != -100)).sum(-1)
