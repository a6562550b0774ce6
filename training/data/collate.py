"""Rows to token ids and labels, once; and examples to padded batches."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils.data import Dataset

from mixlora.modeling.chat_template import checked_message, with_parts
from mixlora.modeling.configuration_mixlora import MODALITIES
from mixlora.training.data.check import BrokenRows
from mixlora.training.data.items import Item
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
        rejected: of a preference, the example of the rejected answer; this one is of the chosen.
        messages: the conversation that it is of, for teachers with a template of their own; None for plain text.
        task: the row's label.
        draw: seed of what is drawn for it where it stands in the order of the data; -1 for none.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    images: tuple[Item, ...] = ()
    audio: tuple[Item, ...] = ()
    weight: float = 1.0
    view: int = 0
    rejected: "Example | None" = None
    messages: Any = field(default=None, compare=False)
    task: str = ""
    draw: int = field(default=-1, compare=False)

    @property
    def modality(self) -> str:
        """Of its media: text, vision, speech or vision_speech."""
        return MODALITIES[bool(self.images) + 2 * bool(self.audio)]

    @property
    def size(self) -> int:
        """Tokens that it takes in a batch, those of the rejected answer and padding between the two included."""
        return len(self.ids) if self.rejected is None else 2 * max(len(self.ids), len(self.rejected.ids))


def without_labels(example: Example) -> Example:
    """The same rows, from which nothing is learnt."""
    rejected = None if example.rejected is None else without_labels(example.rejected)
    return replace(example, labels=torch.full_like(example.labels, IGNORED), rejected=rejected)


def with_draw(example: Example, draw: int) -> Example:
    """The same rows, for which something else is drawn."""
    rejected = None if example.rejected is None else with_draw(example.rejected, draw)
    return replace(example, draw=draw, rejected=rejected)


class Examples(Dataset[Example]):
    """Examples by their place, each with a draw of its own; see `RankShare` for both.

    `-1 - place` is the one at `place` without its labels.
    """

    def __init__(self, examples: Sequence[Example]):
        self.examples = examples

    def __getitem__(self, index: tuple[int, int]) -> Example:
        place, draw = index
        example = self.examples[place] if place >= 0 else without_labels(self.examples[-1 - place])
        return with_draw(example, draw)

    def __len__(self) -> int:
        return len(self.examples)


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
        broken: rows that can't be used are reported here; by default the first one raises.

    Attributes:
        left_out: conversations so far that were longer.
    """

    def __init__(self, processor: Any, media: Media, max_length: int, broken: BrokenRows | None = None):
        self.processor, self.media, self.max_length = processor, media, max_length
        self.broken = broken or BrokenRows()
        self.left_out = 0
        self.tokenizer = tokenizer = processor.tokenizer
        self.start = tokenizer.convert_tokens_to_ids("<|assistant|>")
        self.end = tokenizer.convert_tokens_to_ids("<|end|>")
        self.separator = tokenizer.convert_tokens_to_ids("<|endoftext|>")
        self.image, self.audio = processor.image_token_id, processor.audio_token_id

    def __call__(self, rows: Sequence[Row], weight: float = 1.0, views: Sequence[int] | None = None) -> list[Example]:
        """Examples of conversations, each with its views, then of plain text in blocks.

        Conversations over `max_length` are left out; of the others, single views that are longer.

        Args:
            weight: how often each is seen in an epoch.
            views: of each row the one view that is wanted.
        """
        if views is not None:
            wanted = {id(row): view for row, view in zip(rows, views, strict=True)}

        chats = [row for row in rows if row.messages is not None]
        examples: list[Example] = []
        for start in range(0, len(chats), CHUNK):
            chunk = [row for row in chats[start : start + CHUNK] if self._is_sound(row)]
            pairs = [row for row in chunk if row.rejected is not None]
            rejected = iter(self._ids([row.rejected or [] for row in pairs], pairs))
            for row, ids in zip(chunk, self._ids([row.messages or [] for row in chunk], chunk), strict=True):
                other = next(rejected) if row.rejected is not None else None
                numbers = range(self.media.augmenter.count(row)) if views is None else [wanted[id(row)]]
                try:
                    found = [self._example(row, ids, other, weight, view) for view in numbers]
                except RowError as error:
                    self.broken.report(row.source, str(error))
                    continue
                if self._fits(found[0]):
                    examples += [example for example in found if self._fits(example)]
                else:
                    self.left_out += 1
        return examples + self._of_texts([row for row in rows if row.text is not None], weight)

    def _is_sound(self, row: Row) -> bool:
        """Whether a template can take its messages; where not, it is reported."""
        try:
            for message in (*(row.messages or []), *(row.rejected or [])[-1:]):
                checked_message(message, row.source, bare=True)
        except ValueError as error:
            self.broken.report(row.source, str(error))
            return False
        return True

    def _of_texts(self, rows: Sequence[Row], weight: float) -> list[Example]:
        """Blocks of plain text; they bear the rows' task where all have the same."""
        tasks = {row.task for row in rows}
        task = tasks.pop() if len(tasks) == 1 else ""
        return [replace(block, task=task) for block in self._blocks([row.text or "" for row in rows], weight)]

    def _fits(self, example: Example) -> bool:
        return max(len(each.ids) for each in (example, example.rejected) if each is not None) <= self.max_length

    def _ids(self, conversations: Sequence[list[dict[str, Any]]], rows: Sequence[Row]) -> list[list[int]]:
        """Token ids of a conversation of each row, a single placeholder for each of its media."""
        if not rows:
            return []
        template = with_parts(self.processor.chat_template, self.processor.image_token, self.processor.audio_token)
        encoded: list[list[int]] = self.tokenizer.apply_chat_template(
            [
                [checked_message(message, row.source, bare=True) for message in messages]
                for messages, row in zip(conversations, rows, strict=True)
            ],
            chat_template=template,
            tokenize=True,
            return_dict=True,
            sanitize_control_tokens=True,
        )["input_ids"]
        return encoded

    def _example(self, row: Row, ids: list[int], rejected: list[int] | None, weight: float, view: int) -> Example:
        """Expands placeholders, and labels what the assistant says, of a preference the last answer alone."""
        images, audio = self.media.augmenter.media(row, view)
        counts = {
            self.image: [self.media.image_tokens(item) for item in images],
            self.audio: [self.media.audio_tokens(item) for item in audio],
        }
        examples: list[Example] = []
        for answer, messages in ((ids, row.messages), (rejected, row.rejected)):
            if answer is None:
                continue
            left = {token: iter(sizes) for token, sizes in counts.items()}
            expanded: list[int] = []
            for token in answer:
                expanded += [token] * next(left[token]) if token in left else [token]
            tensor = torch.tensor(expanded)
            labels = self._labels(tensor, last_alone=rejected is not None)
            if not (labels != IGNORED).any():
                raise RowError(f"{row.source}: the assistant says nothing to learn from")
            examples.append(Example(tensor, labels, images, audio, weight, view, messages=messages, task=row.task))
        return examples[0] if rejected is None else replace(examples[0], rejected=examples[1])

    def _labels(self, ids: torch.Tensor, last_alone: bool = False) -> torch.Tensor:
        """`ids` between `<|assistant|>` and the `<|end|>` that closes it, -100 elsewhere and at placeholders.

        Control tokens in the content of a message never get here: the template sanitises them.

        Args:
            last_alone: label the last of the assistant's messages only.
        """
        labels = torch.full_like(ids, IGNORED)
        speaking = False
        for position, token in enumerate(ids.tolist()):
            if speaking and token not in (self.image, self.audio):
                labels[position] = token
            if token == self.start and last_alone:
                labels[:position] = IGNORED
            speaking = token == self.start or (speaking and token != self.end)
        return labels

    def _blocks(self, texts: Sequence[str], weight: float) -> list[Example]:
        """Plain texts, a separator before each, in blocks of `max_length`; all but a block's first token is learnt."""
        if not texts:
            return []
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
    """Pads examples on the right into one batch, with their media in order of appearance.

    Of preferences, all chosen answers come first, then all rejected ones in the same order.

    Args:
        teacher_media: where a teacher's towers are others than the student's, its media, given as `teacher_inputs`.

    Attributes:
        states: where set, a teacher's hidden states by example, given as `teacher_states`, one tensor a row.
        foreign: where set, makes `teacher_inputs` of the examples for a teacher of another class.
    """

    def __init__(self, media: Media, pad_token_id: int, teacher_media: Media | None = None):
        self.media, self.pad, self.teacher_media = media, pad_token_id, teacher_media
        self.states: Any = None
        self.foreign: Any = None

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """`input_ids`, `attention_mask`, `labels` `[batch, length]`, and what `Media.inputs` gives."""
        examples = [*examples, *(example.rejected for example in examples if example.rejected is not None)]
        shape = len(examples), max(len(example.ids) for example in examples)
        ids, labels = torch.full(shape, self.pad), torch.full(shape, IGNORED)
        mask = torch.zeros(shape, dtype=torch.long)
        for row, example in enumerate(examples):
            length = len(example.ids)
            ids[row, :length], labels[row, :length], mask[row, :length] = example.ids, example.labels, 1
        images = [item for example in examples for item in example.images]
        audio = [item for example in examples for item in example.audio]
        draws = [example.draw for example in examples if example.draw >= 0 for _ in example.audio]
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        inputs |= self.media.inputs(images, audio, draws)
        if self.states is not None:
            inputs["teacher_states"] = [self.states[example] for example in examples]
        elif self.foreign is not None:
            inputs["teacher_inputs"] = self.foreign(examples)
        elif self.teacher_media is not None:
            inputs["teacher_inputs"] = self.teacher_media.inputs(images, audio)
        return inputs
