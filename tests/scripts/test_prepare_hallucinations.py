"""Questions about what is there and what is not: balanced, true, and of held-out rows only in the tests."""

import random
from collections import Counter

import pytest
from common import CLOTHES
from prepare_hallucinations import NEAR, object_question, preferred, word_questions


def test_half_of_the_questions_are_about_what_is_not_there() -> None:
    rng = random.Random(0)
    asked = [object_question(CLOTHES[i % 10], i, rng) for i in range(400)]
    assert Counter(answer for _, answer in asked) == {"yes": 200, "no": 200}
    for i, (question, answer) in enumerate(asked):
        named = question.removeprefix("Is this in the picture: ").removesuffix("?")
        assert (named == CLOTHES[i % 10]) == (answer == "yes") and named in CLOTHES
        if i % 4 == 1:
            assert named == NEAR[CLOTHES[i % 10]]
    assert set(NEAR) == set(CLOTHES) and all(a != b for a, b in NEAR.items())


def test_words_are_said_where_the_answer_is_yes_and_nowhere_else() -> None:
    texts = ["Please hold the line.", "Your call is important, please wait!", "Go."]
    asked = word_questions(texts, 60, random.Random(0))
    assert len(asked) == 60 and {place for place, _, _ in asked} == {0, 1}  # no long word in the last one
    assert Counter(answer for _, _, answer in asked) == {"yes": 30, "no": 30}
    for place, question, answer in asked:
        word = question.split('"')[1]
        said = texts[place].lower().strip(".!").replace(",", "").split()
        assert len(word) >= 4 and (word in said) == (answer == "yes")
    with pytest.raises(ValueError, match="too few words: 1 questions of 3"):
        word_questions(["Go.", "Stop stop."], 3, random.Random(0))


def test_a_preference_is_the_true_answer_over_the_other() -> None:
    row = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "no"}], "task": "t"}
    found = preferred(row)
    assert (found["chosen"], found["rejected"]) == ("no", "yes") and found["prompt"] == row["messages"][:1]
