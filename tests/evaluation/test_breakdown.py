"""Figures by label, confusions and word errors against values counted by hand."""

from types import SimpleNamespace
from typing import Any

import pytest

from mixlora.evaluation.breakdown import (
    OTHER,
    UNLABELLED,
    by_label,
    confusion,
    labels_of,
    noise_level,
    word_edits,
    wrong_places,
    wrong_yes_no,
)
from mixlora.evaluation.metrics import wilson
from mixlora.evaluation.run import Result, evaluate
from mixlora.evaluation.tasks import EvalRow
from mixlora.rows import Row


class Script:
    """Answers in the order of the rows."""

    def __init__(self, answers: list[str]) -> None:
        self.answers = iter(answers)

    def answer_batch(self, rows: list[Row]) -> list[Any]:
        return [SimpleNamespace(text=next(self.answers)) for _ in rows]


def result(metric: str, *rows: tuple[str, str], labels: list[dict[str, str]] | None = None) -> Result:
    """The result of (expected, given) rows."""
    marks = labels or [{}] * len(rows)
    expected, given = zip(*rows, strict=True)
    asked = [EvalRow("t", metric, (answer,), Row("?"), mark) for answer, mark in zip(expected, marks, strict=True)]
    (found,) = evaluate(Script(list(given)), {("t", metric): asked})
    return found


def test_parts_of_a_label() -> None:
    voices = [{"voice": name} for name in ("Ann", "Bob", "Ann", "Bob")] + [{}]
    ours = result("exact", ("5", "5"), ("5", "6"), ("5", "5"), ("5", "5"), ("5", "5"), labels=voices)
    other = result("exact", ("5", "1"), ("5", "5"), ("5", "5"), ("5", "5"), ("5", "1"), labels=voices)
    assert labels_of(ours) == ["voice"]
    lines = by_label([ours, other], "voice")
    assert [[(part.name, part.n, part.value) for part in line] for line in lines] == [
        [("Bob", 2, 0.5), ("Bob", 2, 1.0)],  # our worst first
        [(UNLABELLED, 1, 1.0), (UNLABELLED, 1, 0.0)],
        [("Ann", 2, 1.0), ("Ann", 2, 0.5)],
    ]
    assert lines[0][0].interval == wilson(1, 2)


def test_word_error_rates_begin_with_the_highest() -> None:
    styles = [{"style": "read"}, {"style": "shouted"}]
    lines = by_label([result("wer", ("one two", "one two"), ("one two", "one"), labels=styles)], "style")
    assert [(line[0].name, line[0].value) for line in lines] == [("shouted", 0.5), ("read", 0.0)]


def test_noise_is_ordered_by_level() -> None:
    names = ["clean", "20 dB", "-5 dB", "babble-10 dB", "0 dB", "2.5 dB"]
    assert sorted(names, key=noise_level) == ["-5 dB", "0 dB", "2.5 dB", "babble-10 dB", "20 dB", "clean"]
    levels = [{"noise": name} for name in names]
    lines = by_label([result("exact", *[("5", "5")] * len(names), labels=levels)], "noise")
    assert [line[0].name for line in lines] == sorted(names, key=noise_level)


def test_confusion_counts_expected_against_given() -> None:
    found = confusion(result("exact", ("a boot", "Boot."), ("boot", "coat"), ("coat", "coat"), ("coat", "hat")))
    assert found is not None
    assert (found.expected, found.given) == (["boot", "coat"], ["boot", "coat", OTHER])
    assert found.counts == [[1, 1, 0], [0, 1, 1]]


def test_a_right_synonym_counts_as_the_first_answer() -> None:
    asked = [EvalRow("t", "exact", ("flamingo", "bird"), Row("?")), EvalRow("t", "exact", ("bird",), Row("?"))]
    (one,) = evaluate(Script(["bird", "bird"]), {("t", "exact"): asked})
    found = confusion(one)
    assert found is not None and found.counts == [[1, 0], [0, 1]] and found.expected == ["bird", "flamingo"]


def test_no_matrix_of_one_or_of_many_answers() -> None:
    assert confusion(result("exact", ("5", "5"), ("5", "6"))) is None
    assert confusion(result("exact", *[(str(number), "5") for number in range(31)])) is None
    assert confusion(result("wer", ("a", "a"), ("b", "b"))) is None


def test_wrong_yes() -> None:
    no, yes = wrong_yes_no(
        result("yes_no", ("no", "Yes."), ("no", "no"), ("no", "hm"), ("no", "No!"), ("yes", "yes"), ("yes", "no"))
    )
    assert (no.expected, no.n, no.opposite, no.neither, no.share) == ("no", 4, 1, 1, 0.25)
    assert no.interval == wilson(1, 4)
    assert (yes.expected, yes.n, yes.opposite, yes.neither, yes.share) == ("yes", 2, 1, 0, 0.5)
    assert wrong_yes_no(result("exact", ("no", "yes"))) == []


def test_word_edits() -> None:
    found = word_edits(
        result("wer", ("press the key", "press a key now"), ("the end", "a start"), ("hold the line", "hold line"))
    )
    assert found is not None
    assert (found.words, found.substitutions, found.insertions, found.deletions) == (8, 3, 1, 1)
    assert found.confusions == [("the", "a", 2), ("end", "start", 1)], "word by word"
    assert word_edits(result("exact", ("5", "5"))) is None


@pytest.mark.parametrize("most", [0, 2, 9])
def test_wrong_places_are_wrong_seeded_and_no_more_than_asked(most: int) -> None:
    ours = result("exact", *[("5", given) for given in "5656566"])
    places = wrong_places(ours, most)
    assert places == wrong_places(ours, most) == sorted(set(places))
    assert len(places) == min(most, 4) and set(places) <= {1, 3, 5, 6}
