"""Conversations of every kind for a tiny model, and its answers alone."""

from typing import Any

import numpy as np
import torch
from PIL import Image

from mixlora.serving.sampling import Sampling
from tests.modeling.model_fixtures import tiny_model
from tests.modeling.processor_fixtures import tiny_processor


def picture(seed: int = 0) -> Image.Image:
    """A picture of noise."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 7, 3), dtype=np.uint8))


def clip(seed: int = 0, seconds: float = 0.3) -> np.ndarray:
    """A clip of noise."""
    return np.random.default_rng(seed).normal(0, 0.1, int(seconds * 16000)).astype(np.float32)


def turn(text: str | None = None, pictures: tuple = (), clips: tuple = ()) -> dict[str, Any]:
    """A user's turn."""
    content: list[dict[str, Any]] = [{"type": "image", "image": one} for one in pictures]
    content += [{"type": "audio", "audio": (one, 16000)} for one in clips]
    content += [{"type": "text", "text": text}] if text is not None else []
    return {"role": "user", "content": content}


def conversations() -> list[list[dict[str, Any]]]:
    """One of every modality, one with several items, one of several turns."""
    return [
        [turn("Hello there")],
        [turn("What is this?", (picture(),))],
        [turn(clips=(clip(),))],
        [turn("Is it?", (picture(1),), (clip(1, 0.7),))],
        [turn("And these", (picture(2), picture(3)), (clip(2), clip(3, 0.5)))],
        [turn("One", (picture(4),)), {"role": "assistant", "content": "Two."}, turn("A rather longer question " * 2)],
    ]


def alone(model: Any, processor: Any, conversation: list[dict[str, Any]], sampling: Sampling) -> list[int]:
    """The tokens that `generate` gives for this conversation in a batch of its own."""
    inputs = processor.apply_chat_template(
        [conversation], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    options: dict[str, Any] = {"do_sample": False}
    if sampling.temperature:
        options = {"do_sample": True, "temperature": sampling.temperature}
        options |= {"top_k": sampling.top_k, "top_p": sampling.top_p}
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    output = model.generate(
        **inputs,
        max_new_tokens=sampling.max_new_tokens,
        repetition_penalty=sampling.repetition_penalty,
        **options,
    )
    return output[0, inputs["input_ids"].shape[1] :].tolist()


def model_and_processor(**changes: Any) -> tuple[Any, Any]:
    """A tiny model whose answers do not end early, and its processor."""
    text = {"eos_token_id": None, "max_position_embeddings": 512} | changes.pop("text", {})
    return tiny_model(text=text, **changes), tiny_processor()
