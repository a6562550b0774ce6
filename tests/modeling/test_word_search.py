"""The likeliest texts of a clip: CTC's sum over all ways to place letters, and the words that are known."""

import itertools
import math

import pytest
import torch

from mixlora.modeling.word_search import UNKNOWN, WORD_BONUS, WORD_WEIGHT, Words, likely_texts

NONE = Words({})


def all_readings(heard: torch.Tensor, alphabet: str) -> dict[str, float]:
    """The probability of all that a clip may spell: the sum over all ways to place it."""
    chances, said = heard.double().exp(), dict[str, float]()
    for path in itertools.product(range(chances.shape[1]), repeat=len(chances)):
        text = "".join(alphabet[letter - 1] for letter, _ in itertools.groupby(path) if letter)
        said[text] = said.get(text, 0.0) + math.prod(float(chances[t, letter]) for t, letter in enumerate(path))
    return said


def heard_as(*letters: dict[str, float], alphabet: str) -> torch.Tensor:
    """Log-probabilities of a clip in which each token has these letters ("" is silence), and little of the others."""
    chances = torch.full((len(letters), 1 + len(alphabet)), 1e-4)
    for place, given in enumerate(letters):
        for letter, chance in given.items():
            chances[place, alphabet.index(letter) + 1 if letter else 0] = chance
    return (chances / chances.sum(1, keepdim=True)).log()


def test_it_finds_the_likeliest_texts_of_all() -> None:
    torch.manual_seed(0)
    heard = (2 * torch.randn(4, 3)).log_softmax(-1)
    said = all_readings(heard, "ab")
    best = sorted(said, key=said.__getitem__, reverse=True)[:5]
    found = likely_texts(heard, "ab", NONE, best=5)
    assert [text for text, _ in found] == best
    total = sum(said[text] for text in best)
    assert [math.exp(score) for _, score in found] == pytest.approx([said[text] / total for text in best], abs=1e-3)


def test_spaces_in_front_behind_and_doubled_are_one_text() -> None:
    heard = heard_as({" ": 0.9, "": 0.1}, {"a": 1}, {" ": 1}, {"": 1}, {" ": 1}, {"b": 1}, {" ": 1}, alphabet=" ab")
    said: dict[str, float] = {}
    for text, chance in all_readings(heard, " ab").items():
        said[" ".join(text.split())] = said.get(" ".join(text.split()), 0.0) + chance
    (text, score), *_ = likely_texts(heard, " ab", NONE, best=3)
    assert text == "a b" and math.exp(score) == pytest.approx(said[text], abs=2e-3)


def test_a_known_word_wins_over_letters_that_are_a_little_likelier() -> None:
    heard = heard_as({"c": 1}, {"a": 1}, {"": 1}, {"r": 0.6, "t": 0.4}, {" ": 1}, {"a": 1}, alphabet=" acrt")
    assert likely_texts(heard, " acrt", NONE, best=1)[0][0] == "car a"
    assert likely_texts(heard, " acrt", Words({"cat": 1, "a": 9}), best=1)[0][0] == "cat a"
    sure = heard_as({"c": 1}, {"a": 1}, {"": 1}, {"r": 1}, alphabet=" acrt")
    assert likely_texts(sure, " acrt", Words({"cat": 1, "a": 9}), best=1)[0][0] == "car"


def test_what_words_add() -> None:
    words = Words({"the": 6, "cat": 2})
    assert words.score("the") == pytest.approx(WORD_BONUS + WORD_WEIGHT * math.log(6 / 8))
    assert words.score("teh") == pytest.approx(UNKNOWN + words.score("cat"))
    assert words.score("") == words.score("4") == words.outlook("th") == words.outlook("") == 0
    assert words.outlook("teh") == words.score("teh") == words.score("c4t") == words.outlook("4t")


def test_a_clip_without_tokens_and_a_silent_one_say_nothing() -> None:
    assert likely_texts(torch.zeros(0, 3), "ab", NONE, best=4) == [("", 0.0)]
    (text, score), *_ = likely_texts(heard_as({"": 1}, {"": 1}, alphabet="ab"), "ab", NONE, best=2)
    assert text == "" and score == pytest.approx(0, abs=1e-2)
