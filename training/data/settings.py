"""The settings of a stage's data: where rows come from, and the views of their media."""

from dataclasses import dataclass, field
from typing import Any

from mixlora.training.settings import RecipeError

NOISES = ("white", "pink", "babble")
OPERATIONS = {
    "audio": ("speed", "room", "noise"),
    "image": ("rotation", "shift", "scale", "clutter", "blur", "polarity"),
}


@dataclass(frozen=True)
class Source:
    """Training rows of one origin."""

    path: str
    """A JSONL or Parquet file, a folder of such, or a data set's name; `recipe:FILE` lies beside the recipe."""
    weight: float = 1.0
    """How often a row is seen in an epoch: 0.5 takes another half each time. With `streaming`, its share."""
    limit: int = 0
    """Only the first so many rows; 0 takes them all."""
    split: str = "train"
    """Of a data set that the library `datasets` loads."""

    def __post_init__(self) -> None:
        if self.weight <= 0 or self.limit < 0:
            raise RecipeError(f"{self.path}: weight {self.weight} must be above 0, limit {self.limit} at least 0")


@dataclass(frozen=True)
class Augment:
    """Views of a stage's media: what may be done to a clip or a picture, and how often each file is drawn anew."""

    views: int = 1
    """Views of each file, the plain one among them. A row's draws take them in turn: one view each time it is seen."""
    seed: int = 0
    """Of the views; apart from the recipe's, so that trainings with other seeds share cached features."""
    chance: float = 1.0
    """How likely each operation is to act on a view that is not the plain one."""
    speed: list[float] = field(default_factory=list)
    """Clips: lowest and highest factor, such as [0.9, 1.1]; pitch goes along."""
    room: list[float] = field(default_factory=list)
    """Clips: shortest and longest reverberation in seconds, until it is 60 dB down."""
    noise: list[str] = field(default_factory=list)
    """Clips: kinds to draw one of: white, pink, babble (several other clips of the stage at once)."""
    snr: list[float] = field(default_factory=lambda: [5.0, 20.0])
    """Lowest and highest level of the clip over that noise, in dB."""
    rotation: float = 0.0
    """Pictures: largest angle to either side, in degrees."""
    shift: float = 0.0
    """Pictures: largest shift along each axis, as a share of its side."""
    scale: list[float] = field(default_factory=list)
    """Pictures: smallest and largest factor, such as [0.8, 1.2]."""
    clutter: int = 0
    """Pictures: at most so many thin lines and blobs, in the outer sixth of its sides."""
    blur: float = 0.0
    """Pictures: largest radius, as a share of the longer side."""
    polarity: float = 0.0
    """Pictures: how likely bright and dark change places."""

    def __post_init__(self) -> None:
        for name in ("speed", "room", "snr", "scale"):
            pair = getattr(self, name)
            if pair and (len(pair) != 2 or pair[0] > pair[1] or (name != "snr" and pair[0] <= 0)):
                raise RecipeError(f"augment: {name} {pair} is not a lowest and a highest value")
        if wrong := [kind for kind in self.noise if kind not in NOISES]:
            raise RecipeError(f"augment: noise {wrong} is not among {', '.join(NOISES)}")
        if self.noise and not self.snr:
            raise RecipeError("augment: noise needs snr, a lowest and a highest value in dB")
        if min(self.rotation, self.clutter) < 0 or not all(
            0 <= share <= 1 for share in (self.chance, self.shift, self.blur, self.polarity)
        ):
            raise RecipeError(
                "augment: rotation and clutter must be at least 0, chance, shift, blur and polarity from 0 to 1"
            )
        asked = [name for kind in OPERATIONS for name in self.operations(kind)]
        if self.views < 1 or (self.views > 1) != bool(asked):
            raise RecipeError(
                f"augment: give views of at least 2 and an operation, or neither, got views {self.views} and {asked}"
            )

    def operations(self, kind: str) -> dict[str, Any]:
        """What may be done to media of a kind (`image` or `audio`), with the values given."""
        return {name: value for name in OPERATIONS[kind] if (value := getattr(self, name))}
