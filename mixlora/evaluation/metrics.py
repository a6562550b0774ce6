"""Scores of a row and of a task. A score is (numerator, denominator): errors and words, or right and 1."""

import math
import random
import unicodedata
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jiwer

Score = tuple[int, int]
Interval = tuple[float, float]
ARTICLES = ("a", "an", "the")
NORMAL_95 = 1.959963984540054
"""The 97.5 % quantile of the standard normal distribution."""


def plain(text: str) -> str:
    """NFKC, lower case, apostrophes dropped, other punctuation to spaces, single spaces."""
    text = unicodedata.normalize("NFKC", text).lower()
    for apostrophe in "'\u2019":
        text = text.replace(apostrophe, "")
    return " ".join("".join(" " if unicodedata.category(char)[0] == "P" else char for char in text).split())


def without_article(text: str) -> str:
    """Plain text less one leading article, unless the article is all there is."""
    words = plain(text).split()
    return " ".join(words[1:] if len(words) > 1 and words[0] in ARTICLES else words)


def align_words(prediction: str, answers: Sequence[str]) -> "jiwer.WordOutput":
    """jiwer's alignment of the prediction with the nearest answer, both plain."""
    import jiwer

    found = [jiwer.process_words(plain(answer), plain(prediction)) for answer in answers]
    return min(found, key=lambda alignment: alignment.wer)


def word_errors(prediction: str, answers: Sequence[str]) -> Score:
    """Word errors and reference words against the nearest answer."""
    found = align_words(prediction, answers)
    errors = found.substitutions + found.deletions + found.insertions
    return errors, found.hits + found.substitutions + found.deletions


def exact(prediction: str, answers: Sequence[str]) -> Score:
    """Right where any answer is met after NFKC, lower case, no punctuation or leading article."""
    return int(without_article(prediction) in {without_article(answer) for answer in answers}), 1


def said_yes_no(prediction: str) -> str | None:
    """The first "yes" or "no" of the prediction."""
    return next((word for word in plain(prediction).split() if word in ("yes", "no")), None)


def yes_no(prediction: str, answers: Sequence[str]) -> Score:
    """Right where the first "yes" or "no" of the prediction is an answer; no such word is wrong."""
    return int(said_yes_no(prediction) in {plain(answer) for answer in answers}), 1


def is_right(metric: str, score: Score) -> bool:
    """Whether a row's score leaves nothing to mend: no word error, or right."""
    return score[0] == (0 if metric == "wer" else 1)


METRICS: dict[str, Callable[[str, Sequence[str]], Score]] = {"wer": word_errors, "exact": exact, "yes_no": yes_no}


def total(scores: Sequence[Score]) -> float:
    """Sum of numerators over sum of denominators."""
    return sum(top for top, _ in scores) / sum(bottom for _, bottom in scores)


def wilson(right: int, count: int) -> Interval:
    """The 95 % interval of a proportion (Wilson's score interval)."""
    share, squared = right / count, NORMAL_95**2
    centre = (share + squared / (2 * count)) / (1 + squared / count)
    half = NORMAL_95 * math.sqrt(share * (1 - share) / count + squared / (4 * count**2)) / (1 + squared / count)
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap(scores: Sequence[Score], draws: int = 1000, seed: int = 0) -> Interval:
    """The 95 % interval of `total` by drawing rows with replacement; the seed makes it the same each time."""
    rng = random.Random(seed)
    values = sorted(total(rng.choices(scores, k=len(scores))) for _ in range(draws))
    return values[int(0.025 * draws)], values[int(0.975 * draws) - 1]


def interval(metric: str, scores: Sequence[Score]) -> Interval:
    """The 95 % interval of a task: bootstrap for word error rates, Wilson for proportions."""
    if metric == "wer":
        return bootstrap(scores)
    return wilson(sum(right for right, _ in scores), len(scores))
