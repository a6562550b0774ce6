"""What a stage does to the model before it trains: which groups learn, which start as copies, which way rows go."""

from typing import Any

import torch

from mixlora.modeling.modeling_mixlora import MixLoraForConditionalGeneration
from mixlora.modeling.projectors import WhiteningProjector
from mixlora.training.settings import RecipeError, nearest
from mixlora.training.stages import Stage

CLIPS = "speech_projector.speech"
NAMES = "vision_names"
"""Learns by itself, from answers that are names; no other group may learn beside it."""
READER = "vision_letters"
LETTERS = ("speech_letters", READER)
"""Groups that learn by CTC alone, and know how tokens are spelled."""


def select_parameters(model: MixLoraForConditionalGeneration, train: list[str]) -> None:
    """Lets gradients reach the named groups alone, and prints what is trained and what is frozen.

    Raises:
        RecipeError: a group that the model does not have.
    """
    groups = model.parameter_groups()
    for name in train:
        if name not in groups:
            raise RecipeError(f"train: this model has no parameter group {name!r}{nearest(name, groups)}")
    trained = {parameter for name in train for parameter in groups[name]}
    sizes = {}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
        sizes[name] = parameter.numel()
    for name, parameters in groups.items():
        word = "train " if name in train else "freeze"
        print(f"  {word} {name:<32} {sum(sizes[parameter] for parameter in parameters):>12,} parameters")
    print(f"  {sum(sizes[name] for name in trained):,} of {sum(sizes.values()):,} parameters are trained")


def refuse_layerdrop(model: MixLoraForConditionalGeneration) -> None:
    """Raises RecipeError for a trained tower that skips whole layers at random: each rank would skip others."""
    tower: Any = getattr(model.model, "speech_tower", None)
    if tower is None or not any(parameter.requires_grad for parameter in tower.parameters()):
        return
    for field in ("layerdrop", "encoder_layerdrop"):
        if getattr(model.config.speech_config, field, 0):
            raise RecipeError(f"several processes can't train a speech tower with {field}: set it to 0 in the config")


def checked_routing(stage: Stage, config: Any) -> dict[str, str | None]:
    """The config's routing with the stage's changes.

    Raises:
        RecipeError: no such modality, or no such adapter.
    """
    for modality, adapter in stage.routing.items():
        if modality not in config.routing:
            raise RecipeError(f"routing: no modality {modality!r}{nearest(modality, config.routing)}")
        if adapter not in config.adapters:
            raise RecipeError(f"routing: no adapter {adapter!r}{nearest(adapter, config.adapters)}")
    return config.routing | stage.routing


@torch.no_grad()
def copy_groups(model: MixLoraForConditionalGeneration, copy: dict[str, str]) -> None:
    """Gives each parameter group that `copy` names the values of another one of the same shapes.

    Raises:
        RecipeError: no such group, or other shapes.
    """
    groups = model.parameter_groups()
    for target, source in copy.items():
        if source not in groups:
            raise RecipeError(f"copy: this model has no parameter group {source!r}{nearest(source, groups)}")
        ours, theirs = ([model.get_parameter(name) for name in groups[group]] for group in (target, source))
        if [each.shape for each in ours] != [each.shape for each in theirs]:
            raise RecipeError(f"copy: the parameters of {source} do not fit those of {target}")
        for mine, other in zip(ours, theirs, strict=True):
            mine.copy_(other)
        for name, buffer in model.named_buffers():
            if name.startswith(f"model.{source}."):
                model.get_buffer(name.replace(source, target, 1)).copy_(buffer)
        print(f"  {target} starts as a copy of {source}")


def prepare_parts(model: MixLoraForConditionalGeneration, stage: Stage, tokenizer: Any) -> None:
    """What a stage sets before it trains: copies of groups, and for CTC the basis of a trained projector of clips and
    the spelling of tokens.

    Raises:
        RecipeError: a group to copy that is not there, or has other shapes.
    """
    copy_groups(model, stage.copy)
    if NAMES in stage.train:
        if len(stage.train) > 1 or stage.ctc_weight or stage.objective != "sft":
            raise RecipeError(f"stage {stage.name!r}: {NAMES} learns alone, by objective sft and without ctc_weight")
        if not model.model.vision_names.known:
            raise RecipeError(f"stage {stage.name!r}: {NAMES} has no list of names yet, see learn_names")
    for name in _spelled(stage):
        if not stage.ctc_weight:
            raise RecipeError(f"stage {stage.name!r}: {name} learns by CTC alone, and ctc_weight is 0")
        model.model.get_submodule(name).read_spelling(tokenizer)
    projector = _fitted(model, stage)
    if projector is not None:
        table: torch.Tensor = model.model.language_model.embed_tokens.weight
        projector.fit(table)


def prepared_buffers(model: MixLoraForConditionalGeneration, stage: Stage) -> list[str]:
    """Names of the tensors that a stage will change before it trains, and that are no parameters."""
    names = {
        name: name.replace(source, target, 1)
        for target, source in stage.copy.items()
        for name, _ in model.named_buffers()
        if name.startswith(f"model.{source}.")
    }
    changed = [ours for theirs, ours in names.items() if not torch.equal(*map(model.get_buffer, (theirs, ours)))]
    projector = _fitted(model, stage)
    if projector is not None and torch.equal(projector.basis, torch.eye(len(projector.basis)).to(projector.basis)):
        changed.append(f"model.{CLIPS}.basis")
    for name in _spelled(stage):
        part = model.model.get_submodule(name)
        if not part.known:
            changed += [f"model.{name}.{buffer}" for buffer in part.noted]
    return changed


def _spelled(stage: Stage) -> list[str]:
    return [name for name in LETTERS if name in stage.train]


def _fitted(model: MixLoraForConditionalGeneration, stage: Stage) -> WhiteningProjector | None:
    """The projector of clips, where it is of the kind that is read in a basis of its own, and learns by CTC."""
    if not stage.ctc_weight or CLIPS not in stage.train:
        return None
    projector = model.model.speech_projector["speech"]
    return projector if isinstance(projector, WhiteningProjector) else None
