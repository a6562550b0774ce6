"""A stage with all that was loaded for it, as its step and its teacher take it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixlora.training.data.collate import Example
from mixlora.training.data.media import Media
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
