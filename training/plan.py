"""What the stages of a recipe would do: trained and frozen parameters, rows, tokens, steps and memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mixlora.training.data.collate import Example
from mixlora.training.groups import prepared_buffers
from mixlora.training.objectives import IGNORED
from mixlora.training.stages import Stage
from mixlora.training.teacher import SELF

FLOAT = 4
"""Bytes of a number: weights, gradients and AdamW's two moments are kept in float32."""


@dataclass(frozen=True)
class StagePlan:
    """One stage, planned.

    Attributes:
        trained, frozen: parameter group -> its parameters.
        tensors: names of the tensors that may change, buffers included; all others stay equal bit for bit.
        buffers: tensors that are no parameters, and are set before the stage trains.
        examples: rows, and blocks of plain text, that fit `max_length`.
        tokens, learnt: tokens of all batches, padding left out, and those among them that are learnt.
        largest: tokens of the largest batch, padding included.
        copies: parameters that are kept twice, as the reference of preferences.
        sampled: of data that are read while training, the batches by which tokens were estimated; else 0.
    """

    name: str
    trained: dict[str, int]
    frozen: dict[str, int]
    tensors: frozenset[str]
    buffers: tuple[str, ...]
    examples: int
    batches: int
    steps: int
    tokens: int
    learnt: int
    largest: int
    copies: int = 0
    sampled: int = 0

    @property
    def state_bytes(self) -> int:
        """Weights, and of what is trained gradients and two moments; without activations, or a teacher checkpoint."""
        trained, frozen = sum(self.trained.values()), sum(self.frozen.values())
        return FLOAT * (4 * trained + frozen + self.copies)

    def __str__(self) -> str:
        memory = f"{self.state_bytes / 2**20:,.0f} MiB"
        examples = f"{self.examples:,} examples; " if self.examples else ""
        about = f" (estimated by the first {self.sampled:,} batches)" if self.sampled else ""
        sets = [f"  sets {name}, which is no parameter, before it trains" for name in self.buffers]
        return "\n".join(
            [
                *sets,
                f"  {examples}{self.steps:,} steps of {self.batches:,} batches",
                f"  {self.tokens:,} tokens, {self.learnt:,} of them learnt; the largest batch has {self.largest:,}"
                + about,
                f"  {memory} for weights, gradients and AdamW in float32; activations come on top",
            ]
        )


def plan_stage(stage: Stage, model: Any, examples: int, batches: Sequence[Sequence[Example]], total: int) -> StagePlan:
    """The plan of a stage whose parameters have been selected.

    Args:
        examples: how many there are; 0 where nobody knows.
        batches: all batches of the stage, or the first ones, of which the others are taken to be like.
        total: how many batches there will be.
    """
    groups = model.parameter_groups()
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    counts = {group: sum(sizes[name] for name in names) for group, names in groups.items()}
    trained = {group: count for group, count in counts.items() if group in stage.train}
    buffers = prepared_buffers(model, stage)
    answers = [
        each for batch in batches for example in batch for each in (example, example.rejected) if each is not None
    ]

    def of_all(tokens: int) -> int:
        return round(tokens * total / len(batches))

    return StagePlan(
        name=stage.name,
        trained=trained,
        frozen={group: count for group, count in counts.items() if group not in stage.train},
        tensors=frozenset([*buffers, *(name for group in trained for name in groups[group])]),
        buffers=tuple(buffers),
        examples=examples,
        batches=total,
        steps=-(-total // stage.gradient_accumulation),
        tokens=of_all(sum(len(answer.ids) for answer in answers)),
        learnt=of_all(sum(int((answer.labels != IGNORED).sum()) for answer in answers)),
        largest=max(len(batch) * max(example.size for example in batch) for batch in batches),
        copies=sum(trained.values()) if stage.teacher == SELF and not stage.teacher_cache else 0,
        sampled=len(batches) if len(batches) < total else 0,
    )
