"""Rows to token ids and labels, once; and examples to padded batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mixlora.modeling.chat_template import checked_message, with_parts
from mixlora.training.data.feature_cache import Item
from mixlora.training.data.media import Media
from mixlora.training.data.rows import Row, RowError
from mixlora.training.objectives import IGNORED

CHUNK = 1000


@dataclass(frozen=True)
class Example:
    """A tokenized row, or a view of it.

    Attributes:
        ids: LongTensor `[length]`, placeholders expanded.
        labels: LongTensor `[length]`, -100 where nothing is learnt.
        images, audio: media files in order of appearance.
        weight: how often it is seen in an epoch.
        view: 0 for the row with its media as they are, more for views of them.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    images: tuple[Item, ...] = ()
    audio: tuple[Item, ...] = ()
    weight: float = 1.0
    view: int = 0


def views_by_row(examples: Sequence[Example]) -> list[list[int]]:
    """The places of each row's views in a list where they stand in order, view 0 first."""
    places: list[list[int]] = []
    for place, example in enumerate(examples):
        if example.view == 0:
            places.append([])
        places[-1].append(place)
    return places


class Tokenizer:
    """Makes examples of rows with a processor's tokenizer and chat template.

    Args:
        processor: a `MixLoraProcessor`.
        media: tells how many placeholders a picture or a clip takes.
        max_length: see `Stage.max_length`.

    Attributes:
        left_out: conversations so far that were longer.
    """

    def __init__(self, processor: Any, media: Media, max_length: int):
        self.processor, self.media, self.max_length = processor, media, max_length
        self.left_out = 0
        self.tokenizer = tokenizer = processor.tokenizer
        self.start = tokenizer.convert_tokens_to_ids("<|assistant|>")
        self.end = tokenizer.convert_tokens_to_ids("<|end|>")
        self.separator = tokenizer.convert_tokens_to_ids("<|endoftext|>")
        self.image, self.audio = processor.image_token_id, processor.audio_token_id

    def __call__(self, rows: Sequence[Row], weight: float = 1.0) -> list[Example]:
        """Examples of conversations, each with its views, then of plain text in blocks.

        Conversations over `max_length` are left out; of the others, single views that are longer.
        """
        chats = [row for row in rows if row.messages is not None]
        texts = [row.text for row in rows if row.text is not None]
        examples: list[Example] = []
        template = with_parts(self.processor.chat_template, self.processor.image_token, self.processor.audio_token)
        for start in range(0, len(chats), CHUNK):
            chunk = chats[start : start + CHUNK]
            encoded = self.tokenizer.apply_chat_template(
                [[checked_message(message, row.source, bare=True) for message in row.messages or []] for row in chunk],
                chat_template=template,
                tokenize=True,
                return_dict=True,
                sanitize_control_tokens=True,
            )["input_ids"]
            for row, ids in zip(chunk, encoded, strict=True):
                views = [self._example(row, ids, weight, view) for view in range(self.media.augmenter.count(row))]
                if len(views[0].ids) > self.max_length:
                    self.left_out += 1
                    continue
                examples += [example for example in views if len(example.ids) <= self.max_length]
        return examples + (self._blocks(texts, weight) if texts else [])

    def _example(self, row: Row, ids: list[int], weight: float, view: int) -> Example:
        """Expands placeholders, and labels what the assistant says, `<|end|>` included."""
        images, audio = self.media.augmenter.media(row, view)
        counts = {
            self.image: iter([self.media.image_tokens(item) for item in images]),
            self.audio: iter([self.media.audio_tokens(item) for item in audio]),
        }
        expanded: list[int] = []
        for token in ids:
            expanded += [token] * next(counts[token]) if token in counts else [token]
        tensor = torch.tensor(expanded)
        labels = self._labels(tensor)
        if not (labels != IGNORED).any():
            raise RowError(f"{row.source}: the assistant says nothing to learn from")
        return Example(tensor, labels, images, audio, weight, view)

    def _labels(self, ids: torch.Tensor) -> torch.Tensor:
        """`ids` between `<|assistant|>` and the `<|end|>` that closes it, -100 elsewhere and at placeholders.

        Control tokens in the content of a message never get here: the template sanitises them.
        """
        labels = torch.full_like(ids, IGNORED)
        speaking = False
        for position, token in enumerate(ids.tolist()):
            if speaking and token not in (self.image, self.audio):
                labels[position] = token
            speaking = token == self.start or (speaking and token != self.end)
        return labels

    def _blocks(self, texts: Sequence[str], weight: float) -> list[Example]:
        """Plain texts, a separator before each, in blocks of `max_length`; all but a block's first token is learnt."""
        stream: list[int] = []
        for start in range(0, len(texts), CHUNK):
            chunk = list(texts[start : start + CHUNK])
            for ids in self.tokenizer(chunk, add_special_tokens=False, split_special_tokens=True)["input_ids"]:
                stream += [self.separator, *ids]
        stream.append(self.separator)
        blocks = []
        for block in torch.tensor(stream).split(self.max_length):
            if len(block) > 1:
                labels = block.clone()
                labels[0] = IGNORED
                blocks.append(Example(block, labels, weight=weight))
        return blocks


class Collator:
    """Pads examples on the right into one batch, with their media in order of appearance."""

    def __init__(self, media: Media, pad_token_id: int):
        self.media, self.pad = media, pad_token_id

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """`input_ids`, `attention_mask`, `labels` `[batch, length]`, and what `Media.inputs` gives."""
        shape = len(examples), max(len(example.ids) for example in examples)
        ids, labels = torch.full(shape, self.pad), torch.full(shape, IGNORED)
        mask = torch.zeros(shape, dtype=torch.long)
        for row, example in enumerate(examples):
            length = len(example.ids)
            ids[row, :length], labels[row, :length], mask[row, :length] = example.ids, example.labels, 1
        images = [item for example in examples for item in example.images]
        audio = [item for example in examples for item in example.audio]
        return {"input_ids": ids, "attention_mask": mask, "labels": labels, **self.media.inputs(images, audio)}
