"""Questions about pictures: true, balanced, and asked in the voices they are meant for."""

import random
from collections import Counter

import prepare_questions
from common import CLOTHES, DIGIT_WORDS
from prepare_hallucinations import NEAR
from prepare_questions import Question, clothes_question, digit_question, questions, spoken, yes_no_rows


def test_half_ask_what_it_is_and_of_the_others_half_say_yes() -> None:
    rng = random.Random(0)
    for make, labels in ((digit_question, [str(digit) for digit in range(10)]), (clothes_question, CLOTHES)):
        asked = [(labels[i % 10], *make(labels[i % 10], i, rng)) for i in range(400)]
        answers = Counter(answer if answer in ("yes", "no") else "named" for _, _, answer in asked)
        assert answers == {"named": 200, "yes": 100, "no": 100}
        assert all(answer == label for label, _, answer in asked if answer not in ("yes", "no"))


def test_yes_is_said_to_what_is_shown_and_no_to_other_things() -> None:
    rng = random.Random(0)
    for i in range(1, 400, 2):
        digit, label = i % 10, CLOTHES[i % 10]
        question, answer = digit_question(str(digit), i, rng)
        asked = question.removeprefix("Is this ").removesuffix("?").split(" ", 1)[1]
        assert asked in DIGIT_WORDS and (asked == DIGIT_WORDS[digit]) == (answer == "yes")
        question, answer = clothes_question(label, i, rng)
        asked = question.removeprefix("Is this an ").removeprefix("Is this a ").removeprefix("Are these ")
        assert (asked.removesuffix("?") == label) == (answer == "yes")
        if i % 8 == 3:
            assert asked.removesuffix("?") == NEAR[label]


def test_each_kind_of_picture_is_a_third() -> None:
    pictures = [(f"{i}.png", str(i % 10)) for i in range(20)]
    clothes = [(f"c{i}.png", CLOTHES[i % 10]) for i in range(20)]
    scenes = [Question(f"How many {i}?", "1", f"s{i}.png") for i in range(20)]
    asked = questions(pictures, clothes, scenes, 30, random.Random(0))
    assert Counter(each.image[0] if each.image[0] in "cs" else "d" for each in asked) == {"d": 10, "c": 10, "s": 10}
    assert len({each.image for each in asked}) == 30


def test_voices_take_turns_and_a_clip_is_named_by_what_it_says() -> None:
    asked = [Question("What digit is this?", "1", "1.png")] * 6
    said = spoken(asked, ["flite:slt", "hibari:heart"], random.Random(0))
    assert [voice for voice, *_ in said] == ["flite:slt", "hibari:heart"] * 3
    assert len({path for *_, path in said}) == len({(voice, stretch) for voice, _, stretch, _ in said})


def test_yes_and_no_are_as_many_and_are_about_training_pictures(monkeypatch) -> None:
    parts = {
        "clothes": [("?", CLOTHES[i % 10], f"c{i}.png") for i in range(40)],
        "digits": [("?", str(i % 10), f"d{i}.png") for i in range(40)],
    }
    monkeypatch.setattr(prepare_questions, "training_parts", parts.__getitem__)
    rows = [row["messages"] for row in yes_no_rows(random.Random(0))]
    assert Counter(told["content"] for _, told in rows) == {"yes": 5000, "no": 5000}
    label = {image: name for each in parts.values() for _, name, image in each}
    for user, told in rows[:500]:
        picture, question = user["content"]
        shown = label[picture["path"]]
        named = DIGIT_WORDS[int(shown)] if shown.isdigit() else shown
        asked = question["text"].rstrip("?").replace("Is this in the picture: ", "Is this a ").split(maxsplit=2)[2]
        assert (asked.removeprefix("a ").removeprefix("an ") == named) == (told["content"] == "yes")
