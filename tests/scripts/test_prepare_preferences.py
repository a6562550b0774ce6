"""Preferences of rows whose answers are known."""

import random

import pytest
from prepare_preferences import preferences


def row(answer: str) -> dict:
    return {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}], "task": "t"}


def test_the_right_answer_is_chosen_and_that_of_another_row_rejected() -> None:
    answers = ["yes", "no", "no", "perhaps"]
    found = preferences([row(answer) for answer in answers], 4, random.Random(0))
    assert sorted(pair["chosen"] for pair in found) == sorted(answers)
    assert all(pair["rejected"] in answers and pair["rejected"] != pair["chosen"] for pair in found)
    assert all(pair["prompt"] == [{"role": "user", "content": "?"}] and pair["task"] == "t" for pair in found)
    assert preferences([row(answer) for answer in answers], 4, random.Random(0)) == found


def test_no_more_than_asked_and_not_without_a_wrong_answer() -> None:
    assert len(preferences([row("a"), row("b"), row("c")], 2, random.Random(0))) == 2
    with pytest.raises(ValueError, match="none to reject"):
        preferences([row("a"), row("a")], 2, random.Random(0))
