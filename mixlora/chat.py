"""Chatting with a checkpoint: a conversation that streams, or many rows as one batch."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from transformers import TextIteratorStreamer

from mixlora.modeling.modeling_mixlora import MixLoraForConditionalGeneration
from mixlora.modeling.processing_mixlora import MixLoraProcessor
from mixlora.rows import Row


@dataclass(frozen=True)
class Answer:
    """What the model said to a row, and the route that the row took."""

    text: str
    modality: str
    """text, vision, speech or vision_speech."""
    adapter: str | None
    """None: the decoder alone."""


class ChatSession:
    """A model, its processor, and the turns so far.

    The whole conversation is encoded anew for every turn, so a turn that brings the first picture or clip may change
    the route without leaving anything stale behind.

    Attributes:
        num_beams: of a batch's answers; what is streamed has one.
        turns: messages of the conversation.
    """

    def __init__(self, model: Any, processor: Any, max_new_tokens: int = 64) -> None:
        self.model = model
        self.processor = processor
        self.max_new_tokens = max_new_tokens
        self.num_beams = 1
        self.turns: list[dict[str, Any]] = []

    @classmethod
    def from_pretrained(cls, checkpoint: str | Path, max_new_tokens: int = 64) -> "ChatSession":
        """Loads model and processor, onto the accelerator if there is one."""
        model = MixLoraForConditionalGeneration.from_pretrained(str(checkpoint), dtype="auto").eval()
        processor = MixLoraProcessor.from_pretrained(str(checkpoint))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(model.to(device), processor, max_new_tokens)

    def reset(self) -> None:
        """Forgets the turns."""
        self.turns = []

    def ask(self, row: Row) -> Iterator[str]:
        """Streams the answer to the next turn. The turn and its answer are kept once the answer is whole.

        Raises:
            RowError: a picture or clip can't be read.
        """
        turns = [*self.turns, row.turn()]
        pieces: list[str] = []
        for piece in self._stream(self._encode([turns])):
            piece = piece if pieces else piece.lstrip()
            if piece:
                pieces.append(piece)
                yield piece
        self.turns = [*turns, {"role": "assistant", "content": "".join(pieces).rstrip()}]

    def answer_batch(self, rows: list[Row]) -> list[Answer]:
        """Answers rows of any modality in one batch, each on its own; the session's turns play no part.

        Raises:
            RowError: a picture or clip can't be read.
        """
        inputs = self._encode([[row.turn()] for row in rows])
        modalities = self.model.router.modalities(inputs["input_ids"])
        adapters = self.model.router.adapter_names(modalities)
        output = self.model.generate(**inputs, **self._options(), num_beams=self.num_beams)
        texts = self.processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [Answer(text.strip(), *route) for text, *route in zip(texts, modalities, adapters, strict=True)]

    def sample_batch(self, rows: list[Row], samples: int, temperature: float) -> list[list[str]]:
        """Draws several answers to each row, from torch's generator.

        Raises:
            RowError: a picture or clip can't be read.
        """
        inputs = self._encode([[row.turn()] for row in rows])
        options = {"do_sample": True, "temperature": temperature, "top_k": 0, "num_return_sequences": samples}
        output = self.model.generate(**inputs, **self._options() | options)
        texts = self.processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        stripped = [text.strip() for text in texts]
        return [stripped[first : first + samples] for first in range(0, len(stripped), samples)]

    def _encode(self, conversations: list[list[dict[str, Any]]]) -> Any:
        """Model inputs of conversations that end with a user's turn, padded into one batch on the model's device."""
        inputs = self.processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding_side": "left"},
        )
        return inputs.to(self.model.device, dtype=self.model.dtype)

    def _options(self) -> dict[str, Any]:
        return {"max_new_tokens": self.max_new_tokens, "do_sample": False}

    def _stream(self, inputs: Any) -> Iterator[str]:
        """Yields pieces of the answer while a thread generates; an error there is raised here."""
        tokenizer = self.processor.tokenizer
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        errors: list[BaseException] = []

        def generate() -> None:
            try:
                self.model.generate(**inputs, streamer=streamer, **self._options())
            except BaseException as error:  # raised again by the reader
                errors.append(error)
                streamer.on_finalized_text("", stream_end=True)

        thread = Thread(target=generate, daemon=True)
        thread.start()
        yield from streamer
        thread.join()
        if errors:
            raise errors[0]
