"""CTC over letters: how tokens are spelled, and answers that follow the letters that are heard."""

import itertools
import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import AutoTokenizer

import mixlora
from mixlora.modeling.configuration_mixlora import SPEECH_LETTERS
from mixlora.modeling.ctc_prefix import (
    SELDOM,
    UNHEARD,
    CtcGuide,
    CtcPrefixScorer,
    JointPrefixScorer,
    LetterPrefixScorer,
)
from mixlora.modeling.projectors import CTC_SHARPNESS
from mixlora.modeling.speech_letters import SpeechLetters, SpellingTrie, folded
from tests.modeling.model_fixtures import ROWS, VOCAB, batch_inputs, row_inputs, tiny_model

CONTEXT = {"layers": 1, "kernel_size": 3, "intermediate_size": 12, "stride": 2}
SETTINGS = {
    "speech_context": CONTEXT,
    "speech_letters": {"alphabet": " abc", "longest": 3},
    "speech_blank_token_id": 0,
    "speech_ctc_weight": 0.5,
}
SPELLINGS = {1: (1,), 2: (1, 2), 3: (1, 2, 2), 4: (2,), 5: (3, 1), 6: (3, 3, 3)}
"""Of some of eight tokens; the others are silent."""


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(mixlora.default_checkpoint())


def spelled_by(spellings: dict[int, tuple[int, ...]], vocabulary: int = 8, alphabet: str = "abc") -> SpeechLetters:
    letters = SpeechLetters(4, vocabulary, alphabet=alphabet, longest=3)
    for token, spelling in spellings.items():
        letters.spelling[token, : len(spelling)] = torch.tensor(spelling)
    return letters


def clip(tokens: int = 5, letters: int = 3) -> torch.Tensor:
    """Log-probabilities of nothing and of letters."""
    torch.manual_seed(tokens)
    return torch.randn(tokens, 1 + letters).log_softmax(-1)


def all_readings(heard: torch.Tensor) -> dict[tuple[int, ...], float]:
    """The probability of all that a clip may spell: the sum over all ways to place it."""
    chances, said = heard.double().exp(), dict[tuple[int, ...], float]()
    for path in itertools.product(range(chances.shape[1]), repeat=len(chances)):
        text = tuple(letter for letter, _ in itertools.groupby(path) if letter)
        said[text] = said.get(text, 0.0) + math.prod(float(chances[t, letter]) for t, letter in enumerate(path))
    return said


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
    silent = set(letters.trie.silent.tolist())
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
            SpeechLetters(4, size, alphabet=SPEECH_LETTERS["alphabet"], longest=longest).read_spelling(tokenizer)


def test_the_trie_holds_each_beginning_once() -> None:
    trie = SpellingTrie(spelled_by(SPELLINGS).spelling)
    assert [len(letters) for letters in trie.letters] == [3, 3, 2]
    assert trie.silent.tolist() == [0, 7]
    found = {}
    for depth, (tokens, places) in enumerate(trie.tokens):
        for token, place in zip(tokens.tolist(), places.tolist(), strict=True):
            spelling, at = [], place
            for above in range(depth, -1, -1):
                spelling.insert(0, int(trie.letters[above][at]))
                at = int(trie.parents[above][at])
            found[token] = tuple(spelling)
    assert found == SPELLINGS


@pytest.mark.parametrize("prefix", [(), (1,), (2,), (4,), (0, 2), (3,), (5, 1), (2, 7)])
def test_it_equals_the_sum_over_all_ways_to_spell_it(prefix: tuple[int, ...]) -> None:
    heard = clip()
    said = all_readings(heard)
    so_far = tuple(letter for token in prefix for letter in SPELLINGS.get(token, ()))
    total = sum(chance for text, chance in said.items() if text[: len(so_far)] == so_far)
    found = LetterPrefixScorer(heard, spelled_by(SPELLINGS))(prefix)
    assert found is not None
    for token, spelling in SPELLINGS.items():
        longer = so_far + spelling
        wanted = sum(chance for text, chance in said.items() if text[: len(longer)] == longer)
        assert math.exp(found[0][token]) == pytest.approx(wanted / total, abs=2e-5)
    assert math.exp(float(found[1])) == pytest.approx(said[so_far] / total, abs=1e-6)


def test_what_cannot_have_been_spelled_gives_no_opinion() -> None:
    scorer = LetterPrefixScorer(clip(tokens=2), spelled_by(SPELLINGS))
    assert scorer((6,)) is None and scorer((6, 1)) is None  # three times the same letter in two places
    assert scorer((0,) * 5) is not None


def test_silent_tokens_stay_as_likely_as_the_decoder_has_them() -> None:
    scorer = LetterPrefixScorer(clip(), spelled_by(SPELLINGS))
    guide = CtcGuide([scorer], 0.5, prompt_length=1, ends=[7])
    expected = torch.randn(1, 8).log_softmax(-1)
    mixed = guide(torch.tensor([[9, 1]]), expected)[0]
    found = scorer((1,))
    assert found is not None
    assert mixed[0] == expected[0, 0]
    assert mixed.exp().sum().item() == pytest.approx(1, abs=1e-5)
    heard = found[0].float().clone()
    heard[7] = found[1]
    alone = (0.5 * expected[0] + 0.5 * heard)[1:]
    torch.testing.assert_close(mixed[1:].log_softmax(-1), alone.log_softmax(-1))
    assert float(heard[6]) == UNHEARD  # "ccc" does not fit in what is left of the clip


def test_letters_and_tokens_count_half_each() -> None:
    """Where tokens cannot have said the beginning, letters alone tell what is next; and the other way round."""
    letters = LetterPrefixScorer(clip(), spelled_by(SPELLINGS))
    torch.manual_seed(0)
    tokens = CtcPrefixScorer(torch.randn(3, 8) / CTC_SHARPNESS, torch.eye(8), 0)
    joint = JointPrefixScorer(letters, tokens)
    spelled, said, both = letters((1,)), tokens((1,)), joint((1,))
    assert spelled is not None and said is not None and both is not None
    heard = torch.full_like(spelled[0], SELDOM)
    heard[tokens.candidates] = said[0].clamp(min=SELDOM)
    torch.testing.assert_close(both[0], (spelled[0] + heard) / 2)
    torch.testing.assert_close(both[1], (spelled[1] + said[1]) / 2)
    silences = (7,) * 5  # they have no letters, and too many places
    assert tokens(silences) is None
    assert torch.equal(joint(silences)[0], letters(silences)[0])
    assert letters((6, 6)) is None and tokens((6, 6)) is not None
    assert torch.equal(joint((6, 6))[0][tokens.candidates], tokens((6, 6))[0].clamp(min=SELDOM))


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
    spelled, projected = letters(stacked)[0], model.model.project_speech(stacked)[0]
    assert spelled.shape == (19, 5) and len(projected) == 10
    table = model.get_input_embeddings().weight
    scorer, said = JointPrefixScorer(LetterPrefixScorer(spelled, letters), CtcPrefixScorer(projected, table, 0)), ()
    silent = letters.trie.silent.tolist()
    for _ in range(3):
        found = scorer(said)
        assert found is not None
        said = (*said, int(found[0].index_fill(0, torch.tensor(silent), UNHEARD).argmax()))
    options = {"max_new_tokens": 3, "do_sample": False, "suppress_tokens": silent}
    answer = model.generate(**inputs, **options, ctc_weight=0.9999)
    assert tuple(answer[0, -3:].tolist()) == said
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
    assert len(letters.trie.letters) == 0
    letters.read_spelling(tokenizer)
    assert len(letters.trie.letters) > 0


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
        ({"speech_letters": {"longest": 0}}, "longest must be an integer of at least 1, got 0"),
    ],
)
def test_wrong_settings_are_named(wrong: dict, message: str) -> None:
    with pytest.raises((ValueError, StrictDataclassClassValidationError), match=message):
        tiny_model(**SETTINGS | wrong)
