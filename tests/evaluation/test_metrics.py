"""Scores against values worked out by hand."""

import pytest

from mixlora.evaluation.metrics import (
    align_words,
    bootstrap,
    exact,
    interval,
    is_right,
    plain,
    total,
    wilson,
    without_article,
    word_errors,
    yes_no,
)


def test_plain() -> None:
    assert plain("  Don\u2019t STOP,\n it's ﬁne! ") == "dont stop its fine"
    assert plain("T-shirt") == "t shirt" and plain("\uff15") == "5" and plain("...") == ""


def test_leading_article_only() -> None:
    assert without_article("The ankle boot.") == "ankle boot"
    assert without_article("A") == "a", "the letter"
    assert without_article("boot of a man") == "boot of a man"


def test_exact_takes_any_answer() -> None:
    assert exact("An Ankle-Boot!", ["shoe", "ankle boot"]) == (1, 1)
    assert exact("ankle boots", ["ankle boot"]) == (0, 1)
    assert exact("", ["5"]) == (0, 1)


def test_yes_no_takes_the_first_such_word() -> None:
    assert yes_no("Yes, it is.", ["yes"]) == (1, 1)
    assert yes_no("Well, no; yes is wrong.", ["no"]) == (1, 1)
    assert yes_no("nothing", ["no"]) == (0, 1)


def test_word_errors_count_against_the_nearest_answer() -> None:
    assert word_errors("Please, hold the line", ["please hold the line"]) == (0, 4)
    assert word_errors("please fold line now", ["please hold the line"]) == (3, 4)
    assert word_errors("", ["two words"]) == (2, 2)
    assert word_errors("hello world", ["good bye", "Hello, big world."]) == (1, 3)


def test_alignment_is_with_the_nearest_answer() -> None:
    found = align_words("hello world", ["good bye", "Hello, big world."])
    assert (found.hits, found.substitutions, found.deletions, found.insertions) == (2, 0, 1, 0)


def test_right_is_no_error_or_a_hit() -> None:
    assert is_right("wer", (0, 4)) and not is_right("wer", (1, 4))
    assert is_right("exact", (1, 1)) and not is_right("yes_no", (0, 1))


def test_total_weighs_rows_by_words() -> None:
    assert total([(1, 2), (0, 8)]) == pytest.approx(0.1)


def test_wilson() -> None:
    """Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20."""
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


def test_bootstrap_is_seeded_and_holds_the_value() -> None:
    scores = [(i % 3, 5) for i in range(60)]
    low, high = bootstrap(scores)
    assert (low, high) == bootstrap(scores) == interval("wer", scores)
    assert low < total(scores) < high
    assert bootstrap([(1, 4)] * 5) == (0.25, 0.25)
