"""What an objective makes of a batch: a loss, and figures for the log."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from mixlora.modeling.idle import in_process_group, whole_table
from mixlora.modeling.modeling_mixlora import MixLoraForConditionalGeneration
from mixlora.modeling.processing_mixlora import MixLoraProcessor
from mixlora.modeling.projectors import CTC_SHARPNESS
from mixlora.training.data.collate import Collator, Example
from mixlora.training.data.media import Media
from mixlora.training.objectives import (
    IGNORED,
    ctc_loss,
    ctc_targets,
    mimic_loss,
    next_token_loss,
    preference_loss,
    response_mask,
    sequence_log_probs,
    sum_over_ranks,
    supervised_positions,
)
from mixlora.training.stages import Mimic, Preference, Stage
from mixlora.training.teacher import NOT_THE_STUDENTS, SELF, CheckpointTeacher, SelfTeacher, Teacher, check_fit
from mixlora.training.teacher_cache import cache_states

Inputs = dict[str, Any]
Outcome = tuple[torch.Tensor, dict[str, float]]
Step = Callable[[Any, Inputs, torch.Tensor | int | None], Outcome]
"""Model (perhaps wrapped), inputs with labels, and the labelled tokens of the optimizer step -> loss and figures.

The loss is this process's share: those of all ranks add up to the loss of the batch. Figures are those of all ranks.
What runs the model does so inside the forward of what wraps it, so that DDP, FSDP and their like see it.
"""


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
        if not self.ctc_weight:
            return self._cross_entropy(model, inputs, num_items), {}
        return model(within=lambda inner: self._with_ctc(inner, inputs, num_items)), {}

    def _cross_entropy(self, model: Any, inputs: Inputs, num_items: torch.Tensor | int | None) -> torch.Tensor:
        positions, targets = supervised_positions(inputs["labels"])
        rest = {name: value for name, value in inputs.items() if name != "labels"}
        return next_token_loss(model(**rest, logits_to_keep=positions).logits, targets, num_items)

    def _with_ctc(self, model: Any, inputs: Inputs, num_items: torch.Tensor | int | None) -> torch.Tensor:
        heard = self._ctc(model, inputs, inputs["labels"])
        if self.ctc_weight == 1 and not in_process_group():
            return heard
        # Of several ranks each runs the decoder even where it counts for nothing, since its gradients are exchanged.
        loss = self._cross_entropy(model.forward, inputs, num_items)
        return (1 - self.ctc_weight) * loss + self.ctc_weight * heard

    def _ctc(self, model: MixLoraForConditionalGeneration, inputs: Inputs, labels: torch.Tensor) -> torch.Tensor:
        features = inputs.get("mm_encoder_outputs", {}).get("audio_features", [])
        if "input_features" in inputs:
            features = model.model.encode_speech(inputs["input_features"], inputs["input_features_mask"])
        blank = model.config.speech_blank_token_id
        said = sum(len(target) for target in ctc_targets(labels, self.end))
        return (
            ctc_loss(
                model.model.project_speech([clip.to(model.device) for clip in features]),
                labels,
                whole_table(model.model.language_model.embed_tokens),
                blank=self.pad if blank is None else blank,
                end=self.end,
                sharpness=CTC_SHARPNESS,
                num_items=sum_over_ranks(torch.tensor(said, device=model.device)).clamp(min=1),
            )
            / self.accumulation
        )


class _TaughtStep:
    """Shared by the objectives that look at hidden states beside those of a teacher."""

    def __init__(self, teacher: Teacher | None):
        self.teacher = teacher

    def __call__(self, model: Any, inputs: Inputs, num_items: torch.Tensor | int | None) -> Outcome:
        """See [`Step`]."""
        outcome: Outcome = model(within=lambda inner: self._outcome(inner, inputs, num_items))
        return outcome

    def _outcome(self, model: Any, inputs: Inputs, num_items: torch.Tensor | int | None) -> Outcome:
        raise NotImplementedError

    def _states(self, model: Any, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Hidden states `[tokens, width]` that predict labelled tokens, the teacher's, and places `[tokens, 2]`."""
        where = response_mask(inputs["labels"])
        rest = {name: value for name, value in inputs.items() if name not in NOT_THE_STUDENTS}
        student = model.model(**rest, use_cache=False).last_hidden_state[where]
        if in_process_group():  # a forward of the head, though of nothing, has its shards gathered
            student = student + model.lm_head(student[:0]).sum()
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

    def _outcome(self, model: Any, inputs: Inputs, num_items: torch.Tensor | int | None) -> Outcome:
        """The student's loss and how it is made up."""
        assert self.teacher is not None
        student, teacher, places = self._states(model, inputs)
        settings, head = self.settings, model.lm_head.weight
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

    def _outcome(self, model: Any, inputs: Inputs, num_items: torch.Tensor | int | None) -> Outcome:
        """The loss averaged over the batch's pairs, and their rewards, margins and accuracies."""
        settings, rows = self.settings, len(inputs["labels"])
        states, reference_states, places = self._states(model, inputs)
        targets = inputs["labels"][places[:, 0], places[:, 1] + 1]
        policy = sequence_log_probs(states, model.lm_head.weight, targets, places[:, 0], rows)
        reference = torch.zeros_like(policy)
        if self.teacher is not None and reference_states is not None:
            with torch.no_grad():
                reference = sequence_log_probs(reference_states, self.teacher.head, targets, places[:, 0], rows)
        real = (inputs["labels"] != IGNORED).any(dim=1)[: rows // 2]  # all but what idle ranks run
        policies, references = ([half[real] for half in each.chunk(2)] for each in (policy, reference))
        answer = places[:, 0] < rows // 2
        pairs, tokens = sum_over_ranks(torch.stack([real.sum(), answer.sum()]))
        loss = preference_loss(
            *policies, *references, kind=settings.kind, beta=settings.beta, label_smoothing=settings.label_smoothing,
            llavamod_compat=settings.llavamod_compat, num_pairs=pairs if in_process_group() else None,
        )  # fmt: skip
        if settings.sft_weight:
            loss = loss - settings.sft_weight * policies[0].sum() / tokens
        gained = [settings.beta * (ours - theirs).detach() for ours, theirs in zip(policies, references, strict=True)]
        return loss / self.accumulation, self._figures(*gained, pairs)

    @staticmethod
    def _figures(chosen: torch.Tensor, rejected: torch.Tensor, pairs: torch.Tensor) -> dict[str, float]:
        """Means over the pairs of all ranks, from the rewards `[pairs]` of this one."""
        each = torch.stack([chosen, rejected, chosen - rejected, (chosen > rejected).to(chosen.dtype)])
        means = (sum_over_ranks(each.sum(dim=1)) / pairs).tolist()
        names = ("chosen", "rejected", "margins", "accuracies")
        return {f"rewards/{name}": mean for name, mean in zip(names, means, strict=True)}


def build_step(
    stage: Stage,
    model: Any,
    processor: Any,
    media: Media,
    examples: Sequence[Example],
    cache: Path,
    sharded: bool = False,
) -> tuple[Step, Collator]:
    """The step of a stage's objective, and the collator that gives it its batches.

    Args:
        sharded: the model will be, so that a teacher that is the model as it is now must be a copy.
    """
    pad = processor.tokenizer.pad_token_id
    collator = Collator(media, pad)
    if stage.objective == "sft":
        end = processor.tokenizer.convert_tokens_to_ids("<|end|>")
        return SupervisedStep(stage.ctc_weight, pad, end, stage.gradient_accumulation), collator
    teacher: Teacher | None = None
    if stage.teacher:
        if sharded and stage.teacher == SELF:
            teacher, taught_by = CheckpointTeacher(copy.deepcopy(model)), model
        else:
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
