"""What a training is made of: a recipe of stages, their sources, and the settings of their objectives."""

import re
from dataclasses import dataclass, field
from typing import Any

from mixlora.training.objectives import DIVERGENCES, PREFERENCES

OBJECTIVES = ("sft", "mimic", "preference")
CACHE_DTYPES = ("float32", "bfloat16", "float16")
SAMPLERS = ("student", "teacher")
SCHEDULES = ("cosine", "linear", "constant")
NOISES = ("white", "pink", "babble")
OPERATIONS = {
    "audio": ("speed", "room", "noise"),
    "image": ("rotation", "shift", "scale", "clutter", "blur", "polarity"),
}


class RecipeError(ValueError):
    """A recipe or an override that can't be run, with the place and what was expected there."""


def cache_form(text: str) -> tuple[str, int]:
    """Kind and number of a `teacher_cache`: a dtype or `log_probs` (0), `top` or `sample` with the tokens a position.

    Raises:
        RecipeError: none of these.
    """
    if text in (*CACHE_DTYPES, "log_probs"):
        return text, 0
    if match := re.fullmatch(r"(top|sample)([1-9]\d*)", text):
        return match[1], int(match[2])
    raise RecipeError(
        f"teacher_cache {text!r} is not one of {', '.join(CACHE_DTYPES)}, log_probs, topN or sampleN, such as top64"
    )


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
class Mimic:
    """How a stage with `objective: mimic` follows its teacher; see `mixlora.training.objectives.mimic_loss`."""

    divergence: str = "forward_kl"
    """forward_kl, reverse_kl, jsd, tv or skew_kl, from the teacher's next-token distribution."""
    temperature: float = 1.0
    """Divides the logits of both."""
    beta: float = 0.5
    """Of jsd and skew_kl."""
    t_squared: bool = False
    """Multiply by the squared temperature."""
    sft_weight: float = 0.0
    """Share of the loss that is cross entropy."""
    on_policy: float = 0.0
    """Share of batches whose answers are drawn anew, by `sampled_by`, in place of the data's."""
    sampled_by: str = "student"
    """student, or teacher (a checkpoint of ours)."""
    max_new_tokens: int = 64
    """An answer that is drawn is cut after so many tokens."""

    def __post_init__(self) -> None:
        if not 0 <= self.on_policy <= 1 or self.sampled_by not in SAMPLERS or self.max_new_tokens < 1:
            raise RecipeError(
                f"mimic: on_policy {self.on_policy} is a share from 0 to 1, sampled_by {self.sampled_by!r} one of "
                f"{', '.join(SAMPLERS)}, max_new_tokens {self.max_new_tokens} at least 1"
            )
        if self.divergence not in DIVERGENCES:
            raise RecipeError(f"mimic: divergence {self.divergence!r} is not one of {', '.join(DIVERGENCES)}")
        if self.temperature <= 0:
            raise RecipeError(f"mimic: temperature {self.temperature} must be above 0")
        if not 0 < self.beta < 1 or not 0 <= self.sft_weight < 1:
            raise RecipeError(
                f"mimic: beta {self.beta} must lie between 0 and 1, sft_weight {self.sft_weight} below 1"
            )


@dataclass(frozen=True)
class Preference:
    """The loss of a stage with `objective: preference`; see `mixlora.training.objectives.preference_loss`."""

    kind: str = "sigmoid"
    """sigmoid (DPO), ipo, hinge or kto_pair."""
    beta: float = 0.1
    """How strongly the reference holds the policy."""
    label_smoothing: float = 0.0
    """Share of pairs taken to be the wrong way round; of sigmoid alone."""
    sft_weight: float = 0.0
    """Cross entropy of the chosen answers, times this, is added."""
    mimic_weight: float = 0.0
    """The divergence from the teacher on the chosen answers (forward_kl), times this, is added."""
    llavamod_compat: bool = False
    """kto_pair with gradients through its baseline, as LLaVA-MoD released it."""

    def __post_init__(self) -> None:
        if self.kind not in PREFERENCES:
            raise RecipeError(f"preference: kind {self.kind!r} is not one of {', '.join(PREFERENCES)}")
        if self.beta <= 0 or min(self.sft_weight, self.mimic_weight) < 0:
            raise RecipeError(
                f"preference: beta {self.beta} must be above 0, sft_weight {self.sft_weight} and mimic_weight "
                f"{self.mimic_weight} at least 0"
            )
        if not 0 <= self.label_smoothing < 0.5 or (self.label_smoothing and self.kind != "sigmoid"):
            raise RecipeError(
                f"preference: label_smoothing {self.label_smoothing} is below 0.5, and for sigmoid alone"
            )


@dataclass(frozen=True)
class Experts:
    """LoRA experts of the adapters that a stage trains; see `model.split_adapter`."""

    count: int = 0
    """The trained adapters become so many copies of themselves first; 0 leaves them as they are."""
    top_k: int = 2
    """Of new experts: how many a token takes."""
    balance_weight: float = 0.01
    """Times this, how unevenly the experts are used is added to the loss; 1 is even, and one term a forward pass."""

    def __post_init__(self) -> None:
        if self.count and (self.count < 2 or not 1 <= self.top_k <= self.count):
            raise RecipeError(f"experts: count {self.count} must be at least 2, top_k {self.top_k} from 1 to count")
        if self.balance_weight < 0:
            raise RecipeError(f"experts: balance_weight {self.balance_weight} must be at least 0")


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
    objective: str = "sft"
    """sft (cross entropy of the answers), mimic (a teacher's distribution) or preference (chosen over rejected)."""
    teacher: str = ""
    """Checkpoint to mimic, or the reference of preferences; `self` is the model as the stage found it."""
    teacher_cache: str = ""
    """float32, bfloat16, float16, topN, sampleN or log_probs: what is kept of it on disk; else it runs each step."""
    mimic: Mimic = field(default_factory=Mimic)
    """Settings of `objective: mimic`."""
    preference: Preference = field(default_factory=Preference)
    """Settings of `objective: preference`; without a `teacher` there is no reference."""
    experts: Experts = field(default_factory=Experts)
    """Dense adapters become LoRA experts, and the weight of their balance."""
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
    routing: dict[str, str] = field(default_factory=dict)
    """Modality -> adapter that its rows take in this stage, such as `{text: speech}`, in place of the config's."""
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
        if self.objective not in OBJECTIVES:
            raise RecipeError(f"{where}: objective {self.objective!r} is not one of {', '.join(OBJECTIVES)}")
        if self.objective == "mimic" and not self.teacher:
            raise RecipeError(f"{where}: objective mimic needs a teacher, a checkpoint")
        if self.objective == "sft" and self.teacher:
            raise RecipeError(f"{where}: a teacher is of use to the objectives mimic and preference, not to sft")
        if self.teacher_cache:
            self._check_cache(where)
        if self.mimic.on_policy and (
            self.teacher_cache or (self.mimic.sampled_by, self.teacher) == ("teacher", "self")
        ):
            raise RecipeError(
                f"{where}: on_policy needs a teacher that runs, no teacher_cache; and `self` samples as the student"
            )
        if self.preference.mimic_weight and not self.teacher:
            raise RecipeError(f"{where}: preference: mimic_weight needs a teacher")
        if self.objective != "sft" and self.ctc_weight:
            raise RecipeError(f"{where}: ctc_weight goes with objective sft, not with {self.objective}")
        if not 0 <= self.ctc_weight <= 1:
            raise RecipeError(f"{where}: ctc_weight {self.ctc_weight} is a share of the loss, from 0 to 1")
        if not 0 <= self.mask_time < 1:
            raise RecipeError(f"{where}: mask_time {self.mask_time} is a share of the frames, from 0 to below 1")
        if not 0 <= self.warmup < 1:
            raise RecipeError(f"{where}: warmup {self.warmup} is a share of the steps, from 0 to below 1")

    def _check_cache(self, where: str) -> None:
        """Raises RecipeError where the stage can't learn from what it keeps of its teacher."""
        try:
            kind, count = cache_form(self.teacher_cache)
        except RecipeError as error:
            raise RecipeError(f"{where}: {error}") from None
        if not self.teacher:
            raise RecipeError(f"{where}: teacher_cache needs a teacher")
        if count and (self.objective != "mimic" or self.mimic.divergence != "forward_kl"):
            raise RecipeError(f"{where}: teacher_cache {self.teacher_cache} goes with mimic by forward_kl alone")
        if kind == "log_probs" and (self.objective != "preference" or self.preference.mimic_weight):
            raise RecipeError(f"{where}: teacher_cache log_probs goes with preference alone, without mimic_weight")


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
