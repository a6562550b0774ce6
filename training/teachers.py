"""A stage's teacher, from its name: the model itself, a checkpoint of ours, or a model of another class."""

import copy
from typing import Any

import torch

from mixlora.training.data.collate import Collator
from mixlora.training.data.media import Media
from mixlora.training.foreign_teacher import is_ours, load_foreign
from mixlora.training.loaded import LoadedStage, load_checkpoint
from mixlora.training.teacher import SELF, CheckpointTeacher, KeptTeacher, SelfTeacher, Teacher, check_fit
from mixlora.training.teacher_cache import Form, cache_states


def build_teacher(loaded: LoadedStage, collator: Collator) -> Teacher:
    """A stage's teacher, on disk or in memory; the collator gives it what it needs.

    Where the stage keeps what it says on disk, that is computed here, and of the teacher only its head stays.
    """
    stage = loaded.stage
    teacher, taught_by = _load(loaded, collator)
    if not stage.teacher_cache:
        return teacher
    whole = copy.copy(loaded.media)  # what is on disk is of whole clips
    whole.mask_time = whole.mask_bands = 0.0
    plain = Collator(whole, collator.pad, collator.teacher_media)
    plain.foreign = collator.foreign
    settings = None if plain.foreign is None else plain.foreign.settings
    collator.states = cache_states(teacher, taught_by, plain, loaded.examples, loaded.cache, Form.of(stage), settings)
    return KeptTeacher(teacher.head, teacher.is_cut)


def _load(loaded: LoadedStage, collator: Collator) -> tuple[Teacher, Any]:
    """A stage's teacher and its model; where its inputs are others than the student's, the collator makes them."""
    name, model, media = loaded.stage.teacher, loaded.model, loaded.media
    if name == SELF:
        return (CheckpointTeacher(copy.deepcopy(model)) if loaded.sharded else SelfTeacher(model)), model
    if not is_ours(name):
        foreign, collator.foreign = load_foreign(name, loaded.processor, media, model)
        return foreign, foreign.model
    other, processor = load_checkpoint(name, "teacher")
    other.to(model.device)
    check_fit(model, loaded.processor, other, processor, name)
    teacher = CheckpointTeacher(other)
    if not loaded.sharded and (shared := share_frozen(model, other)):
        print(f"  teacher: {shared:,} parameters are the student's own frozen ones, kept once")
    seen = Media(other, processor)
    seen.augmenter = media.augmenter
    both = [each for example in loaded.examples for each in (example, example.rejected) if each is not None]
    images, audio = ([item for each in both for item in getattr(each, kind)] for kind in ("images", "audio"))
    seen.cache(other, loaded.cache, images, audio)
    if not seen.same_features(media):
        collator.teacher_media = seen
    return teacher, other


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
