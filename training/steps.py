"""What an objective makes of a batch: a loss, and figures for the log."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel as unwrapped

from mixlora.modeling.modeling_mixlora import MixLoraForConditionalGeneration
from mixlora.modeling.processing_mixlora import MixLoraProcessor
from mixlora.modeling.projectors import CTC_SHARPNESS
from mixlora.training.data.collate import Collator, Example
from mixlora.training.data.media import Media
from mixlora.training.objectives import (
    ctc_loss,
    mimic_loss,
    next_token_loss,
    preference_loss,
    response_mask,
    sequence_log_probs,
    supervised_positions,
)
from mixlora.training.stages import Mimic, Preference, Stage
from mixlora.training.teacher import NOT_THE_STUDENTS, SELF, CheckpointTeacher, SelfTeacher, Teacher, check_fit
from mixlora.training.teacher_cache import cache_states

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
    """

    def __init__(self, ctc_weight: float, pad: int, end: int, accumulation: int = 1):
        self.ctc_weight, self.pad, self.end, self.accumulation = ctc_weight, pad, end, accumulation

    def __call__(self, model: Any, inputs: Inputs, num_items: torch.Tensor | int | None) -> Outcome:
        """Logits are made only where a token is labelled."""
        labels = inputs["labels"]
        rest = {name: value for name, value in inputs.items() if name != "labels"}
        heard = self._ctc(unwrapped(model), rest, labels) if self.ctc_weight else None
        if heard is not None and self.ctc_weight == 1:
            return heard, {}
        positions, targets = supervised_positions(labels)
        loss = next_token_loss(model(**rest, logits_to_keep=positions).logits, targets, num_items)
        return (loss, {}) if heard is None else ((1 - self.ctc_weight) * loss + self.ctc_weight * heard, {})

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

    def __init__(self, teacher: Teacher | None):
        self.teacher = teacher

    def _states(self, model: Any, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Hidden states `[tokens, width]` that predict labelled tokens, the teacher's, and places `[tokens, 2]`."""
        where = response_mask(inputs["labels"])
        rest = {name: value for name, value in inputs.items() if name not in NOT_THE_STUDENTS}
        student = unwrapped(model).model(**rest, use_cache=False).last_hidden_state[where]
        teacher = None
        if "teacher_states" in inputs:
            teacher = torch.cat(inputs["teacher_states"]).to(student.device)
        elif self.teacher is not None:
            teacher = self.teacher.hidden(rest, inputs.get("teacher_inputs"))[where]
        return student, teacher, where.nonzero()


class MimicStep(_TaughtStep):
    """The divergence from the teacher, or in part cross entropy."""

    def __init__(self, teacher: Teacher, settings: Mimic):
        super().__init__(teacher)
        self.settings = settings

    def __call__(self, model: Any, inputs: Inputs, num_items: torch.Tensor | int | None) -> Outcome:
        """The student's loss and how it is made up."""
        assert self.teacher is not None
        settings, head = self.settings, unwrapped(model).lm_head.weight
        student, teacher, places = self._states(model, inputs)
        assert teacher is not None
        items = len(student) if num_items is None else num_items
        loss = mimic_loss(
            student, head, teacher, self.teacher.head, places.new_ones(len(places)),
            divergence=settings.divergence, temperature=settings.temperature, beta=settings.beta,
            t_squared=settings.t_squared, num_items=items,
        )  # fmt: skip
        if not settings.sft_weight:
            return loss, {}
        targets = inputs["labels"][places[:, 0], places[:, 1] + 1]
        sft = -sequence_log_probs(student, head, targets, torch.zeros_like(targets), 1).sum() / items
        return (1 - settings.sft_weight) * loss + settings.sft_weight * sft, {}


class PreferenceStep(_TaughtStep):
    """Preferences beside a reference, or without one; rows are all chosen answers, then all rejected ones.

    Batches of an optimizer step count alike, however many pairs they hold.
    """

    def __init__(self, reference: Teacher | None, settings: Preference, accumulation: int = 1):
        super().__init__(reference)
        self.settings, self.accumulation = settings, accumulation

    def __call__(self, model: Any, inputs: Inputs, num_items: torch.Tensor | int | None) -> Outcome:
        """The loss averaged over the batch's pairs, and their rewards, margins and accuracies."""
        settings, rows = self.settings, len(inputs["labels"])
        states, reference_states, places = self._states(model, inputs)
        targets = inputs["labels"][places[:, 0], places[:, 1] + 1]
        policy = sequence_log_probs(states, unwrapped(model).lm_head.weight, targets, places[:, 0], rows)
        reference = torch.zeros_like(policy)
        if self.teacher is not None and reference_states is not None:
            with torch.no_grad():
                reference = sequence_log_probs(reference_states, self.teacher.head, targets, places[:, 0], rows)
        loss = preference_loss(
            *policy.chunk(2), *reference.chunk(2), kind=settings.kind, beta=settings.beta,
            label_smoothing=settings.label_smoothing, llavamod_compat=settings.llavamod_compat,
        )  # fmt: skip
        if settings.sft_weight:
            loss = loss - settings.sft_weight * policy[: rows // 2].sum() / (places[:, 0] < rows // 2).sum()
        chosen, rejected = (settings.beta * (policy - reference).detach()).chunk(2)
        return loss / self.accumulation, {
            "rewards/chosen": chosen.mean().item(),
            "rewards/rejected": rejected.mean().item(),
            "rewards/margins": (chosen - rejected).mean().item(),
            "rewards/accuracies": (chosen > rejected).float().mean().item(),
        }


def build_step(
    stage: Stage, model: Any, processor: Any, media: Media, examples: Sequence[Example], cache: Path
) -> tuple[Step, Collator]:
    """The step of a stage's objective, and the collator that gives it its batches."""
    pad = processor.tokenizer.pad_token_id
    collator = Collator(media, pad)
    if stage.objective == "sft":
        end = processor.tokenizer.convert_tokens_to_ids("<|end|>")
        return SupervisedStep(stage.ctc_weight, pad, end, stage.gradient_accumulation), collator
    teacher: Teacher | None = None
    if stage.teacher:
        teacher, taught_by = _teacher(stage, model, processor, media, examples, cache, collator)
        if stage.teacher_cache:
            whole = copy.copy(media)  # what is on disk is of whole clips
            whole.mask_time = 0.0
            plain = Collator(whole, pad, collator.teacher_media)
            dtype = getattr(torch, stage.teacher_cache)
            collator.states = cache_states(teacher, taught_by, plain, examples, cache, dtype)
    if stage.objective == "preference":
        return PreferenceStep(teacher, stage.preference, stage.gradient_accumulation), collator
    assert teacher is not None  # the stage was checked
    return MimicStep(teacher, stage.mimic), collator


def _teacher(
    stage: Stage,
    model: Any,
    processor: Any,
    media: Media,
    examples: Sequence[Example],
    cache: Path,
    collator: Collator,
) -> tuple[Teacher, Any]:
    """The stage's teacher and its model; where its towers are others than the student's, the collator feeds them."""
    if stage.teacher == SELF:
        return SelfTeacher(model), model
    loaded = MixLoraForConditionalGeneration.from_pretrained(stage.teacher, dtype=torch.float32).to(model.device)
    teacher_processor = MixLoraProcessor.from_pretrained(stage.teacher)
    check_fit(model, processor, loaded, teacher_processor, stage.teacher)
    teacher = CheckpointTeacher(loaded)
    seen = Media(loaded, teacher_processor)
    seen.augmenter = media.augmenter
    both = [each for example in examples for each in (example, example.rejected) if each is not None]
    images, audio = ([item for each in both for item in getattr(each, kind)] for kind in ("images", "audio"))
    seen.cache(loaded, cache, images, audio)
    if not seen.same_features(media):
        collator.teacher_media = seen
    return teacher, loaded
