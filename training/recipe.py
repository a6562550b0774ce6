"""A recipe: the stages of a training, read from YAML, with `key=value` overrides from the command line."""

import dataclasses
import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml

PACKAGED = Path(__file__).parent / "recipes"
SCHEDULES = ("cosine", "linear", "constant")
NOISES = ("white", "pink", "babble")
OPERATIONS = {
    "audio": ("speed", "room", "noise"),
    "image": ("rotation", "shift", "scale", "clutter", "blur", "polarity"),
}


class RecipeError(ValueError):
    """A recipe or an override that can't be run, with the place and what was expected there."""


@dataclass(frozen=True)
class Source:
    """One JSONL file of training rows."""

    path: str
    """The file; media paths in it are relative to its folder."""
    weight: float = 1.0
    """How often a row is seen in an epoch: 0.5 takes another half each epoch, 2 takes each row twice."""
    limit: int = 0
    """Only the first so many rows; 0 takes them all."""

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


@dataclass(frozen=True)
class Stage:
    """One stage: what it trains, on which data, for how long."""

    name: str
    """Names the output folder, and the stage in overrides."""
    train: list[str]
    """Parameter groups to train, names of `model.parameter_groups()`; all other parameters stay bit-equal."""
    data: list[Source]
    """Files whose rows are mixed."""
    learning_rate: float
    """Peak of the schedule."""
    epochs: float = 0.0
    """Passes over the data; give this or `max_steps`."""
    max_steps: int = 0
    """Optimizer steps; give this or `epochs`."""
    tokens_per_batch: int = 0
    """Budget of a batch, padding and placeholders included; give this or `rows_per_batch`."""
    rows_per_batch: int = 0
    """Rows of a batch; give this or `tokens_per_batch`."""
    copy: dict[str, str] = field(default_factory=dict)
    """Trained group -> the group whose values it starts from."""
    ctc_weight: float = 0.0
    """Share of the loss that is CTC on the projected clip (Watanabe et al. 2017, II-C); 1 does not run the decoder."""
    mask_time: float = 0.0
    """Share of each clip's cached frames that is set to zero in short spans, drawn anew each time (SpecAugment)."""
    gradient_accumulation: int = 1
    """Batches of one optimizer step; the loss is normalised by the tokens of all of them."""
    max_length: int = 512
    """Plain text is packed into blocks of this many tokens; longer conversations are left out, and counted."""
    schedule: str = "cosine"
    """cosine, linear or constant, after the warm-up."""
    warmup: float = 0.03
    """Share of the steps in which the learning rate rises from 0."""
    weight_decay: float = 0.0
    """AdamW's, on matrices alone."""
    beta2: float = 0.98
    """AdamW's second moment decay."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm; 0 leaves them."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    logging_steps: int = 10
    """Steps between two points of the loss curve."""
    save_steps: int = 200
    """Steps between two checkpoints; a multiple of `logging_steps`, so that a resumed curve is the same curve."""
    augment: Augment = field(default_factory=Augment)
    """Seeded views of the media, see below; without it each file is read as it is."""

    def __post_init__(self) -> None:
        where = f"stage {self.name!r}"
        for pair in (("epochs", "max_steps"), ("tokens_per_batch", "rows_per_batch")):
            given = [key for key in pair if getattr(self, key) > 0]
            if len(given) != 1:
                raise RecipeError(f"{where}: give exactly one of {pair[0]} and {pair[1]}, got {given or 'neither'}")
        if not self.train or not self.data:
            raise RecipeError(f"{where}: train and data must each name at least one, got {self.train} and {self.data}")
        if wrong := sorted(set(self.copy) - set(self.train)):
            raise RecipeError(f"{where}: copy into {', '.join(wrong)}, which this stage does not train")
        if not self.name or set(self.name) & set("/\\. ="):
            raise RecipeError(f"{where}: a stage's name is a folder's name without dots, spaces, = or slashes")
        if self.schedule not in SCHEDULES:
            raise RecipeError(f"{where}: schedule {self.schedule!r} is not one of {', '.join(SCHEDULES)}")
        if min(self.gradient_accumulation, self.logging_steps, self.save_steps) < 1 or self.max_length < 2:
            raise RecipeError(
                f"{where}: gradient_accumulation, logging_steps, save_steps must be at least 1, max_length 2"
            )
        if self.save_steps % self.logging_steps:
            raise RecipeError(
                f"{where}: save_steps {self.save_steps} is not a multiple of logging_steps {self.logging_steps}"
            )
        if not 0 <= self.ctc_weight <= 1:
            raise RecipeError(f"{where}: ctc_weight {self.ctc_weight} is a share of the loss, from 0 to 1")
        if not 0 <= self.mask_time < 1:
            raise RecipeError(f"{where}: mask_time {self.mask_time} is a share of the frames, from 0 to below 1")
        if not 0 <= self.warmup < 1:
            raise RecipeError(f"{where}: warmup {self.warmup} is a share of the steps, from 0 to below 1")


@dataclass(frozen=True)
class Recipe:
    """A training: the checkpoint to start from, and the stages in order."""

    model: str
    """Folder or hub id of the checkpoint to start from, processor included."""
    stages: list[Stage] = field(default_factory=list)
    """Run in order, each from the one before."""
    seed: int = 0
    """Of the data order, the dropout and whatever else is drawn."""
    cache: str = ""
    """Folder of frozen tower features; a folder `features` in the output by default."""

    def __post_init__(self) -> None:
        names = [stage.name for stage in self.stages]
        if not names or len(set(names)) != len(names):
            raise RecipeError(f"stages: at least one, each with its own name, got {names}")


def find_recipe(name: str | Path) -> Path:
    """The file of a recipe, given as a path or as the name of one that ships with the package.

    Raises:
        RecipeError: neither a file nor a packaged name.
    """
    for path in (Path(name), PACKAGED / f"{name}.yaml"):
        if path.is_file():
            return path
    packaged = sorted(str(path.relative_to(PACKAGED).with_suffix("")) for path in PACKAGED.rglob("*.yaml"))
    raise RecipeError(f"{name}: no such recipe file, and not a packaged recipe; those are {', '.join(packaged)}")


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Reads a recipe and applies overrides.

    Args:
        path: a YAML file.
        overrides: `key=value` for the recipe, `STAGE.key=value` for a stage; `stages=[NAME, ...]` keeps only these.
            The value is YAML.

    Raises:
        RecipeError: not YAML, an unknown key (the nearest right one is named) or a value of the wrong kind.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not YAML: {error}") from error
    if not isinstance(raw, dict) or not isinstance(raw.get("stages"), list):
        raise RecipeError(f"{path}: expected a mapping with a list of stages")
    if not all(isinstance(stage, dict) for stage in raw["stages"]):
        raise RecipeError(f"{path}: each stage must be a mapping")
    for override in overrides or []:
        _override(raw, override)
    return _build(Recipe, raw, str(path))


def _override(raw: dict[str, Any], override: str) -> None:
    """Applies one `key=value` to the YAML tree in place."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"override {override!r}: expected key=value or STAGE.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"override {override!r}: the value is not YAML: {error}") from error
    stages = {str(stage.get("name")): stage for stage in raw["stages"]}
    name, dot, inner = key.partition(".")
    if dot:
        if name not in stages:
            raise RecipeError(f"override {override!r}: no stage {name!r}{nearest(name, stages)}")
        _check_key(Stage, inner, f"override {override!r}")
        stages[name][inner] = value
    elif key == "stages":
        chosen = value if isinstance(value, list) else [value]
        for name in chosen:
            if name not in stages:
                raise RecipeError(f"override {override!r}: no stage {name!r}{nearest(str(name), stages)}")
        raw["stages"] = [stage for stage in raw["stages"] if stage.get("name") in chosen]
    else:
        _check_key(Recipe, key, f"override {override!r}")
        raw[key] = value


def _build(kind: type, raw: Any, where: str) -> Any:
    """A dataclass of `kind` from a mapping, every field converted to its annotated type."""
    if not isinstance(raw, dict):
        raise RecipeError(f"{where}: expected a mapping, got {raw!r}")
    hints = get_type_hints(kind)
    for key in raw:
        _check_key(kind, str(key), where)
    for entry in dataclasses.fields(kind):
        required = entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
        if required and entry.name not in raw:
            raise RecipeError(f"{where}: {entry.name} is missing")
    return kind(**{key: _convert(hints[key], value, f"{where}: {key}") for key, value in raw.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as `hint`: a list, a dataclass, a bool, a number (also written `2e-3`) or a string."""
    if get_origin(hint) is list:
        if not isinstance(value, list):
            raise RecipeError(f"{where}: expected a list, got {value!r}")
        return [_convert(get_args(hint)[0], item, f"{where}[{index}]") for index, item in enumerate(value)]
    if get_origin(hint) is dict:
        if not isinstance(value, dict):
            raise RecipeError(f"{where}: expected a mapping, got {value!r}")
        return {key: _convert(get_args(hint)[1], item, f"{where}: {key}") for key, item in value.items()}
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where)  # type: ignore[arg-type]
    if isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    if hint in (int, float) and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            number = float(value)  # YAML reads 2e-3 as a string
        except ValueError:
            number = float("nan")
        if number == number and (hint is float or number.is_integer()):
            return hint(number)
    raise RecipeError(f"{where}: expected {hint.__name__}, got {value!r}")


def _check_key(kind: type, key: str, where: str) -> None:
    known = [entry.name for entry in dataclasses.fields(kind)]
    if key not in known:
        raise RecipeError(f"{where}: unknown key {key!r}{nearest(key, known)}")


def nearest(key: str, known: Any) -> str:
    """`; did you mean 'x'?` for the nearest of `known`, or the whole list where none is near."""
    close = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; expected one of {', '.join(known)}"
