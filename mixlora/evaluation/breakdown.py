"""What lies behind a figure: by label, by answer, by kind of error, and examples. `report` shows it."""

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from mixlora.evaluation.metrics import (
    Interval,
    Score,
    align_words,
    interval,
    is_right,
    plain,
    said_yes_no,
    total,
    wilson,
    without_article,
)
from mixlora.evaluation.run import Graded, Result
from mixlora.evaluation.tasks import LABELS

UNLABELLED = "(not given)"
OTHER = "(other)"
"""Its brackets keep it apart from every plain answer."""
FEW_ANSWERS = 30
"""A matrix of more answers can't be read."""


@dataclass(frozen=True)
class Part:
    """The figure of the rows that share a label's value."""

    name: str
    n: int
    value: float
    interval: Interval


def labels_of(result: Result) -> list[str]:
    """The labels that any of its rows names."""
    return [label for label in LABELS if any(label in one.row.labels for one in result.graded)]


def by_label(results: Sequence[Result], label: str) -> list[tuple[Part, ...]]:
    """For each value of a label, a part a result. Levels of noise go up, others from the first result's worst on.

    Args:
        results: of systems that answered the same rows.
    """
    lines = list(zip(*(_parts(result, label) for result in results), strict=True))
    if label == "noise":
        return sorted(lines, key=lambda line: noise_level(line[0].name))
    sign = -1 if results[0].metric == "wer" else 1
    return sorted(lines, key=lambda line: (sign * line[0].value, line[0].name))


def _parts(result: Result, label: str) -> list[Part]:
    """A part for each value, in the order of the rows."""
    groups: dict[str, list[Score]] = {}
    for one in result.graded:
        groups.setdefault(one.row.labels.get(label, UNLABELLED), []).append(one.score)
    return [Part(name, len(scores), total(scores), interval(result.metric, scores)) for name, scores in groups.items()]


def noise_level(name: str) -> tuple[float, str]:
    """A key that sorts by the first number in the name ("-5 dB" before "10 dB"); names without one come last."""
    number = re.search(r"((?<!\w)[-\u2212])?\d+(\.\d+)?", name)
    return (float(number.group().replace("\u2212", "-")) if number else float("inf"), name)


@dataclass(frozen=True)
class Confusion:
    """How often each answer was expected (row) and given (column)."""

    expected: list[str]
    given: list[str]
    """The expected answers, and `OTHER` if anything else was said."""
    counts: list[list[int]]


def confusion(result: Result) -> Confusion | None:
    """The matrix of a task of exact answers with few distinct ones, else None."""
    names = sorted({_expected(one) for one in result.graded})
    if result.metric != "exact" or not 2 <= len(names) <= FEW_ANSWERS:
        return None
    counts = Counter((_expected(one), _given(one, names)) for one in result.graded)
    given = [*names, OTHER] if any(said == OTHER for _, said in counts) else names
    return Confusion(names, given, [[counts[name, said] for said in given] for name in names])


def _expected(one: Graded) -> str:
    """The first of the answers stands for all."""
    return without_article(one.row.answers[0])


def _given(one: Graded, names: Sequence[str]) -> str:
    """The expected name that was said; a right synonym counts as the first answer."""
    if is_right("exact", one.score):
        return _expected(one)
    said = without_article(one.answer)
    return said if said in names else OTHER


@dataclass(frozen=True)
class WrongAnswers:
    """The rows whose answer is `expected`, and how many were answered with the opposite or with neither word."""

    expected: str
    n: int
    opposite: int
    neither: int
    share: float
    """Of the opposite: where no was expected, the share of wrong yes."""
    interval: Interval


def wrong_yes_no(result: Result) -> list[WrongAnswers]:
    """One entry for the rows to be denied and one for those to be affirmed; empty for other metrics."""
    found = []
    for expected in ("no", "yes") if result.metric == "yes_no" else ():
        rows = [one for one in result.graded if {plain(answer) for answer in one.row.answers} == {expected}]
        said = Counter(said_yes_no(one.answer) for one in rows)
        opposite = said["yes" if expected == "no" else "no"]
        if rows:
            bounds = wilson(opposite, len(rows))
            found.append(WrongAnswers(expected, len(rows), opposite, said[None], opposite / len(rows), bounds))
    return found


@dataclass(frozen=True)
class WordEdits:
    """Word errors of a task by kind."""

    words: int
    """Reference words."""
    substitutions: int
    insertions: int
    deletions: int
    confusions: list[tuple[str, str, int]]
    """Expected, heard, how often; the most frequent ones."""


def word_edits(result: Result, most: int = 12) -> WordEdits | None:
    """The errors of a task measured by words, else None."""
    if result.metric != "wer":
        return None
    found = [align_words(one.answer, one.row.answers) for one in result.graded]
    pairs: Counter[tuple[str, str]] = Counter()
    for alignment in found:
        expected, heard = alignment.references[0], alignment.hypotheses[0]
        for run in alignment.alignments[0]:
            if run.type == "substitute":  # as many words on either side
                there = expected[run.ref_start_idx : run.ref_end_idx]
                pairs.update(zip(there, heard[run.hyp_start_idx : run.hyp_end_idx], strict=True))
    return WordEdits(
        words=sum(one.score[1] for one in result.graded),
        substitutions=sum(alignment.substitutions for alignment in found),
        insertions=sum(alignment.insertions for alignment in found),
        deletions=sum(alignment.deletions for alignment in found),
        confusions=[(*pair, count) for pair, count in pairs.most_common(most)],
    )


def wrong_places(result: Result, most: int, seed: int = 0) -> list[int]:
    """Up to `most` places in `graded` where the answer is wrong, drawn by seed, in order."""
    places = [place for place, one in enumerate(result.graded) if not is_right(result.metric, one.score)]
    return sorted(random.Random(seed).sample(places, min(most, len(places))))
