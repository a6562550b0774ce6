"""What the stages of a recipe would do: trained and frozen parameters, rows, tokens, steps and memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mixlora.training.data.batches import BatchPlan
from mixlora.training.data.collate import Example
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
        tensors: names of the tensors that may change; all others stay equal bit for bit.
        examples: rows, and blocks of plain text, that fit `max_length`.
        tokens, learnt: tokens of all batches, padding left out, and those among them that are learnt.
        largest: tokens of the largest batch, padding included.
        copies: parameters that are kept twice, as the reference of preferences.
    """

    name: str
    trained: dict[str, int]
    frozen: dict[str, int]
    tensors: frozenset[str]
    examples: int
    batches: int
    steps: int
    tokens: int
    learnt: int
    largest: int
    copies: int = 0

    @property
    def state_bytes(self) -> int:
        """Weights, and of what is trained gradients and two moments; without activations, or a teacher checkpoint."""
        trained, frozen = sum(self.trained.values()), sum(self.frozen.values())
        return FLOAT * (4 * trained + frozen + self.copies)

    def __str__(self) -> str:
        memory = f"{self.state_bytes / 2**20:,.0f} MiB"
        return "\n".join(
            [
                f"  {self.examples:,} examples; {self.steps:,} steps of {self.batches:,} batches",
                f"  {self.tokens:,} tokens, {self.learnt:,} of them learnt; the largest batch has {self.largest:,}",
                f"  {memory} for weights, gradients and AdamW in float32; activations come on top",
            ]
        )


def plan_stage(stage: Stage, model: Any, examples: Sequence[Example], batches: BatchPlan) -> StagePlan:
    """The plan of a stage whose parameters have been selected."""
    groups = model.parameter_groups()
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    counts = {group: sum(sizes[name] for name in names) for group, names in groups.items()}
    trained = {group: count for group, count in counts.items() if group in stage.train}
    drawn = [examples[place] for batch in batches for place in batch]
    answers = [each for example in drawn for each in (example, example.rejected) if each is not None]
    return StagePlan(
        name=stage.name,
        trained=trained,
        frozen={group: count for group, count in counts.items() if group not in stage.train},
        tensors=frozenset(name for group in trained for name in groups[group]),
        examples=len(examples),
        batches=len(batches),
        steps=-(-len(batches) // stage.gradient_accumulation),
        tokens=sum(len(answer.ids) for answer in answers),
        learnt=sum(int((answer.labels != IGNORED).sum()) for answer in answers),
        largest=max(len(batch) * max(examples[place].size for place in batch) for batch in batches),
        copies=sum(trained.values()) if stage.teacher == SELF and not stage.teacher_cache else 0,
    )
