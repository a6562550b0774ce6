"""What an objective makes of a batch: a loss, and figures for the log."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import extract_model_from_parallel as unwrapped

from mixlora.modeling.modeling_mixlora import MixLoraForConditionalGeneration
from mixlora.modeling.projectors import CTC_SHARPNESS
from mixlora.training.data.collate import Collator, Example
from mixlora.training.data.media import Media
from mixlora.training.expert_adapters import Balance, balance_of
from mixlora.training.foreign_teacher import ForeignTeacher
from mixlora.training.objectives import (
    ctc_loss,
    mimic_loss,
    next_token_loss,
    preference_loss,
    response_mask,
    sequence_log_probs,
    sparse_mimic_loss,
    supervised_positions,
)
from mixlora.training.on_policy import resample
from mixlora.training.stages import Mimic, Preference, RecipeError, Stage, cache_form
from mixlora.training.teacher import NOT_THE_STUDENTS, CheckpointTeacher, Teacher
from mixlora.training.teachers import build_teacher

Inputs = dict[str, Any]
Outcome = tuple[torch.Tensor, dict[str, float]]
Step = Callable[[Any, Inputs, torch.Tensor | int | None], Outcome]
"""Model (perhaps wrapped), inputs with labels, and the labelled tokens of the optimizer step -> loss and figures."""


class SupervisedStep:
    """Cross entropy of the labelled tokens, or in part CTC of the clips.

    Args:
        ctc_weight: share of the loss that is CTC.
        pad, end: ids of the tokens of padding and of the end of an answer.
        accumulation: batches of an optimizer step; CTC is averaged over them.
        balance: of experts, added where the decoder runs.
    """

    def __init__(self, ctc_weight: float, pad: int, end: int, accumulation: int = 1, balance: Balance | None = None):
        self.ctc_weight, self.pad, self.end, self.accumulation = ctc_weight, pad, end, accumulation
        self.balance = balance or Balance()

    def __call__(self, model: Any, inputs: Inputs, num_items: torch.Tensor | int | None) -> Outcome:
        """Logits are made only where a token is labelled."""
        labels = inputs["labels"]
        rest = {name: value for name, value in inputs.items() if name != "labels"}
        heard = self._ctc(unwrapped(model), rest, labels) if self.ctc_weight else None
        if heard is not None and self.ctc_weight == 1:
            return heard, {}
        positions, targets = supervised_positions(labels)
        outputs = model(**rest, logits_to_keep=positions, **self.balance.wanted)
        loss = next_token_loss(outputs.logits, targets, num_items)
        if heard is not None:
            loss = (1 - self.ctc_weight) * loss + self.ctc_weight * heard
        return self.balance(loss, outputs, {})

    def _ctc(self, model: MixLoraForConditionalGeneration, inputs: Inputs, labels: torch.Tensor) -> torch.Tensor:
        features = inputs.get("mm_encoder_outputs", {}).get("audio_features", [])
        if "input_features" in inputs:
            features = model.model.encode_speech(inputs["input_features"], inputs["input_features_mask"])
        blank = model.config.speech_blank_token_id
        return (
            ctc_loss(
                model.model.project_speech([clip.to(model.device) for clip in features]),
                labels,
                model.model.language_model.embed_tokens.weight,
                blank=self.pad if blank is None else blank,
                end=self.end,
                sharpness=CTC_SHARPNESS,
            )
            / self.accumulation
        )


class _TaughtStep:
    """Shared by the objectives that look at hidden states beside those of a teacher."""

    def __init__(self, teacher: Teacher | None, balance: Balance | None, kept: str):
        self.teacher, self.balance = teacher, balance or Balance()
        self.kind, self.count = cache_form(kept) if kept else ("", 0)

    def _states(self, model: Any, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, Any]:
        """Hidden states `[tokens, width]` that predict labelled tokens, the teacher's, places `[tokens, 2]`, outputs.

        Where the teacher is on disk in another form than states, that stands in their place.
        """
        where = response_mask(inputs["labels"])
        rest = {name: value for name, value in inputs.items() if name not in NOT_THE_STUDENTS}
        outputs = unwrapped(model).model(**rest, use_cache=False, **self.balance.wanted)
        student = outputs.last_hidden_state[where]
        teacher = None
        if "teacher_states" in inputs:
            teacher = torch.cat(inputs["teacher_states"]).to(student.device)
        elif self.teacher is not None:
            teacher = self.teacher.hidden(rest, inputs.get("teacher_inputs"))[where]
        return student, teacher, where.nonzero(), outputs


class MimicStep(_TaughtStep):
    """The divergence from the teacher, or in part cross entropy.

    Args:
        kept: what of the teacher is on disk, as a stage's `teacher_cache` says.
        pad, end: ids of the tokens of padding and of the end of an answer, for answers that are drawn.
        accumulation: batches of an optimizer step; drawn answers, whose tokens nobody counted, are averaged over them,
            and over the ranks.
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

    def __call__(self, model: Any, inputs: Inputs, num_items: torch.Tensor | int | None) -> Outcome:
        """The student's loss and how it is made up."""
        settings, head = self.settings, unwrapped(model).lm_head.weight
        figures: dict[str, float] = {}
        drawn = None
        if settings.on_policy:
            drawn = self._drawn(model, inputs) if torch.rand(()) < settings.on_policy else None
            figures["on_policy"] = float(drawn is not None)
        inputs = inputs if drawn is None else drawn
        student, teacher, places, outputs = self._states(model, inputs)
        items = len(student) if num_items is None else num_items
        if drawn is not None:
            items = len(student) * self.accumulation * PartialState().num_processes
        loss = self._divergence(student, head, teacher, items)
        if settings.sft_weight:
            targets = inputs["labels"][places[:, 0], places[:, 1] + 1]
            sft = -sequence_log_probs(student, head, targets, torch.zeros_like(targets), 1).sum() / items
            loss = (1 - settings.sft_weight) * loss + settings.sft_weight * sft
        return self.balance(loss, outputs, figures)

    def _divergence(
        self, student: torch.Tensor, head: torch.Tensor, teacher: torch.Tensor | None, items: torch.Tensor | int
    ) -> torch.Tensor:
        settings = self.settings
        assert teacher is not None and self.teacher is not None
        if self.teacher.is_cut:
            head = head[: len(self.teacher.head)]
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
        speaker, seen = unwrapped(model), inputs
        if self.settings.sampled_by == "teacher":
            assert isinstance(self.teacher, CheckpointTeacher)
            speaker, seen = self.teacher.model, self.teacher.inputs(inputs, inputs.get("teacher_inputs"))
        drawn = resample(speaker, seen, end=self.end, pad=self.pad, max_new_tokens=self.settings.max_new_tokens)
        names = ("input_ids", "attention_mask", "labels")
        return None if drawn is None else inputs | {name: drawn[name] for name in names}


class PreferenceStep(_TaughtStep):
    """Preferences beside a reference, or without one; rows are all chosen answers, then all rejected ones.

    Batches of an optimizer step count alike, however many pairs they hold. `kept` is what of the reference is on disk.
    """

    def __init__(
        self,
        reference: Teacher | None,
        settings: Preference,
        accumulation: int = 1,
        balance: Balance | None = None,
        kept: str = "",
    ):
        super().__init__(reference, balance, kept)
        self.settings, self.accumulation = settings, accumulation

    def __call__(self, model: Any, inputs: Inputs, num_items: torch.Tensor | int | None) -> Outcome:
        """The loss averaged over the batch's pairs, and their rewards, margins and accuracies."""
        settings, rows = self.settings, len(inputs["labels"])
        states, reference_states, places, outputs = self._states(model, inputs)
        targets, head = inputs["labels"][places[:, 0], places[:, 1] + 1], unwrapped(model).lm_head.weight
        policy = sequence_log_probs(states, head, targets, places[:, 0], rows)
        reference = torch.zeros_like(policy)
        if reference_states is not None and self.kind == "log_probs":
            reference = reference.index_add(0, places[:, 0], reference_states[:, 0].to(reference.dtype))
        elif self.teacher is not None and reference_states is not None:
            with torch.no_grad():
                reference = sequence_log_probs(reference_states, self.teacher.head, targets, places[:, 0], rows)
        loss = preference_loss(
            *policy.chunk(2), *reference.chunk(2), kind=settings.kind, beta=settings.beta,
            label_smoothing=settings.label_smoothing, llavamod_compat=settings.llavamod_compat,
        )  # fmt: skip
        if settings.sft_weight:
            loss = loss - settings.sft_weight * policy[: rows // 2].sum() / (places[:, 0] < rows // 2).sum()
        if settings.mimic_weight:
            assert self.teacher is not None and reference_states is not None
            mask = places[:, 0] < rows // 2
            loss = loss + settings.mimic_weight * mimic_loss(states, head, reference_states, self.teacher.head, mask)
        chosen, rejected = (settings.beta * (policy - reference).detach()).chunk(2)
        figures = {
            "rewards/chosen": chosen.mean().item(),
            "rewards/rejected": rejected.mean().item(),
            "rewards/margins": (chosen - rejected).mean().item(),
            "rewards/accuracies": (chosen > rejected).float().mean().item(),
        }
        return self.balance(loss / self.accumulation, outputs, figures)


def build_step(
    stage: Stage, model: Any, processor: Any, media: Media, examples: Sequence[Example], cache: Path
) -> tuple[Step, Collator]:
    """The step of a stage's objective, and the collator that gives it its batches."""
    pad, end = processor.tokenizer.pad_token_id, processor.tokenizer.convert_tokens_to_ids("<|end|>")
    collator, balance, accumulation = Collator(media, pad), balance_of(model, stage), stage.gradient_accumulation
    if stage.objective == "sft":
        return SupervisedStep(stage.ctc_weight, pad, end, accumulation, balance), collator
    teacher: Teacher | None = None
    if stage.teacher:
        teacher = build_teacher(stage, model, processor, media, examples, cache, collator)
    kept = stage.teacher_cache
    if stage.objective == "preference":
        return PreferenceStep(teacher, stage.preference, accumulation, balance, kept), collator
    assert teacher is not None  # the stage was checked
    if stage.mimic.on_policy:
        check_on_policy(stage, teacher)
    return MimicStep(teacher, stage.mimic, balance, kept, pad, end, accumulation), collator


def check_on_policy(stage: Stage, teacher: Teacher) -> None:
    """Raises RecipeError where drawn answers can't be shown to the teacher: it is of another class."""
    if isinstance(teacher, ForeignTeacher):
        raise RecipeError(f"stage {stage.name!r}: on_policy answers need a teacher of ours, not {stage.teacher}")
