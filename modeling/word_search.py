"""The likeliest texts of a clip, by the letters that CTC hears and by the words that are known."""

import math
from bisect import bisect_left
from collections.abc import Mapping
from typing import NamedTuple

import torch

BEAMS = 32
"""Texts that are followed from one token of a clip to the next."""
LIKELY = -7.0
"""Log-probability below which a letter is passed over."""
WORD_WEIGHT, WORD_BONUS, UNKNOWN = 0.3, 1.5, -6.0
"""Share of a word's log-probability; what each word gets so that long texts may win; and an unknown one besides."""


class Words:
    """Words and how often each is said; without any, all are as good.

    Args:
        counts: of each word, in the letters that CTC hears.
    """

    def __init__(self, counts: Mapping[str, int]):
        total = sum(counts.values())
        self._scores = {word: WORD_BONUS + WORD_WEIGHT * math.log(count / total) for word, count in counts.items()}
        self._sorted = sorted(counts)
        self._unknown = UNKNOWN + min(self._scores.values(), default=0.0)

    def score(self, word: str) -> float:
        """What a whole word adds to a text's log-probability; no list holds all numbers, and a word with a digit in it
        is an unknown one."""
        if not self._scores or not word or word.isdigit():
            return 0.0
        return self._scores.get(word, self._unknown)

    def outlook(self, word: str) -> float:
        """The same of a word that may go on: nothing, but for the beginning of an unknown one."""
        place = bisect_left(self._sorted, word)
        begins = place < len(self._sorted) and self._sorted[place].startswith(word)
        return 0.0 if begins else min(self.score(word), 0.0)


class _Beam(NamedTuple):
    """Log-probabilities that a clip said a text so far, its last letter just now or silence; what its whole words add;
    and its last letter, 0 where there is none."""

    says: float
    silent: float
    words: float
    last: int

    @property
    def heard(self) -> float:
        return _log_add(self.says, self.silent)


def likely_texts(
    heard: torch.Tensor, alphabet: str, words: Words, best: int, beams: int = BEAMS
) -> list[tuple[str, float]]:
    """Up to `best` texts with their log-probabilities among themselves, the likeliest first.

    Prefix beam search (Hannun et al. 2014, arXiv 1408.2873, algorithm 1) with a unigram of words.

    Args:
        heard: log-probabilities of nothing and of the letters of `alphabet`, `[tokens, 1 + letters]`.
        words: that are known; a space in the alphabet parts them.
        best: texts that are wanted.
        beams: texts that are followed.
    """
    found = {"": _Beam(-math.inf, 0.0, 0.0, 0)}
    for chances in heard.float().tolist():
        letters = [letter for letter in range(1, len(chances)) if chances[letter] > LIKELY]
        followed: dict[str, _Beam] = {}
        for text, beam in found.items():
            kept = beam.says + chances[beam.last] if beam.last else -math.inf
            _add(followed, text, beam._replace(says=kept, silent=beam.heard + chances[0]))
            for letter in letters:
                before = beam.silent if letter == beam.last else beam.heard
                if before > -math.inf:
                    _add(
                        followed,
                        *_with_letter(text, beam, alphabet[letter - 1], letter, before + chances[letter], words),
                    )
        ranked = sorted(followed.items(), key=lambda each: _rank(each[0], each[1], words), reverse=True)
        found = dict(ranked[:beams])
    whole = {text: beam.heard + beam.words + words.score(_last_word(text)) for text, beam in found.items()}
    ended: dict[str, float] = {}
    for text, score in whole.items():
        ended[text.rstrip()] = _log_add(ended.get(text.rstrip(), -math.inf), score)
    chosen = sorted(ended.items(), key=lambda each: each[1], reverse=True)[:best]
    total = torch.tensor([score for _, score in chosen]).logsumexp(0).item()
    return [(text, score - total) for text, score in chosen]


def _with_letter(text: str, beam: _Beam, sign: str, letter: int, says: float, words: Words) -> tuple[str, _Beam]:
    """A text and one letter more; a space in front, or behind another one, changes nothing."""
    if sign != " ":
        return text + sign, _Beam(says, -math.inf, beam.words, letter)
    if not text or text.endswith(" "):
        return text, _Beam(says, -math.inf, beam.words, letter)
    return text + sign, _Beam(says, -math.inf, beam.words + words.score(_last_word(text)), letter)


def _add(beams: dict[str, _Beam], text: str, beam: _Beam) -> None:
    """One more way to have said a text."""
    other = beams.get(text)
    if other is not None:
        beam = beam._replace(says=_log_add(beam.says, other.says), silent=_log_add(beam.silent, other.silent))
    beams[text] = beam


def _rank(text: str, beam: _Beam, words: Words) -> float:
    return beam.heard + beam.words + words.outlook(_last_word(text))


def _last_word(text: str) -> str:
    return text.rpartition(" ")[2]


def _log_add(one: float, other: float) -> float:
    if one < other:
        one, other = other, one
    return one if other == -math.inf else one + math.log1p(math.exp(other - one))
