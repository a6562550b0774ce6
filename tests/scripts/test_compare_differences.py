"""`docs/differences.md` is what `scripts/compare_differences.py` wrote; mixlora gives what the last column says."""

import re
from pathlib import Path

import pytest
import torch
from compare_differences import all_cases
from differences import Case, distance, likeness, outcome

ROOT = Path(__file__).resolve().parents[2]
CASES = all_cases()


def page() -> list[list[str]]:
    """The cells of each row of the page's table."""
    lines = (ROOT / "docs" / "differences.md").read_text(encoding="utf-8").splitlines()
    rows = [re.split(r" (?<!\\)\| ", line.removeprefix("| ").removesuffix(" |")) for line in lines if line[:2] == "| "]
    return rows[1:]  # without the head


def test_the_page_holds_every_case_in_order() -> None:
    assert [row[0].replace("\\|", "|") for row in page()] == [case.what for case in CASES]
    assert all(len(row) == 5 and all(row) for row in page())
    assert [row[1] for row in page()] == [case.wanted for case in CASES]
    assert [row[3] for row in page()] == [case.vllm or "-" for case in CASES]


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.slow] * case.slow, id=case.what) for case in CASES],
)
def test_mixlora_gives_what_the_page_says(case: Case) -> None:
    found = outcome(case.ours)
    assert "**" not in found, "what is in bold type is not as wanted"
    assert (found.startswith("error")) == ("error" in case.wanted)
    assert found == page()[CASES.index(case)][-1]


def test_what_differs_is_in_bold_type() -> None:
    logits = torch.randn(4, 9)
    assert likeness(logits, logits + 1e-5) == "the same logits"
    assert likeness(logits, logits.flip(0)).startswith("**other logits**")
    assert distance([1.0, 2.0], [1.0, 2.5], 0.1, "1 to 3") == "**up to 0.5 off**, of 1 to 3"

    def fail() -> str:
        raise RuntimeError("a `b` | c\nmore")

    assert outcome(fail) == "error: `a 'b' \\| c` (RuntimeError)"
