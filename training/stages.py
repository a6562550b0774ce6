"""What a training is made of: a recipe of stages in order."""

from dataclasses import dataclass, field

from mixlora.training.data.settings import Augment, Source
from mixlora.training.settings import Experts, Mimic, Preference, RecipeError, cache_form, nearest

__all__ = [
    "Augment",
    "Experts",
    "Mimic",
    "Preference",
    "Recipe",
    "RecipeError",
    "Source",
    "Stage",
    "cache_form",
]

OBJECTIVES = ("sft", "mimic", "preference")
SCHEDULES = ("cosine", "linear", "constant")
DEFAULT = "default"
"""In `learning_rate`: all groups that it does not name."""


@dataclass(frozen=True)
class Stage:
    """One stage: what it trains, on which data, for how long."""

    name: str
    """Names the output folder, and the stage in overrides."""
    train: list[str]
    """Parameter groups to train, names of `model.parameter_groups()`; all other parameters stay bit-equal."""
    data: list[Source]
    """Where rows come from; they are mixed."""
    learning_rate: float | dict[str, float]
    """Peak of the schedule; or one for each trained group, such as `{default: 1e-4, speech_tower: 1e-5}`."""
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
    """Share of the loss that is CTC, of clips or `vision_letters` (Watanabe et al. 2017, II-C); 1 runs no decoder."""
    mask_time: float = 0.0
    """Share of each clip's frames that is set to zero in short spans, drawn anew each time (SpecAugment)."""
    mask_bands: float = 0.0
    """The same of its mel bands, where the speech tower trains; what a frozen tower gives has none."""
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
    """Recompute activations in the backward pass, in towers and decoder: less memory, more time."""
    bf16: bool = False
    """Compute in bfloat16 (autocast); weights, gradients of weights and optimizer stay float32."""
    max_broken: int = 0
    """So many rows that can't be used are named and passed over; one more ends the run."""
    streaming: bool = False
    """Read rows while training, not before: for data that take too long to look through. Needs `max_steps`."""
    window: int = 1000
    """With `streaming`: rows that are mixed and sorted by length at a time."""
    logging_steps: int = 10
    """Steps between two points of the loss curve."""
    save_steps: int = 200
    """Steps between two checkpoints; a multiple of `logging_steps`, so that a resumed curve is the same curve."""
    augment: Augment = field(default_factory=Augment)
    """Seeded views of the media, see below; without it each file is read as it is."""

    def __post_init__(self) -> None:
        where = f"stage {self.name!r}"
        for pair in (("epochs", "max_steps"), ("tokens_per_batch", "rows_per_batch")):
            given = [key for key in pair if getattr(self, key)]
            if len(given) != 1 or not 0 < getattr(self, given[0]) < float("inf"):
                raise RecipeError(
                    f"{where}: give exactly one of {pair[0]} and {pair[1]}, above 0, got {given or 'neither'}"
                )
        self._check_rates(where)
        if self.streaming:
            self._check_streaming(where)
        if len(set(self.train)) < len(self.train):
            raise RecipeError(f"{where}: train names a group twice: {', '.join(self.train)}")
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
        if not 0 <= self.mask_bands < 1:
            raise RecipeError(f"{where}: mask_bands {self.mask_bands} is a share of the bands, from 0 to below 1")
        if self.mask_bands and "speech_tower" not in self.train:
            raise RecipeError(f"{where}: mask_bands is for a speech_tower that trains, and this stage trains none")
        if self.max_broken < 0:
            raise RecipeError(f"{where}: max_broken {self.max_broken} must be at least 0")
        if not 0 <= self.beta2 < 1 or min(self.weight_decay, self.max_grad_norm) < 0:
            raise RecipeError(
                f"{where}: beta2 {self.beta2} must be from 0 to below 1, weight_decay {self.weight_decay} and "
                f"max_grad_norm {self.max_grad_norm} at least 0"
            )
        if not 0 <= self.warmup < 1:
            raise RecipeError(f"{where}: warmup {self.warmup} is a share of the steps, from 0 to below 1")

    def rate_of(self, group: str) -> float:
        """Peak of the learning rate of a group."""
        if isinstance(self.learning_rate, dict):
            return self.learning_rate.get(group, self.learning_rate.get(DEFAULT, 0.0))
        return self.learning_rate

    def _check_rates(self, where: str) -> None:
        rates = self.learning_rate if isinstance(self.learning_rate, dict) else {DEFAULT: self.learning_rate}
        for group, rate in rates.items():
            if not 0 < rate < float("inf"):
                raise RecipeError(f"{where}: learning_rate of {group} is {rate}, and must be above 0")
            if group != DEFAULT and group not in self.train:
                raise RecipeError(
                    f"{where}: learning_rate of {group}, which this stage does not train{nearest(group, self.train)}"
                )
        if without := [group for group in self.train if DEFAULT not in rates and group not in rates]:
            raise RecipeError(f"{where}: no learning_rate for {', '.join(without)}; name it, or give a {DEFAULT}")

    def _check_streaming(self, where: str) -> None:
        if not self.max_steps:
            raise RecipeError(f"{where}: streaming needs max_steps, since nobody counts the rows beforehand")
        if self.teacher_cache or "babble" in self.augment.noise:
            raise RecipeError(f"{where}: with streaming, rows are not known beforehand: no teacher_cache, no babble")
        if self.window < 1:
            raise RecipeError(f"{where}: window {self.window} must be at least 1")

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
    """Folder or hub id of the checkpoint to start from, processor included; `embedded` is the one in the package."""
    stages: list[Stage] = field(default_factory=list)
    """Run in order, each from the one before."""
    seed: int = 0
    """Of the data order, the dropout and whatever else is drawn."""
    cache: str = ""
    """Folder of frozen tower features; a folder `features` in the output by default."""
    tensorboard: bool = False
    """Write the figures for TensorBoard as well, into `tensorboard` in each stage's folder; needs that package."""

    def __post_init__(self) -> None:
        names = [stage.name for stage in self.stages]
        if not names or len(set(names)) != len(names):
            raise RecipeError(f"stages: at least one, each with its own name, got {names}")
        if not 0 <= self.seed < 2**32:
            raise RecipeError(f"seed {self.seed} must lie from 0 to 2**32 - 1")
