"""A conversation as the engine takes it: token ids, media as the towers want them, and its route."""

import hashlib
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np
import torch

from mixlora.modeling.audio_processing_mixlora import RATE, load_clip
from mixlora.modeling.chat_template import checked_message
from mixlora.modeling.image_processing_mixlora import load_picture

KINDS = ("image", "audio")


@dataclass(frozen=True)
class Prompt:
    """What a request asks, before anything is computed."""

    ids: torch.Tensor
    """`[1, length]`, on the CPU."""
    media: dict[str, torch.Tensor]
    """`pixel_values`, `input_features` and what goes with them, on the CPU."""
    digests: dict[str, list[bytes]]
    """For `image` and `audio`, one digest an item in order of appearance: equal items have equal features."""
    modality: str
    """text, vision, speech or vision_speech."""
    adapter: str | None
    """None: the decoder alone."""
    adapter_id: int
    """Index into `router.names`, -1 for the decoder alone."""

    @property
    def length(self) -> int:
        """Tokens, placeholders included."""
        return self.ids.shape[1]


class PromptMaker:
    """Makes prompts in the caller's thread, so that decoding pictures and clips never delays the batch.

    Args:
        model: its router and token ids are read, no weights.
        processor: used by one thread at a time; fast tokenizers keep their padding as state.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor
        self._lock = Lock()

    def __call__(self, conversation: list[dict[str, Any]]) -> Prompt:
        """The prompt of a conversation, in the form that `processor.apply_chat_template` takes.

        Raises:
            ValueError: a message or a medium can't be used, or the adapter of this modality is not loaded.
        """
        messages, digests = _with_loaded_media(conversation)
        with self._lock:
            inputs = self.processor.apply_chat_template(
                [messages], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
        ids = inputs.pop("input_ids")
        inputs.pop("attention_mask")  # one row: all tokens are real
        router = self.model.router
        modalities = router.modalities(ids)
        [adapter] = router.adapter_names(modalities)
        adapter_id = -1 if adapter is None else router.names.index(adapter)
        return Prompt(ids, dict(inputs), digests, modalities[0], adapter, adapter_id)


def _with_loaded_media(conversation: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, list[bytes]]]:
    """The messages with pictures and clips decoded, and the digests of these."""
    digests: dict[str, list[bytes]] = {kind: [] for kind in KINDS}
    messages = []
    for number, message in enumerate(conversation):
        message = checked_message(message, f"message {number}")
        if isinstance(message.get("content"), list):
            parts = [
                _loaded(part, digests, f"message {number}, part {i}") for i, part in enumerate(message["content"])
            ]
            message = {**message, "content": parts}
        messages.append(message)
    return messages, digests


def _loaded(part: dict[str, Any], digests: dict[str, list[bytes]], where: str) -> dict[str, Any]:
    if part["type"] == "image":
        picture = load_picture(part["image"], where)
        digests["image"].append(_digest(np.asarray(picture)))
        return {"type": "image", "image": picture}
    if part["type"] == "audio":
        clip = load_clip(part["audio"], part.get("sampling_rate"), where)
        digests["audio"].append(_digest(clip))
        return {"type": "audio", "audio": clip, "sampling_rate": RATE}
    return part


def _digest(array: np.ndarray) -> bytes:
    return hashlib.sha256(f"{array.shape}{array.dtype}".encode() + array.tobytes()).digest()
