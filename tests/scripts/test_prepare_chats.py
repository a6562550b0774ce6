"""Chats: what is asked, what is answered, and what a held-out question shares with training."""

import random
import re

import pytest
from prepare_chats import FORMS, HELD_OUT_FORMS, NAMES, NOW, UNABLE, UNKNOWN, Chats, row_of, typed

NOUNS, ADJECTIVES = ["fowl", "onion"], ["green"]


@pytest.fixture
def chats() -> Chats:
    return Chats(FORMS, NOUNS, ADJECTIVES, random.Random(0))


def test_gaps_are_filled_and_the_answer_is_that_of_the_form(chats) -> None:
    for _ in range(300):
        asked, answer = chats.unknown()
        assert "{" not in asked and answer in (UNKNOWN, NOW, UNABLE)
        form = [form for form in FORMS[answer] if re.fullmatch(re.sub(r"\\{\w+\\}", r".+", re.escape(form)), asked)]
        assert form, (asked, answer)


def test_a_name_that_was_said_is_known_later(chats) -> None:
    told = 0
    for _ in range(200):
        turns = chats.talk()
        assert len(turns) >= 2
        named = re.search(r"(?:My name is|I am) (\w+)\.$", turns[0][0])
        if named and named[1] in NAMES:
            told += 1
            assert turns[0][1] == f"Nice to meet you, {named[1]}." and turns[-1][1] == f"Your name is {named[1]}."
    assert 60 < told < 140  # about half of the talks


def test_held_out_forms_are_no_training_forms_and_rows_take_turns(chats) -> None:
    known = {form for forms in FORMS.values() for form in forms}
    assert not known & {form for forms in HELD_OUT_FORMS.values() for form in forms}
    row = row_of([("Hello", "Hello!"), ("Who am I?", NOW)], random.Random(0))
    assert [turn["role"] for turn in row["messages"]] == ["user", "assistant"] * 2
    assert {typed("Is it?", random.Random(seed)) for seed in range(20)} == {"Is it?", "is it?", "Is it"}
