"""Who is mimicked, or stands as the reference: a checkpoint, or the trained model as its stage found it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch.func import functional_call

from mixlora.modeling.generation_mixlora import MEDIA
from mixlora.modeling.modeling_mixlora import MixLoraForConditionalGeneration
from mixlora.training.stages import RecipeError

SELF = "self"
NOT_THE_STUDENTS = ("labels", "teacher_inputs", "teacher_states")
"""What a batch holds beside the inputs of the student's forward."""


class Teacher(Protocol):
    """Final hidden states and the head that makes logits of them.

    Attributes:
        is_cut: whether the head's rows are but the first of the student's head.
    """

    head: torch.Tensor
    is_cut: bool

    def hidden(self, inputs: dict[str, Any], teacher_inputs: Any = None) -> torch.Tensor:
        """`[batch, length, width]` of a batch; `teacher_inputs` are its media for other towers than the student's."""


class CheckpointTeacher:
    """A model of its own weights, frozen."""

    is_cut = False

    def __init__(self, model: MixLoraForConditionalGeneration):
        self.model = model.eval().requires_grad_(False)
        self.head = model.lm_head.weight

    @torch.no_grad()
    def hidden(self, inputs: dict[str, Any], teacher_inputs: dict[str, Any] | None = None) -> torch.Tensor:
        """See [`Teacher`]."""
        inputs = self.inputs(inputs, teacher_inputs)
        states: torch.Tensor = self.model.model(**inputs, use_cache=False).last_hidden_state
        return states

    @staticmethod
    def inputs(inputs: dict[str, Any], teacher_inputs: dict[str, Any] | None) -> dict[str, Any]:
        """A batch with the media that the teacher's towers take."""
        if teacher_inputs is None:
            return inputs
        return {name: value for name, value in inputs.items() if name not in MEDIA} | teacher_inputs


class SelfTeacher:
    """The trained model itself with the values that its parameters have now: only those that change are copied."""

    is_cut = False

    def __init__(self, model: MixLoraForConditionalGeneration):
        self.model = model
        self.values = {
            name.removeprefix("model."): parameter.detach().clone()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and name.startswith("model.")
        }
        head = model.lm_head.weight
        self.head = head.detach().clone() if head.requires_grad else head

    @torch.no_grad()
    def hidden(self, inputs: dict[str, Any], teacher_inputs: dict[str, Any] | None = None) -> torch.Tensor:
        """See [`Teacher`]; the towers are the student's."""
        with evaluating(self.model):
            outputs = functional_call(self.model.model, self.values, kwargs={**inputs, "use_cache": False})
        states: torch.Tensor = outputs.last_hidden_state
        return states


class KeptTeacher:
    """A teacher whose states are on disk: its head alone."""

    def __init__(self, head: torch.Tensor, is_cut: bool = False):
        self.head, self.is_cut = head, is_cut

    def hidden(self, inputs: dict[str, Any], teacher_inputs: dict[str, Any] | None = None) -> torch.Tensor:
        """Never asked for: a batch holds its states."""
        raise RuntimeError("the teacher's states are on disk")


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Without dropout."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def check_fit(student: Any, processor: Any, teacher: Any, teacher_processor: Any, name: str) -> None:
    """Raises RecipeError where the teacher's tokens or its numbers of placeholders are not the student's."""
    ours, theirs = (each.tokenizer.get_vocab() for each in (processor, teacher_processor))
    differ = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
    if differ:
        shown = ", ".join(f"{token!r} {ours.get(token)} here, {theirs.get(token)} there" for token in differ[:5])
        raise RecipeError(f"teacher {name}: {len(differ)} tokens have other ids than the student's: {shown}")
    for field in ("vision_tokens_per_side", "vision_letters", "vision_names", "speech_stack"):
        mine, other = getattr(student.config, field), getattr(teacher.config, field)
        if mine != other:
            raise RecipeError(f"teacher {name}: {field} is {other}, the student's {mine}: their prompts would differ")
