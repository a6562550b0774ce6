"""Checkpoints that stages load, and a stage with all that was loaded for it, as its step and its teacher take it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mixlora.modeling.modeling_mixlora import MixLoraForConditionalGeneration
from mixlora.modeling.processing_mixlora import MixLoraProcessor
from mixlora.training.data.collate import Example
from mixlora.training.data.media import Media
from mixlora.training.settings import RecipeError
from mixlora.training.stages import Stage


@dataclass(frozen=True)
class LoadedStage:
    """What the step of a stage is built from.

    Attributes:
        model, processor: of the student.
        media: reads and encodes the stage's pictures and clips.
        examples: of all rows; none where they are read while it trains.
        cache: folder of what is computed once.
        sharded: the model will be, so that a teacher that is the model as it is now must be a whole copy.
    """

    stage: Stage
    model: Any
    processor: Any
    media: Media
    examples: Sequence[Example]
    cache: Path
    sharded: bool = False


def load_checkpoint(name: str, role: str) -> tuple[MixLoraForConditionalGeneration, MixLoraProcessor]:
    """A model of ours in float32, and its processor.

    Args:
        name: a folder or a hub id.
        role: what a recipe calls it.

    Raises:
        RecipeError: neither can be loaded.
    """
    try:
        model = MixLoraForConditionalGeneration.from_pretrained(name, dtype=torch.float32)
        return model, MixLoraProcessor.from_pretrained(name)
    except OSError as error:
        raise no_checkpoint(name, role, error) from error


def no_checkpoint(name: str, role: str, error: OSError) -> RecipeError:
    """What to say of a name under which nothing loads, in a line."""
    reason = str(error).splitlines()[0] if Path(name).is_dir() else "no such folder, nor a hub id that loads"
    return RecipeError(f"{role} {name}: no checkpoint with its processor: {reason}")
