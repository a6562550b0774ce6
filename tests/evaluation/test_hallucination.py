"""Figures of yes or no questions, counted by hand."""

import pytest

from mixlora.evaluation.hallucination import YesNo


def test_figures_by_hand() -> None:
    answers = [("Yes.", True), ("yes, it is", False), ("no", False), ("No!", True), ("a dress", False), ("yes", True)]
    found = YesNo.count(answers)
    assert found == YesNo(right_yes=2, wrong_yes=1, right_no=1, yes=3, no=3)
    assert found.figures() == pytest.approx(
        {"accuracy": 3 / 6, "f1": 2 * (2 / 3) * (2 / 3) / (4 / 3), "yes_share": 3 / 6, "wrong_yes": 1 / 3}
    )


def test_nothing_to_count_is_zero() -> None:
    assert set(YesNo.count([]).figures().values()) == {0.0}
    assert YesNo.count([("yes", True)]).figures()["wrong_yes"] == 0.0
