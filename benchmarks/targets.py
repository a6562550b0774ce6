"""What the benchmarks are to show, each a ratio of one of them."""

from dataclasses import dataclass
from typing import Any

Results = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Target:
    """A line of the table.

    Attributes:
        what, beside: what is measured, and next to what.
        benchmark: its file; ratio: its name there.
        bound: the ratio must be at least this, or at most where `at_most`.
    """

    what: str
    beside: str
    benchmark: str
    ratio: str
    bound: float
    at_most: bool = False

    def met(self, value: float) -> bool:
        """Whether a ratio is good enough."""
        return value <= self.bound if self.at_most else value >= self.bound


CALLS = "transformers + PEFT, three calls"
TARGETS = (
    Target("decode, 4 text + 4 image + 4 speech rows in one call", CALLS, "decode", "decode", 2.2),
    Target(
        "the same, over what the bare decoder gains from one call",
        "bare, three calls and one",
        "decode",
        "decode, of what the bare decoder gains",
        0.9,
    ),
    Target("prefill of the same rows", CALLS, "decode", "prefill", 1.5),
    Target("towers and prefill of the same rows", CALLS, "decode", "towers and prefill", 1.5),
    Target("adapters' own time in a mixed step", "PEFT's mixed batch", "mixed_step", "in order", 2.0),
    Target("encode one 2688 x 2688 and seven 448 x 448 pictures", "transformers", "towers", "pictures", 5.0),
    Target(
        "training step, 2 text + 3 image + 3 speech rows, tokens/s",
        "transformers + PEFT, a micro-batch a modality",
        "training_step",
        "tokens per second",
        1.5,
    ),
    Target("its peak memory", "the same", "training_step", "peak memory, ours of the peer's", 1.0, at_most=True),
    Target("process 64 pictures of 640 x 480", "transformers' processor", "processing", "pictures", 1.5),
    Target("process 64 clips of 10 s", "transformers' processor", "processing", "clips", 1.5),
    Target("`mixlora --help`", "`import transformers`", "startup", "mixlora --help", 0.6, at_most=True),
    Target("`import mixlora`", "`import transformers`", "startup", "import mixlora", 1.1, at_most=True),
)


def judged(results: Results, benchmark: str = "") -> list[tuple[Target, float]]:
    """The targets that were measured, all or those of a benchmark, and what was found."""
    return [
        (target, results[target.benchmark]["ratios"][target.ratio])
        for target in TARGETS
        if target.ratio in results.get(target.benchmark, {}).get("ratios", {}) and benchmark in ("", target.benchmark)
    ]
