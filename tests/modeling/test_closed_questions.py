"""Closed questions about a picture: whether it shows a thing, typed or spoken, and which of several it shows."""

import itertools
import math

import pytest
import torch

from mixlora.modeling.closed_questions import (
    SEEN_ENOUGH,
    SPOKEN,
    asked_thing,
    offered_things,
    spoken_verdict,
    things_heard,
    verdict,
)
from mixlora.modeling.spelling import BLANK
from tests.modeling.model_fixtures import IMAGE, batch_inputs, row_inputs, tiny_model

THINGS = {
    name: number for number, name in enumerate(["dog", "cat", "cat face", "can", "cherry", "bus", "ice cream"], 1)
}
ALPHABET = " abcdefghijklmnopqrstuvwxyz"


@pytest.mark.parametrize(
    ("question", "thing"),
    [
        ("is there a dog", "dog"),
        ("is there a dog in the picture", "dog"),
        ("do you see any dogs here", "dog"),
        ("is this a cat face", "cat face"),
        ("is this in the picture cat", "cat"),
        ("are there cherries", "cherry"),
        ("are there two buses", None),  # "two" tells more of them
        ("are there buses", "bus"),
        ("does the picture show ice cream", "ice cream"),
        ("can you see a cat", "cat"),
        ("can you see a can", "can"),
        ("is there a cat and a dog", None),
        ("is there a dog house", None),
        ("is there a red bus", None),
        ("is there a drop of ice cream", None),
        ("is the dog brown", None),
        ("is there a horse", None),
        ("dog", None),
        ("", None),
    ],
)
def test_the_one_thing_that_a_question_asks_for(question: str, thing: str | None) -> None:
    assert asked_thing(question, THINGS) == (None if thing is None else THINGS[thing])


@pytest.mark.parametrize(
    ("question", "offered"),
    [
        ("is this a dog or a cat", ["dog", "cat"]),
        ("is this a dog a bus a cat face or ice cream", ["dog", "bus", "cat face", "ice cream"]),
        ("can you see a can or a cat", ["can", "cat"]),
        ("is the dog left or right of the cat", []),
        ("is there a dog and a cat", []),
        ("is this a dog or a horse", []),
        ("is there a dog", []),
        ("", []),
    ],
)
def test_the_things_that_a_question_offers(question: str, offered: list[str]) -> None:
    assert offered_things(question, THINGS) == [THINGS[name] for name in offered]


def letters_of(text: str) -> list[int]:
    return [1 + ALPHABET.index(letter) for letter in text]


def spelled_clip(text: str, certain: float = 6.0) -> torch.Tensor:
    """Log-probabilities `[tokens, letters]` of a clip that spells a text, with silence between its letters."""
    places = [place for letter in letters_of(text) for place in (letter, BLANK)]
    scores = torch.zeros(len(places), 1 + len(ALPHABET))
    scores[torch.arange(len(places)), torch.tensor(places)] = certain
    return scores.log_softmax(-1)


def test_a_thing_is_heard_in_each_form_of_the_question() -> None:
    names = list(THINGS)
    for name, form in itertools.product(names, SPOKEN):
        text = form.format(a="an" if name[0] in "aeiou" else "a") + name
        heard = things_heard(spelled_clip(text, 4), names, letters_of)
        assert names[int(heard.argmax())] == name
    blurred = things_heard(spelled_clip("is there a deg", 4), names, letters_of)
    assert names[int(blurred.argmax())] == "dog"


def test_what_is_heard_is_the_probability_of_the_whole_question() -> None:
    letters = torch.randn(7, 4, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    toy = {"a": 1, "b": 2, "c": 3}

    def short(text: str) -> list[int]:
        return [toy[letter] for letter in text if letter in toy][-2:]

    heard = things_heard(letters, ["b", "c"], short)
    for thing, found in zip("bc", heard, strict=True):
        wanted = 0.0
        for form in SPOKEN:
            target = [*short(form.format(a="a")), *short(thing)]
            for path in itertools.product(range(4), repeat=7):
                said = [letter for letter, _ in itertools.groupby(path) if letter]
                if said == target:
                    wanted += math.exp(sum(float(letters[i, letter]) for i, letter in enumerate(path)))
        assert float(found) == pytest.approx(math.log(wanted), abs=1e-3)


def test_a_clip_that_is_too_short_asks_for_nothing() -> None:
    heard = things_heard(spelled_clip("a dog")[:5], THINGS, letters_of)
    assert torch.isinf(heard).all()
    assert spoken_verdict(heard, torch.full((len(THINGS),), 0.5)) is None


def test_a_thing_is_there_from_a_probability_on() -> None:
    yes = verdict(torch.tensor([0.0, SEEN_ENOUGH, 0.6, 1.0]))
    assert yes[1] == pytest.approx(0.5, abs=1e-5) and yes[2] == pytest.approx(2 / (2 + 0.4 / 0.7), abs=1e-5)
    assert 0 < yes[0] < 1e-4 and 1 - 1e-4 < yes[3] < 1


def test_what_is_heard_and_what_is_seen_decide_together() -> None:
    there = torch.tensor([0.95, 0.001, 0.001, 0.001])
    for heard, yes in (([0.0, -9, -9, -9], 0.9), ([-9, 0.0, -9, -9], 0.1)):
        found = spoken_verdict(torch.tensor(heard) * 4, there)
        assert found is not None and (found > yes if yes > 0.5 else found < yes)
    sure = spoken_verdict(torch.tensor([-torch.inf, 0.0, -torch.inf, -torch.inf]), torch.full((4,), 0.2))
    assert sure == pytest.approx(float(verdict(torch.tensor(0.2))))
    unheard = spoken_verdict(torch.zeros(4), there)  # half of all questions are about what is there
    assert unheard == pytest.approx(0.5, abs=0.02)


WORDS = dict(
    enumerate(
        (" is", " there", " a", " the", " dog", " cat", " animal", " or", "yes", "no", "dog", "cat", "animal"), 10
    )
)
IDS = {text: token for token, text in WORDS.items()}
END = 9


def seeing_model(**changes):
    """A model that knows a dog (seen here), a cat (not here) and the kind of animals by name, and hears letters."""
    model = tiny_model(
        vision_names={"count": 3, "longest": 2, "hidden_size": 5},
        vision_letters={"widths": [4], "layers": [1], "patch_size": 2, "tokens": 2},
        speech_context={"layers": 1, "kernel_size": 3, "intermediate_size": 12, "stride": 2},
        speech_letters={},
        speech_blank_token_id=0,
        vision_told_weight=0.4,
        **changes,
    )
    model.generation_config.eos_token_id = END
    for part in (model.model.vision_letters, model.model.speech_letters):
        for token, text in WORDS.items():
            part.spelling[token, : len(text)] = torch.tensor(part.letters_of(text), dtype=torch.uint8)
    names = model.model.vision_names
    names.learn_names([[IDS["dog"]], [IDS["cat"]], [IDS["animal"]]], kinds=[[IDS["animal"]]])
    names.head.weight.data.zero_()
    names.head.bias.data = torch.tensor([0.0, 3.0, -4.0, 4.0])
    return model


def asking(model, ids: list[int], kind: str = "image"):
    """The tellers of a row with a picture and these ids behind it, and what its media are."""
    row = row_inputs(kind)
    own = [token for token in row["ids"] if token < 10]
    row["ids"] = [IMAGE] * (model.model.picture_tokens - own.count(IMAGE)) + own + ids
    inputs = batch_inputs([row])
    ids = inputs.pop("input_ids")
    inputs.pop("attention_mask")
    media = model.model.encode_media(ids, **inputs)
    [guide] = model.guides(ids, media, [END])
    return guide.tellers[0], media


def answer(model, teller) -> float:
    """Of a verdict's teller, the probability of "yes"."""
    expected = teller[0](())
    chances = dict(zip(expected.tokens.tolist(), expected.chances.exp().tolist(), strict=True))
    assert chances[IDS["yes"]] + chances[IDS["no"]] == pytest.approx(1)
    return chances[IDS["yes"]]


@torch.no_grad()
def test_what_is_seen_answers_a_typed_question() -> None:
    model = seeing_model()
    question = [IDS[text] for text in (" is", " there", " a", " dog")]
    for ids, name in (
        (question, "dog"),
        ([*question[:3], IDS[" cat"]], "cat"),
        ([*question, END], "dog"),  # the turn ends
        ([IDS[" is"], IDS[" the"], IDS[" dog"], IDS[" there"]], None),
        ([], None),
    ):
        tellers, media = asking(model, ids)
        told = media["image"].told[0]
        plain = len(asking(model, [IDS[" the"]])[0])
        assert len(tellers) == plain + (name is not None)
        if name is not None:
            wanted = verdict(told.somewhere[1 if name == "dog" else 2])
            assert answer(model, tellers[-1]) == pytest.approx(float(wanted), rel=1e-4)
            none = math.exp(dict(told.names)[()])
            assert tellers[-1][1] == pytest.approx(2 * (1 - none))


@torch.no_grad()
def test_a_question_that_offers_things_is_answered_by_one_of_them() -> None:
    model = seeing_model()
    plain = len(asking(model, [IDS[" the"]])[0])
    for offered, chances in (
        (("dog", "cat"), {"dog": math.exp(3), "cat": math.exp(-4)}),
        (("cat", "animal"), {"cat": math.exp(-4), "animal": math.exp(4)}),
    ):
        first, second = (IDS[f" {name}"] for name in offered)
        tellers, _ = asking(model, [IDS[" is"], IDS[" a"], first, IDS[" or"], IDS[" a"], second, END])
        assert len(tellers) == plain + 1
        scorer, counts = tellers[-1]
        expected = scorer(())
        found = dict(zip(expected.tokens.tolist(), expected.chances.exp().tolist(), strict=True))
        total = sum(chances.values())
        assert found == pytest.approx({IDS[name]: each / total for name, each in chances.items()})
        none = 1 / (1 + math.exp(3) + math.exp(-4) + math.exp(4))
        assert counts == pytest.approx(2 * (1 - none))  # what the classifier does not know, the decoder says


@torch.no_grad()
def test_kinds_are_told_where_they_are_offered_alone() -> None:
    model = seeing_model()
    tellers, media = asking(model, [IDS[" the"]])
    told = media["image"].told[0]
    assert int(told.whole.argmax()) == 3 and told.names[0][0] == (IDS["dog"],) and told.somewhere[3] == 0
    assert (IDS["animal"],) not in [name for name, _ in told.names]
    assert IDS["animal"] not in tellers[0][0](()).tokens.tolist()
    question = [IDS[text] for text in (" is", " there", " a", " animal")]
    assert len(asking(model, question)[0]) == len(tellers)  # whether it is of a kind, the decoder says


@torch.no_grad()
def test_only_the_last_turn_asks() -> None:
    model = seeing_model()
    dog, cat = ([IDS[" is"], IDS[" there"], IDS[" a"], IDS[f" {name}"]] for name in ("dog", "cat"))
    row = row_inputs("image")
    row["ids"] = [*dog, END, *cat, END] + [IMAGE] * model.model.picture_tokens + [IDS[" is"], IDS[" there"], END]
    inputs = batch_inputs([row])
    media = model.model.encode_media(inputs["input_ids"], inputs["pixel_values"])
    [guide] = model.guides(inputs["input_ids"], media, [END])
    before = len(guide.tellers[0])
    inputs["input_ids"] = torch.cat([inputs["input_ids"][:, :-1], torch.tensor([[*cat[2:], END]])], dim=1)
    [guide] = model.guides(inputs["input_ids"], media, [END])
    assert len(guide.tellers[0]) == before + 1
    there = media["image"].told[0].somewhere
    assert answer(model, guide.tellers[0][-1]) == pytest.approx(float(verdict(there[2])), rel=1e-4)
    assert float(there[2]) < 0.5 < float(there[1])


@torch.no_grad()
def test_a_clip_asks_where_nothing_is_written() -> None:
    model = seeing_model()
    spoken, media = asking(model, [END], "both")
    typed, _ = asking(model, [IDS[" the"], END], "both")
    [clip], there = media["audio"].heard, media["image"].told[0].somewhere
    assert clip.beside_picture and len(clip.letters) == 6 and len(spoken) == len(typed)  # too short to ask for a thing
    letters = model.model.speech_letters
    scores = torch.full((28, 1 + len(letters.alphabet)), -6.0)
    for place, letter in enumerate(letters.letters_of("is there a cat")):
        scores[2 * place, letter], scores[2 * place + 1, BLANK] = 6.0, 6.0
    clip.letters = scores.log_softmax(-1)
    told = media["image"].told[0]
    [teller] = model._closed(told, torch.tensor([IMAGE, END]), [clip])
    assert answer(model, teller) == pytest.approx(float(verdict(there[2])), abs=1e-3)
    assert not model._closed(told, torch.tensor([IMAGE, IDS[" the"], END]), [clip])
    assert not model._closed(told, torch.tensor([IMAGE, END]), [clip, clip])


def test_an_answer_follows_what_is_seen() -> None:
    model = seeing_model()
    row = row_inputs("image")
    for name, said in (("dog", "yes"), ("cat", "no")):
        question = [IDS[text] for text in (" is", " there", " a", f" {name}")]
        row["ids"] = [IMAGE] * model.model.picture_tokens + question + [END]
        answered = model.generate(
            **batch_inputs([row]), max_new_tokens=1, do_sample=False, suppress_tokens=[*range(18), *range(20, 400)]
        )
        assert answered[0, -1] == IDS[said]
