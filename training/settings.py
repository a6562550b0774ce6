"""The settings of the objectives: what a stage takes from a teacher, from preferences, and of LoRA experts."""

import difflib
import re
from dataclasses import dataclass
from typing import Any

from mixlora.training.objectives import DIVERGENCES, PREFERENCES

CACHE_DTYPES = ("float32", "bfloat16", "float16")
SAMPLERS = ("student", "teacher")


class RecipeError(ValueError):
    """A recipe or an override that can't be run, with the place and what was expected there."""


def nearest(key: str, known: Any) -> str:
    """`; did you mean 'x'?` for the nearest of `known`, or the whole list where none is near."""
    close = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; expected one of {', '.join(known)}"


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
