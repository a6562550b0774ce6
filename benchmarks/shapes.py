"""The shapes that all benchmarks share: a small model of Phi-4-Multimodal's proportions, and the rows it answers.

Phi-4's decoder is 3072 wide, with 24 heads, 8 of keys and values, an MLP of 8192, and adapters of ranks 256 and 320.
`FULL` is a quarter of that in width; its towers are as wide as two cores can bear. `TOY` is for tests.
"""

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Rows:
    """What the rows of a batch hold: text alone, or a question and a picture or a clip.

    Attributes:
        text: tokens of each text row.
        pictures: height and width of the picture of each image row.
        clips: seconds of the clip of each speech row.
        question: tokens of text beside a picture or a clip.
    """

    text: tuple[int, ...]
    pictures: tuple[tuple[int, int], ...]
    clips: tuple[float, ...]
    question: int = 20


@dataclass(frozen=True)
class Shapes:
    """Sizes of a model, and its rows.

    Attributes:
        ranks: of the adapters.
        crop: side of a crop in pixels; a patch has 14.
        tower: hidden size, MLP, layers, heads of the vision tower.
        conformer: hidden size, MLP, blocks, heads of the speech tower.
        answered: rows of inference; trained: rows of a training step; new_tokens: that each row is answered with.
        label_tokens: of each row, at its end, that training learns.
        collection: side lengths, `(height, width, how many)`, of the pictures to encode.
        processed: how many pictures and clips are processed, a picture's size, a clip's seconds.
    """

    vocabulary: int = 200064
    width: int = 768
    inner: int = 2048
    layers: int = 15
    heads: int = 12
    key_value_heads: int = 4
    ranks: tuple[tuple[str, int], ...] = (("vision", 64), ("speech", 80))
    crop: int = 448
    tower: tuple[int, int, int, int] = (192, 716, 6, 4)
    conformer: tuple[int, int, int, int] = (256, 384, 6, 4)
    answered: Rows = Rows((20, 40, 80, 160), ((360, 480), (224, 448), (300, 440), (420, 336)), (4.0, 6.0, 8.0, 12.0))
    trained: Rows = Rows((60, 120), ((300, 440), (360, 480), (420, 336)), (4.0, 8.0, 12.0), 40)
    new_tokens: int = 64
    label_tokens: int = 24
    collection: tuple[tuple[int, int, int], ...] = ((2688, 2688, 1), (448, 448, 7))
    processed: tuple[int, tuple[int, int], float] = (64, (480, 640), 10.0)

    @property
    def image_id(self) -> int:
        """The placeholder of a picture."""
        return self.vocabulary - 54

    @property
    def audio_id(self) -> int:
        """The placeholder of a clip."""
        return self.vocabulary - 53

    def to_dict(self) -> dict[str, Any]:
        """For a report."""
        return {name: getattr(self, name) for name in ("vocabulary", "width", "inner", "layers", "heads", "ranks")}


FULL = Shapes()
SMALL_VOCABULARY = replace(FULL, vocabulary=32064)
TOY = Shapes(
    vocabulary=512,
    width=64,
    inner=96,
    layers=2,
    heads=4,
    key_value_heads=2,
    ranks=(("vision", 4), ("speech", 3)),
    crop=56,
    tower=(32, 48, 2, 2),
    conformer=(24, 32, 2, 2),
    answered=Rows((5, 9), ((30, 50), (50, 70)), (0.5, 0.8), 6),
    trained=Rows((8,), ((30, 50), (50, 70)), (0.5, 0.8), 6),
    new_tokens=3,
    label_tokens=3,
    collection=((112, 112, 1), (56, 56, 2)),
    processed=(3, (60, 80), 0.5),
)
VARIANTS = {"full": FULL, "small-vocabulary": SMALL_VOCABULARY, "toy": TOY}
