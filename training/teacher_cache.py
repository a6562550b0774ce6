"""A teacher's final hidden states on disk: with its head they give its distribution again, whatever the vocabulary."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device

from mixlora.training.data.collate import Collator, Example
from mixlora.training.data.feature_cache import FeatureCache, fingerprint
from mixlora.training.objectives import IGNORED, response_mask
from mixlora.training.teacher import NOT_THE_STUDENTS, Teacher


class StateCache(FeatureCache):
    """Hidden states of examples, `[labelled tokens, width]` each, where they predict the labelled tokens."""

    width: int = 0

    def __getitem__(self, item: Any) -> torch.Tensor:
        """States of an example `[labelled tokens, width]`."""
        if not (item.labels != IGNORED).any():  # a row that a rank without a row of its own runs
            return torch.zeros(0, self.width)
        return super().__getitem__(item)

    def _key(self, item: Any) -> str:
        """What the states are of: the tokens, which of them are labelled, and the media."""
        digest = hashlib.sha256(torch.stack([item.ids, item.labels]).numpy().tobytes())
        for medium in (*item.images, *item.audio):
            digest.update(super()._key(medium).encode())
        return digest.hexdigest()[:32]


def cache_states(
    teacher: Teacher, model: Any, collator: Collator, examples: Sequence[Example], folder: Path, dtype: torch.dtype
) -> StateCache:
    """Computes what is missing of a teacher's states.

    Args:
        model: the model that the states are of; its weights and config name the cache, with the dtype.
        examples: those of the stage; of preferences both answers are computed.
        dtype: of the states on disk.
    """

    def encode(batch: Sequence[Any]) -> list[torch.Tensor]:
        inputs = send_to_device(collator(batch), teacher.head.device)
        rest = {name: value for name, value in inputs.items() if name not in NOT_THE_STUDENTS}
        hidden = teacher.hidden(rest, inputs.get("teacher_inputs"))
        return [states[mask] for states, mask in zip(hidden, response_mask(inputs["labels"]), strict=True)]

    mark = fingerprint(model, {"dtype": dtype, "config": model.config.to_dict()})  # the config routes rows, for one
    cache = StateCache(folder / f"teacher-{mark}", dtype)
    cache.width = teacher.head.shape[1]
    answers: list[Any] = [replace(example, rejected=None) for example in examples]
    answers += [example.rejected for example in examples if example.rejected is not None]
    answers.sort(key=lambda example: len(example.ids))
    done = cache.fill(answers, encode, "teacher states")
    print(f"  teacher: states of {len(answers):,} answers, {done:,} computed now, the others read from {cache.folder}")
    return cache
