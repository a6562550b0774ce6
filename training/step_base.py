"""What all steps share: their form, and for those with a teacher the hidden states of both."""

from collections.abc import Callable
from typing import Any

import torch

from mixlora.modeling.ranks import in_process_group
from mixlora.training.expert_adapters import Balance
from mixlora.training.objectives import response_mask
from mixlora.training.stages import cache_form
from mixlora.training.teacher import NOT_THE_STUDENTS, Teacher

Inputs = dict[str, Any]
NumItems = torch.Tensor | int | None
Outcome = tuple[torch.Tensor, dict[str, Any]]
Step = Callable[[Any, Inputs, NumItems], Outcome]
"""Model (perhaps wrapped), inputs with labels, and the labelled tokens of the optimizer step -> loss and figures.

The loss is this process's share: those of all ranks add up to the loss of the batch. Figures are those of all ranks;
but `row_losses`, where it is given, has the losses of this process's rows, `[rows, 2]`: their sums, and their tokens.
What runs the model does so inside the forward of what wraps it, so that DDP, FSDP and their like see it.
"""


class TaughtStep:
    """Shared by the objectives that look at hidden states beside those of a teacher.

    Args:
        balance: of experts.
        kept: what of the teacher is on disk, as a stage's `teacher_cache` says.
    """

    def __init__(self, teacher: Teacher | None, balance: Balance | None, kept: str):
        self.teacher, self.balance = teacher, balance or Balance()
        self.kind, self.count = cache_form(kept) if kept else ("", 0)

    def __call__(self, model: Any, inputs: Inputs, num_items: NumItems) -> Outcome:
        """See [`Step`]."""
        outcome: Outcome = model(within=lambda inner: self._outcome(inner, inputs, num_items))
        return outcome

    def _outcome(self, model: Any, inputs: Inputs, num_items: NumItems) -> Outcome:
        raise NotImplementedError

    def _states(self, model: Any, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, Any]:
        """Hidden states `[tokens, width]` that predict labelled tokens, the teacher's, places `[tokens, 2]`, outputs.

        Where the teacher is on disk in another form than states, that stands in their place.
        """
        where = response_mask(inputs["labels"])
        rest = {name: value for name, value in inputs.items() if name not in NOT_THE_STUDENTS}
        outputs = model.model(**rest, use_cache=False, wanted=where, **self.balance.wanted(inputs["labels"]))
        student = outputs.last_hidden_state[where]
        if in_process_group():  # a forward of the head, though of nothing, has its shards gathered
            student = student + model.lm_head(student[:0]).sum()
        teacher = None
        if "teacher_states" in inputs:
            teacher = torch.cat(inputs["teacher_states"]).to(student.device)
        elif self.teacher is not None:
            teacher = self.teacher.hidden(rest, inputs.get("teacher_inputs"))[where]
        return student, teacher, where.nonzero(), outputs

    def _head(self, model: Any) -> torch.Tensor:
        """The rows of the student's head that the teacher's has too."""
        assert self.teacher is not None
        head: torch.Tensor = model.lm_head.weight
        return head[: len(self.teacher.head)] if self.teacher.is_cut else head
