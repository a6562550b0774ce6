"""CTC over letters: how tokens are spelled, and answers that follow the letters that are heard."""

import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import AutoTokenizer

import mixlora
from mixlora.modeling.configuration_mixlora import SPEECH_LETTERS
from mixlora.modeling.speech_letters import SpeechLetters
from mixlora.modeling.spelling import Spellings, folded
from tests.modeling.model_fixtures import ROWS, VOCAB, batch_inputs, row_inputs, tiny_model

CONTEXT = {"layers": 1, "kernel_size": 3, "intermediate_size": 12, "stride": 2}
SETTINGS = {
    "speech_context": CONTEXT,
    "speech_letters": {"alphabet": " abc", "longest": 3, "words": 40},
    "speech_blank_token_id": 0,
    "speech_ctc_weight": 0.5,
}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(mixlora.default_checkpoint())


def test_a_text_is_spelled_alike_however_it_is_cut_into_tokens(tokenizer) -> None:
    letters = SpeechLetters(4, len(tokenizer), **SPEECH_LETTERS)
    letters.read_spelling(tokenizer)

    def read(ids: list[int]) -> str:
        return "".join(letters.alphabet[letter - 1] for letter in letters.spell(torch.tensor(ids)).tolist())

    for text, spelled in (
        ("Agent Logged off.", "agent logged off"),
        ("It's 10 past 7, Joe!", "it's 10 past 7 joe"),
        ("Well, that - again - is it...", "well that again is it"),
    ):
        assert read(tokenizer(text)["input_ids"]) == spelled
    text = "agent's 10 pounds"
    assert read([tokenizer(each)["input_ids"][0] for each in text]) == read(tokenizer(text)["input_ids"]) == text
    assert folded("Caf\u00e9\u2019s\n", letters.alphabet) == "cafe's "


def test_what_nobody_hears_has_no_letters(tokenizer) -> None:
    letters = SpeechLetters(4, len(tokenizer), **SPEECH_LETTERS)
    letters.read_spelling(tokenizer)
    silent = set(letters.spellings.silent.tolist())
    assert {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder} <= silent
    signs = [tokenizer.convert_tokens_to_ids(each) for each in (",", ".", "?", "-", "\u0120-")]
    assert set(signs) <= silent
    space = tokenizer.convert_tokens_to_ids("\u0120")  # in front of a digit, which is a token of its own
    assert letters.spell(torch.tensor([space])).tolist() == [1]


def test_spelling_is_read_once_and_must_fit(tokenizer) -> None:
    letters = SpeechLetters(4, len(tokenizer), **SPEECH_LETTERS)
    letters.spelling[5, 0] = 1
    letters.read_spelling(tokenizer)
    assert int(letters.spelling.sum()) == 1
    for size, longest in ((len(tokenizer), 4), (100, 16)):
        with pytest.raises(ValueError, match=f"room for {size} tokens of {longest} letters, and the tokenizer's '"):
            SpeechLetters(4, size, **SPEECH_LETTERS | {"longest": longest}).read_spelling(tokenizer)


def test_texts_are_spelled_by_tokens() -> None:
    spellings = Spellings(["", " a", " ab", "b", "abb", " a"])
    assert spellings.silent.tolist() == [0]
    assert spellings.text((2, 0, 3, 99)) == " abb"
    assert list(spellings.starting(" abb", first=False)) == [1, 5, 2]
    assert list(spellings.starting("abb", first=True)) == [4, 1, 5, 2]
    assert list(Spellings([]).starting("a", first=True)) == []


def test_words_are_packed_with_how_often_they_are_said() -> None:
    counts = {"call": 9, "it's": 8, "busy": 1, "are": 3, "fowl": 1}
    letters = SpeechLetters(4, 8, **SPEECH_LETTERS | {"words": 60})
    assert letters.known_words.score("call") == letters.known_words.score("cal") == 0
    letters.learn_words(counts)
    known = letters.known_words
    assert known.score("call") == known.score("it's") > known.score("are") > known.score("busy") == known.score("fowl")
    assert known.score("busy") > known.score("cal")
    said = letters.said_words
    assert said.score("call") > said.score("are") > said.score("busy") == said.score("cal")
    doubtful = torch.full((4, 1 + len(letters.alphabet)), -20.0)
    for place, chances in enumerate(
        ({"b": 1.0}, {"u": 1.0}, {"s": 1.0}, {"y": 0.45, "t": 0.55})
    ):  # no word that is said
        for letter, chance in chances.items():
            doubtful[place, 1 + letters.alphabet.index(letter)] = math.log(chance)
    assert letters.likely_texts(doubtful)[0][0] == "bust"
    again = SpeechLetters(4, 8, **SPEECH_LETTERS | {"words": 60})
    again.load_state_dict(letters.state_dict())
    assert [again.known_words.score(word) for word in counts] == [known.score(word) for word in counts]
    for wrong in ({"Call": 1}, {"two words": 1}, {"": 1}, {"call": 0}):
        with pytest.raises(ValueError, match="without a space, said once or more"):
            letters.learn_words(wrong)
    letters.learn_words({})
    assert letters.known_words.score("cal") == letters.said_words.score("cal") == 0
    with pytest.raises(ValueError, match="5 words take .. bytes, there is room for 20"):
        SpeechLetters(4, 8, **SPEECH_LETTERS | {"words": 20}).learn_words(counts)


def letter_model(**changes):
    model = tiny_model(**SETTINGS | changes)
    spelling = model.model.speech_letters.spelling
    for token in range(10, VOCAB):
        spelling[token] = torch.tensor([token % 4 + 1, token % 3, (token % 5 == 0) * (token % 3)])
    return model


@pytest.mark.parametrize("beams", [1, 3])
def test_a_row_in_a_batch_is_guided_as_alone(beams: int) -> None:
    model = letter_model()
    rows = [row_inputs(kind) for kind in ROWS]
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams}
    together = model.generate(**batch_inputs(rows), **options)
    for row, answer in zip(rows, together[:, -5:], strict=True):
        assert torch.equal(model.generate(**batch_inputs([row]), **options)[0, -5:], answer)


def test_a_weight_near_one_says_what_is_heard() -> None:
    model = letter_model()
    inputs = batch_inputs([row_inputs("speech")])
    letters = model.model.speech_letters
    stacked = model.model.stack_speech(
        model.model.encode_speech(inputs["input_features"], inputs["input_features_mask"])
    )
    spelled = letters(stacked)[0]
    assert spelled.shape == (19, 5)
    texts, silent = [text for text, _ in letters.likely_texts(spelled)], letters.spellings.silent.tolist()
    options = {"max_new_tokens": 3, "do_sample": False, "suppress_tokens": silent}
    answer = model.generate(**inputs, **options, ctc_weight=0.9999)
    said = letters.spellings.text(answer[0, -3:].tolist()).lstrip()
    assert said and any(text.startswith(said) for text in texts)
    assert not torch.equal(model.generate(**inputs, **options, ctc_weight=0), answer)


def test_letters_that_were_never_taught_leave_tokens_to_be_followed(tokenizer) -> None:
    model = tiny_model(**SETTINGS)
    inputs = batch_inputs([row_inputs("speech")])
    features = model.model.encode_speech(inputs["input_features"], inputs["input_features_mask"])
    [heard] = model.model.get_audio_features(features=features).heard
    assert heard.letters is None
    plain = model.generate(**inputs, max_new_tokens=3, do_sample=False, ctc_weight=0)
    assert not torch.equal(model.generate(**inputs, max_new_tokens=3, do_sample=False, ctc_weight=0.9999), plain)
    letters = SpeechLetters(4, len(tokenizer), **SPEECH_LETTERS)
    assert len(letters.spellings.silent) == len(tokenizer)
    letters.read_spelling(tokenizer)
    assert len(letters.spellings.silent) < len(tokenizer)


def test_letters_and_their_spelling_are_saved_and_are_a_group(tmp_path) -> None:
    model = letter_model()
    assert model.parameter_groups()["speech_letters"] == [
        f"model.speech_letters.head.{name}" for name in ("weight", "bias")
    ]
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert again.config.speech_letters == SETTINGS["speech_letters"]
    assert torch.equal(again.model.speech_letters.spelling, model.model.speech_letters.spelling)
    inputs = batch_inputs([row_inputs("speech")])
    inputs["input_features"] = inputs["input_features"].bfloat16()
    assert again.generate(**inputs, max_new_tokens=3, do_sample=False).shape == (1, inputs["input_ids"].shape[1] + 3)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"speech_context": None}, "speech_letters reads the tokens of a speech_context"),
        ({"speech_context": {"stride": 3}}, r"speech_stack \(2\) must be a multiple of the stride .* \(3\)"),
        (
            {"speech_letters": {"alphabet": "aba"}},
            "alphabet must be a string of 1 to 255 different letters, got 'aba'",
        ),
        ({"speech_letters": {"words": -1}}, "words must be an integer of at least 0, got -1"),
        ({"speech_letters": {"longest": 0}}, "longest must be an integer of at least 1, got 0"),
    ],
)
def test_wrong_settings_are_named(wrong: dict, message: str) -> None:
    with pytest.raises((ValueError, StrictDataclassClassValidationError), match=message):
        tiny_model(**SETTINGS | wrong)
