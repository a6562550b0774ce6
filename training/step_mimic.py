"""The step of `objective: mimic`."""

from typing import Any

import torch

from mixlora.training.expert_adapters import Balance
from mixlora.training.objectives import mimic_loss, sequence_log_probs, sparse_mimic_loss
from mixlora.training.on_policy import resample
from mixlora.training.stages import Mimic
from mixlora.training.step_base import Inputs, NumItems, Outcome, TaughtStep
from mixlora.training.teacher import CheckpointTeacher, Teacher


class MimicStep(TaughtStep):
    """The divergence from the teacher, or in part cross entropy.

    Args:
        kept: what of the teacher is on disk, as a stage's `teacher_cache` says.
        pad, end: ids of the tokens of padding and of the end of an answer, for answers that are drawn.
        accumulation: batches of an optimizer step; drawn answers, whose tokens nobody counted, are averaged over them.
    """

    def __init__(
        self,
        teacher: Teacher,
        settings: Mimic,
        balance: Balance | None = None,
        kept: str = "",
        pad: int = 0,
        end: int = 0,
        accumulation: int = 1,
    ):
        super().__init__(teacher, balance, kept)
        self.settings, self.pad, self.end, self.accumulation = settings, pad, end, accumulation

    def _outcome(self, model: Any, inputs: Inputs, num_items: NumItems) -> Outcome:
        """The student's loss and how it is made up."""
        settings = self.settings
        figures: dict[str, float] = {}
        drawn = None
        if settings.on_policy:
            drawn = self._drawn(model, inputs) if torch.rand(()) < settings.on_policy else None
            figures["on_policy"] = float(drawn is not None)
        inputs = inputs if drawn is None else drawn
        student, teacher, places, outputs = self._states(model, inputs)
        items = len(student) if num_items is None else num_items
        if drawn is not None:
            items = len(student) * self.accumulation
        loss = self._divergence(student, self._head(model), teacher, items)
        if settings.sft_weight:
            targets = inputs["labels"][places[:, 0], places[:, 1] + 1]
            log_probs = sequence_log_probs(student, model.lm_head.weight, targets, torch.zeros_like(targets), 1)
            loss = (1 - settings.sft_weight) * loss - settings.sft_weight * log_probs.sum() / items
        return self.balance(loss, outputs, figures)

    def _divergence(
        self, student: torch.Tensor, head: torch.Tensor, teacher: torch.Tensor | None, items: torch.Tensor | int
    ) -> torch.Tensor:
        settings = self.settings
        assert teacher is not None and self.teacher is not None
        if self.count:
            return sparse_mimic_loss(
                student, head, teacher[:, : self.count].long(), teacher[:, self.count :], kind=self.kind,
                temperature=settings.temperature, t_squared=settings.t_squared, num_items=items,
            )  # fmt: skip
        return mimic_loss(
            student, head, teacher, self.teacher.head, teacher.new_ones(len(teacher)),
            divergence=settings.divergence, temperature=settings.temperature, beta=settings.beta,
            t_squared=settings.t_squared, num_items=items,
        )  # fmt: skip

    def _drawn(self, model: Any, inputs: Inputs) -> Inputs | None:
        """The batch with answers drawn by the student or the teacher."""
        speaker, seen = model, inputs
        if self.settings.sampled_by == "teacher":
            assert isinstance(self.teacher, CheckpointTeacher)
            speaker, seen = self.teacher.model, self.teacher.inputs(inputs, inputs.get("teacher_inputs"))
        drawn = resample(speaker, seen, end=self.end, pad=self.pad, max_new_tokens=self.settings.max_new_tokens)
        names = ("input_ids", "attention_mask", "labels")
        return None if drawn is None else inputs | {name: drawn[name] for name in names}
