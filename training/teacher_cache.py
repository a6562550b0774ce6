"""What a teacher says, on disk: its final hidden states, which with its head give its distribution again; or a few
tokens of that distribution; or the log-probabilities of the answers' own tokens."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device

from mixlora.training.data.collate import Collator, Example
from mixlora.training.data.feature_cache import FeatureCache, fingerprint
from mixlora.training.objectives import IGNORED, known_tokens, response_mask, sequence_log_probs
from mixlora.training.stages import Stage, cache_form
from mixlora.training.teacher import NOT_THE_STUDENTS, Teacher


@dataclass(frozen=True)
class Form:
    """How a token is kept.

    Attributes:
        kind: `states` in `dtype`, `log_probs` of the answers' tokens in fp32, or `count` tokens of the distribution:
            its likeliest (`top`) or drawn ones (`sample`).
        temperature: of the distribution that tokens are taken from.
    """

    kind: str
    dtype: torch.dtype = torch.float32
    count: int = 0
    temperature: float = 1.0

    @classmethod
    def of(cls, stage: Stage) -> "Form":
        """The form that a stage's `teacher_cache` names."""
        kind, count = cache_form(stage.teacher_cache)
        if kind in ("top", "sample"):
            return cls(kind, torch.int16, count, stage.mimic.temperature)
        return cls(kind) if kind == "log_probs" else cls("states", getattr(torch, kind))

    @property
    def is_sparse(self) -> bool:
        """Whether tokens of the distribution are kept."""
        return bool(self.count)


class StateCache(FeatureCache):
    """Hidden states of examples, `[labelled tokens, width]` each, where they predict the labelled tokens.

    Attributes:
        width: numbers of a token, as they are read.
    """

    width: int = 0

    def __getitem__(self, item: Any) -> torch.Tensor:
        """What is kept of an example `[labelled tokens, width]` in fp32."""
        if not (item.labels != IGNORED).any():  # a row that is run, but teaches nothing
            return torch.zeros(0, self.width)
        return self._read(self._key(item))

    def _read(self, key: str) -> torch.Tensor:
        return self._shards[key].get_tensor(key).float()

    def _key(self, item: Any) -> str:
        """What the states are of: the tokens, which of them are labelled, and the media."""
        digest = hashlib.sha256(torch.stack([item.ids, item.labels]).numpy().tobytes())
        for medium in (*item.images, *item.audio):
            digest.update(super()._key(medium).encode())
        return digest.hexdigest()[:32]


class TokenCache(StateCache):
    """Tokens of the teacher's distribution, 6 bytes each: the id as an int32, its log-probability as an fp16.

    They are read as `[labelled tokens, 2 * count]` in fp32: ids (exact below 2^24), then their log-probabilities.
    """

    def _read(self, key: str) -> torch.Tensor:
        packed = self._shards[key].get_tensor(key)
        cut = packed.shape[1] // 3 * 2
        ids = packed[:, :cut].contiguous().view(torch.int32)
        return torch.cat([ids.float(), packed[:, cut:].contiguous().view(torch.float16).float()], dim=1)

    @staticmethod
    def pack(ids: torch.Tensor, log_probs: torch.Tensor) -> torch.Tensor:
        """`[tokens, count]` of both as one int16 tensor `[tokens, 3 * count]`."""
        rounded = log_probs.clamp(min=torch.finfo(torch.float16).min).to(torch.float16)
        return torch.cat([ids.int().contiguous().view(torch.int16), rounded.contiguous().view(torch.int16)], dim=1)

    def seed(self, item: Any) -> int:
        """Of an example's draws: its own, so that a run that was killed draws the same."""
        return int(self._key(item)[:15], 16)


def cache_states(
    teacher: Teacher,
    model: Any,
    collator: Collator,
    examples: Sequence[Example],
    folder: Path,
    form: Form,
    settings: Any = None,
) -> StateCache:
    """Computes what is missing of what a teacher says.

    Args:
        model: the model that the states are of; its weights and config name the cache, with the form.
        examples: those of the stage; of preferences both answers are computed.
        form: how a token is kept.
        settings: what else the states depend on.
    """
    # the config routes rows, for one
    mark = fingerprint(model, {"form": form, "config": model.config.to_dict(), "settings": settings})
    kind = TokenCache if form.is_sparse else StateCache
    cache = kind(folder / f"teacher-{mark}", form.dtype)
    cache.width = {"states": teacher.head.shape[1], "log_probs": 1}.get(form.kind, 2 * form.count)

    def encode(batch: Sequence[Any]) -> list[torch.Tensor]:
        inputs = send_to_device(collator(batch), teacher.head.device)
        rest = {name: value for name, value in inputs.items() if name not in NOT_THE_STUDENTS}
        hidden = teacher.hidden(rest, inputs.get("teacher_inputs"))
        masks = response_mask(inputs["labels"])
        found = [states[mask] for states, mask in zip(hidden, masks, strict=True)]
        if form.kind == "states":
            return found
        return [
            _kept(cache, example, states, teacher.head, form) for example, states in zip(batch, found, strict=True)
        ]

    answers: list[Any] = [replace(example, rejected=None) for example in examples]
    answers += [example.rejected for example in examples if example.rejected is not None]
    answers.sort(key=lambda example: len(example.ids))
    done = cache.fill(answers, encode, "teacher states")
    print(f"  teacher: states of {len(answers):,} answers, {done:,} computed now, the others read from {cache.folder}")
    return cache


def _kept(cache: Any, example: Example, states: torch.Tensor, head: torch.Tensor, form: Form) -> torch.Tensor:
    """An example's states in another form than states."""
    if form.kind == "log_probs":
        targets = example.labels[example.labels != IGNORED].to(states.device)
        places = torch.arange(len(targets), device=states.device)
        return sequence_log_probs(states, head, targets, places, len(targets))[:, None]
    generator = torch.Generator().manual_seed(cache.seed(example))
    ids, log_probs = known_tokens(
        states, head, form.count, kind=form.kind, temperature=form.temperature, generator=generator
    )
    return TokenCache.pack(ids, log_probs).cpu()
