"""The step of a stage: what its objective makes of a batch, a loss and figures for the log."""

from accelerate import PartialState

from mixlora.training.data.collate import Collator
from mixlora.training.expert_adapters import balance_of
from mixlora.training.foreign_teacher import is_ours
from mixlora.training.loaded import LoadedStage
from mixlora.training.stages import RecipeError, Stage
from mixlora.training.step_base import Step
from mixlora.training.step_mimic import MimicStep
from mixlora.training.step_preference import PreferenceStep
from mixlora.training.step_supervised import SupervisedStep
from mixlora.training.teacher import SELF
from mixlora.training.teachers import build_teacher

__all__ = ["MimicStep", "PreferenceStep", "Step", "SupervisedStep", "build_step", "check_on_policy"]


def build_step(loaded: LoadedStage) -> tuple[Step, Collator]:
    """The step of a stage's objective, and the collator that gives it its batches."""
    stage, tokenizer = loaded.stage, loaded.processor.tokenizer
    pad, end = tokenizer.pad_token_id, tokenizer.convert_tokens_to_ids("<|end|>")
    collator, balance = Collator(loaded.media, pad), balance_of(loaded.model, stage)
    accumulation, kept = stage.gradient_accumulation, stage.teacher_cache
    if stage.objective == "sft":
        line_break = (tokenizer("\n", add_special_tokens=False)["input_ids"] or [-1])[-1]
        return SupervisedStep(stage.ctc_weight, pad, end, accumulation, balance, stage.train, line_break), collator
    if stage.objective == "mimic" and stage.mimic.on_policy:
        check_on_policy(stage)
    teacher = build_teacher(loaded, collator) if stage.teacher else None
    if stage.objective == "preference":
        return PreferenceStep(teacher, stage.preference, accumulation, balance, kept), collator
    assert teacher is not None  # the stage was checked
    return MimicStep(teacher, stage.mimic, balance, kept, pad, end, accumulation), collator


def check_on_policy(stage: Stage) -> None:
    """Raises RecipeError where answers can't be drawn, or the teacher, of another class, can't be shown them."""
    if PartialState().num_processes > 1:
        raise RecipeError(f"stage {stage.name!r}: on_policy draws answers in one process alone, not among several")
    if stage.teacher != SELF and not is_ours(stage.teacher):
        raise RecipeError(f"stage {stage.name!r}: on_policy answers need a teacher of ours, not {stage.teacher}")
