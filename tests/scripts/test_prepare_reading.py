"""Questions about pictures of words: true, and as many yes as no."""

import random
from collections import Counter

from prepare_reading import word_question

OTHERS = ["cloud", "sand", "apple"]


def test_half_say_yes_and_a_word_is_there_or_not() -> None:
    rng = random.Random(0)
    asked = [word_question("Cloud\nSAND", OTHERS, index, rng) for index in range(400)]
    assert Counter(answer for _, answer in asked) == {"yes": 200, "no": 200}
    quoted = [(question.split('"')[1], answer) for question, answer in asked if '"' in question]
    assert Counter(answer for _, answer in quoted) == {"yes": 200, "no": 100}
    assert all((word in ("cloud", "sand")) == (answer == "yes") for word, answer in quoted)


def test_things_that_are_no_words_are_asked_for_too() -> None:
    rng = random.Random(0)
    asked = [word_question("cloud", OTHERS, 4 * index + 3, rng) for index in range(100)]
    assert {answer for _, answer in asked} == {"no"}
    assert {question.split()[0] for question, _ in asked} == {"Is", "Are"}
