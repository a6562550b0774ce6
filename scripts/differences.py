"""What a case of `compare_differences.py` is, and how its cells are worded."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

NOISE = 1e-3
"""Standard deviations of the logits; a larger difference is none of rounding."""
LONGEST = 90


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        what: what a user does.
        wanted: what it should give.
        theirs: does it with transformers' classes, and says what came out.
        ours: does it with ours.
        vllm: what vLLM's code or threads say of it; empty where they say nothing.
        slow: takes a minute or more.
    """

    what: str
    wanted: str
    theirs: Callable[[], str]
    ours: Callable[[], str]
    vllm: str = ""
    slow: bool = False


def outcome(measure: Callable[[], str]) -> str:
    """What `measure` says, or the error that it ended with, as a cell. Gradients are off unless it asks for them."""
    try:
        with torch.no_grad():
            return measure().replace("|", "\\|")
    except Exception as error:  # an error of any kind is what a user would see
        lines = [line.strip().replace("`", "'") for line in str(error).splitlines() if line.strip()] or [""]
        text = lines[0] if len(lines[0]) <= LONGEST else lines[0][:LONGEST].rsplit(" ", 1)[0] + " ..."
        return f"error: `{text}` ({type(error).__name__})".replace("|", "\\|")


def likeness(found: torch.Tensor, wanted: torch.Tensor) -> str:
    """How far logits `[..., vocabulary]` are from those they should be."""
    found, wanted = found.float(), wanted.float()
    gap = float((found - wanted).abs().max() / wanted.std())
    if gap < NOISE:
        return "the same logits"
    share = (found.argmax(-1) == wanted.argmax(-1)).float().mean()
    return f"**other logits**: {gap:.1f} standard deviations off, the best token is right at {share:.0%} of positions"


def common_start(found: torch.Tensor, wanted: torch.Tensor) -> str:
    """How many of the new tokens `[tokens]` are as they should be, up to the first that is not."""
    same = int((found == wanted).long().cumprod(0).sum())
    return "the same tokens" if same == len(wanted) else f"**other tokens** after {same} of {len(wanted)}"


def distance(found: Any, wanted: Any, most: float, unit: str) -> str:
    """How far arrays are from those they should be; up to `most` is rounding."""
    gap = float((torch.as_tensor(found).double() - torch.as_tensor(wanted).double()).abs().max())
    return "the same" if gap <= most else f"**up to {gap:.1f} off**, of {unit}"
