"""A stage's teacher, from its name: the model itself, a checkpoint of ours, or a model of another class."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mixlora.modeling.modeling_mixlora import MixLoraForConditionalGeneration
from mixlora.modeling.processing_mixlora import MixLoraProcessor
from mixlora.training.data.collate import Collator, Example
from mixlora.training.data.media import Media
from mixlora.training.foreign_teacher import is_ours, load_foreign
from mixlora.training.stages import Stage
from mixlora.training.teacher import SELF, CheckpointTeacher, KeptTeacher, SelfTeacher, Teacher, check_fit
from mixlora.training.teacher_cache import Form, cache_states


def build_teacher(
    stage: Stage,
    model: Any,
    processor: Any,
    media: Media,
    examples: Sequence[Example],
    cache: Path,
    collator: Collator,
    sharded: bool = False,
) -> Teacher:
    """The teacher, on disk or in memory; the collator gives it what it needs.

    Where the stage keeps what it says on disk, that is computed here, and of the teacher only its head stays.

    Args:
        sharded: the model will be, so that its weights of now must be copied, whole, and can't be shared.
    """
    teacher, taught_by = _load(stage, model, processor, media, examples, cache, collator, sharded)
    if not stage.teacher_cache:
        return teacher
    whole = copy.copy(media)  # what is on disk is of whole clips
    whole.mask_time = 0.0
    plain = Collator(whole, collator.pad, collator.teacher_media)
    plain.foreign = collator.foreign
    settings = None if plain.foreign is None else plain.foreign.settings
    collator.states = cache_states(teacher, taught_by, plain, examples, cache, Form.of(stage), settings)
    return KeptTeacher(teacher.head, teacher.is_cut)


def _load(
    stage: Stage,
    model: Any,
    processor: Any,
    media: Media,
    examples: Sequence[Example],
    cache: Path,
    collator: Collator,
    sharded: bool,
) -> tuple[Teacher, Any]:
    """The stage's teacher and its model; where its inputs are others than the student's, the collator makes them."""
    if stage.teacher == SELF:
        return (CheckpointTeacher(copy.deepcopy(model)) if sharded else SelfTeacher(model)), model
    if not is_ours(stage.teacher):
        foreign, collator.foreign = load_foreign(stage.teacher, processor, media, model)
        return foreign, foreign.model
    loaded = MixLoraForConditionalGeneration.from_pretrained(stage.teacher, dtype=torch.float32).to(model.device)
    teacher_processor = MixLoraProcessor.from_pretrained(stage.teacher)
    check_fit(model, processor, loaded, teacher_processor, stage.teacher)
    teacher = CheckpointTeacher(loaded)
    if not sharded and (shared := share_frozen(model, loaded)):
        print(f"  teacher: {shared:,} parameters are the student's own frozen ones, kept once")
    seen = Media(loaded, teacher_processor)
    seen.augmenter = media.augmenter
    both = [each for example in examples for each in (example, example.rejected) if each is not None]
    images, audio = ([item for each in both for item in getattr(each, kind)] for kind in ("images", "audio"))
    seen.cache(loaded, cache, images, audio)
    if not seen.same_features(media):
        collator.teacher_media = seen
    return teacher, loaded


def share_frozen(student: torch.nn.Module, teacher: torch.nn.Module) -> int:
    """Lets a teacher use the student's frozen parameters where its own are equal bit by bit: one copy in memory.

    So a teacher that has the same decoder with other adapters costs its adapters alone, once it is loaded.

    Returns:
        How many numbers are shared.
    """
    frozen = {name: value for name, value in student.named_parameters() if not value.requires_grad}
    shared = 0
    for name, value in teacher.named_parameters():
        mine = frozen.get(name)
        if mine is None or (mine.shape, mine.dtype, mine.device) != (value.shape, value.dtype, value.device):
            continue
        if torch.equal(mine, value):
            value.data = mine.data
            shared += value.numel()
    return shared
