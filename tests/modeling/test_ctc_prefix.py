"""Joint decoding: what CTC hears, mixed into the choice of each token."""

import itertools
import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import GenerationConfig

from mixlora.modeling.ctc_prefix import REMEMBERED, UNHEARD, CtcGuide, CtcPrefixScorer, TextScorer
from mixlora.modeling.projectors import CTC_SHARPNESS
from mixlora.modeling.spelling import Spellings
from tests.modeling.model_fixtures import ROWS, batch_inputs, row_inputs, tiny_model

BLANK = 0
SETTINGS = {"speech_blank_token_id": BLANK, "speech_ctc_weight": 0.5}


def clip(frames: int, vocabulary: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Projected tokens, and embeddings, of which each token's log-probabilities are known."""
    torch.manual_seed(frames)
    return torch.randn(frames, vocabulary) / CTC_SHARPNESS, torch.eye(vocabulary)


def all_readings(tokens: torch.Tensor) -> dict[tuple[int, ...], float]:
    """The probability of everything that a clip may say: the sum over all ways to place it."""
    chances = (CTC_SHARPNESS * tokens).softmax(-1)
    said: dict[tuple[int, ...], float] = {}
    for path in itertools.product(range(chances.shape[1]), repeat=len(chances)):
        text = tuple(token for token, _ in itertools.groupby(path) if token != BLANK)
        chance = math.prod(float(chances[t, token]) for t, token in enumerate(path))
        said[text] = said.get(text, 0.0) + chance
    return said


@pytest.mark.parametrize("prefix", [(), (2,), (2, 1), (2, 2), (3, 3, 1)])
def test_it_equals_the_sum_over_all_ways_to_say_it(prefix: tuple[int, ...]) -> None:
    tokens, table = clip(5)
    said = all_readings(tokens)
    total = sum(chance for text, chance in said.items() if text[: len(prefix)] == prefix)
    scorer = CtcPrefixScorer(tokens, table, BLANK)
    found = scorer(prefix)
    assert found is not None
    for token, chance in zip(found.tokens.tolist(), found.chances.tolist(), strict=True):
        wanted = sum(chance for text, chance in said.items() if text[: len(prefix) + 1] == (*prefix, token))
        assert math.exp(chance) == pytest.approx(wanted / total, abs=1e-6)
    assert math.exp(found.end) == pytest.approx(said[prefix] / total, abs=1e-6)


def test_what_cannot_have_been_said_gives_no_opinion() -> None:
    tokens, table = clip(2)
    scorer = CtcPrefixScorer(tokens, table, BLANK)
    assert scorer((1, 1)) is None  # needs three tokens: said, silent, said
    assert scorer((7,)) is None and scorer((7, 1)) is None


def test_a_long_answer_keeps_little_and_an_unheard_one_is_given_up() -> None:
    """Whatever its length: neither memory nor the depth of the search grows with it."""
    tokens, table = clip(9)
    scorer = CtcPrefixScorer(tokens, table, BLANK)
    wanted = {length: scorer((1, 2) * length) for length in (1, 2)}
    for length in range(1, 700):
        found = scorer((3,) * 2 + (9,) + (1,) * length)
        assert found is None and len(scorer._states) <= REMEMBERED + 8
    for length, before in wanted.items():  # forgotten by now
        again = scorer((1, 2) * length)
        assert again is not None and before is not None
        assert torch.equal(again.chances, before.chances) and again.end == before.end


def test_beams_follow_their_row_and_other_rows_keep_their_scores() -> None:
    tokens, table = clip(4, vocabulary=6)
    scorer = CtcPrefixScorer(tokens, table, BLANK)
    guide = CtcGuide([None, scorer], 0.5, prompt_length=1, ends=[5])
    ids, scores = torch.tensor([[9, 1], [9, 2], [9, 1], [9, 2]]), torch.randn(4, 6)
    mixed = guide(ids, scores)
    assert torch.equal(mixed[:2], scores[:2])
    for row, prefix in ((2, (1,)), (3, (2,))):
        heard = torch.full((6,), UNHEARD)
        found = scorer(prefix)
        heard[found.tokens], heard[5] = found.chances.float(), found.end
        torch.testing.assert_close(mixed[row], 0.5 * scores[row].log_softmax(-1) + 0.5 * heard)


SPELLINGS = Spellings(["", " a", " ab", "b", " b", "a", "", " ba"])
"""Of eight tokens, two of them silent."""
TEXTS = [("ab a", math.log(0.5)), ("ab b", math.log(0.3)), ("a", math.log(0.2))]


@pytest.mark.parametrize(
    ("prefix", "chances", "end", "signs"),
    [
        ((), {1: 1, 2: 0.8, 5: 1}, 0, True),  # the first token may have a space in front or none
        ((1,), {3: 0.8}, 0.2, True),  # "a" is whole in one of them
        ((5, 3), {1: 5 / 8, 4: 3 / 8}, 0, True),
        ((2,), {1: 5 / 8, 4: 3 / 8}, 0, True),
        ((2, 0, 6, 4), {}, 1, True),
    ],
)
def test_tokens_spell_on_the_likely_texts(
    prefix: tuple[int, ...], chances: dict[int, float], end: float, signs: bool
) -> None:
    found = TextScorer(TEXTS, SPELLINGS)(prefix)
    assert found is not None
    got = dict(zip(found.tokens.tolist(), found.chances.exp().tolist(), strict=True))
    assert got == pytest.approx(chances)
    assert found.end == (pytest.approx(math.log(end)) if end else UNHEARD)
    assert (found.silent is not None) == signs


def test_no_sign_stands_inside_a_word_and_other_texts_give_no_opinion() -> None:
    scorer = TextScorer([("abba", 0.0)], SPELLINGS)
    assert scorer((2,)).silent is None and scorer((2, 3, 5)).silent.tolist() == [0, 6]
    assert scorer((4,)) is None and scorer((2, 1)) is None
    silence = TextScorer([("", 0.0)], SPELLINGS)(())
    assert silence.end == 0 and len(silence.tokens) == 0


def test_silent_tokens_stay_as_likely_as_the_decoder_has_them() -> None:
    guide = CtcGuide([TextScorer(TEXTS, SPELLINGS)], 0.5, prompt_length=1, ends=[6])
    wanted = torch.randn(1, 8).log_softmax(-1)
    mixed = guide(torch.tensor([[9, 2]]), wanted)[0]
    assert mixed[0] == wanted[0, 0]
    assert mixed.exp().sum().item() == pytest.approx(1, abs=1e-5)
    heard = torch.full((8,), UNHEARD)
    heard[1], heard[4] = math.log(5 / 8), math.log(3 / 8)
    alone = (0.5 * wanted[0] + 0.5 * heard)[1:]
    torch.testing.assert_close(mixed[1:].log_softmax(-1), alone.log_softmax(-1))


@pytest.mark.parametrize("beams", [1, 3])
def test_a_row_in_a_batch_is_guided_as_alone(beams: int) -> None:
    model = tiny_model(**SETTINGS)
    rows = [row_inputs(kind) for kind in ROWS]
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams}
    together = model.generate(**batch_inputs(rows), **options)
    for row, answer in zip(rows, together[:, -5:], strict=True):
        assert torch.equal(model.generate(**batch_inputs([row]), **options)[0, -5:], answer)


def test_a_weight_near_one_says_what_was_heard() -> None:
    model = tiny_model(**SETTINGS)
    inputs = batch_inputs([row_inputs("speech")])
    features = model.model.encode_speech(inputs["input_features"], inputs["input_features_mask"])
    projected = model.model.project_speech(model.model.stack_speech(features))
    scorer = CtcPrefixScorer(projected[0], model.get_input_embeddings().weight, BLANK)
    said: tuple[int, ...] = ()
    for _ in range(3):
        found = scorer(said)
        assert found is not None
        said = (*said, int(found.tokens[found.chances.argmax()]))
    answer = model.generate(**inputs, max_new_tokens=3, do_sample=False, ctc_weight=0.9999)
    assert tuple(answer[0, -3:].tolist()) == said
    plain = model.generate(**inputs, max_new_tokens=3, do_sample=False, ctc_weight=0)
    assert not torch.equal(plain, answer)


def test_the_ends_of_one_call_are_those_that_ctc_expects() -> None:
    """Given as an argument or in a generation config; a clip that is over then ends the answer there."""
    model = tiny_model(**SETTINGS)
    model.generation_config.eos_token_id = None
    inputs = batch_inputs([row_inputs("speech")])
    options = {"max_new_tokens": 60, "do_sample": False}
    assert model.generate(**inputs, **options, ctc_weight=0.95).shape[1] == inputs["input_ids"].shape[1] + 60
    config = GenerationConfig(**options, eos_token_id=9, pad_token_id=9)
    given = [
        model.generate(**inputs, **options, eos_token_id=9, pad_token_id=9, ctc_weight=0.95),
        model.generate(**inputs, generation_config=config, ctc_weight=0.95),
    ]
    for answer in given:
        assert answer.shape[1] < inputs["input_ids"].shape[1] + 60 and answer[0, -1] == 9


def test_which_clips_are_followed() -> None:
    model = tiny_model(**SETTINGS)
    model.generation_config.eos_token_id = 9

    def followed(ids: torch.Tensor, inputs: dict) -> list[bool]:
        media = {name: inputs[name] for name in inputs if name not in ("input_ids", "attention_mask")}
        guides = model.guides(ids, model.model.encode_media(ids, **media), [9])
        return [scorer is not None for guide in guides for scorer in guide.scorers] or [False] * len(ids)

    inputs = batch_inputs([row_inputs(kind) for kind in ROWS])
    assert dict(zip(ROWS, followed(inputs["input_ids"], inputs), strict=True)) == {
        "text": False, "image": False, "speech": True, "both": False, "two_clips": False,
    }  # fmt: skip
    speech = batch_inputs([row_inputs("speech")])
    for ends, wanted in ((1, True), (2, False)):  # the clip's own turn ends; or an answer came since
        ids = torch.cat([speech["input_ids"], torch.full((1, ends), 9)], dim=1)
        assert followed(ids, speech) == [wanted]
    turn, end = speech["input_ids"], torch.tensor([[9]])
    talk = torch.cat([turn, end, turn[:, :2], end, turn, end], dim=1)  # a clip, an answer, and another clip
    both = {name: torch.cat([speech[name]] * 2) for name in ("input_features", "input_features_mask")}
    assert followed(talk, both) == [True]


def test_the_weight_is_checked() -> None:
    for wrong in ({"speech_ctc_weight": 1, "speech_blank_token_id": 0}, {"speech_ctc_weight": 0.5}):
        with pytest.raises(StrictDataclassClassValidationError, match="speech_ctc_weight"):
            tiny_model(**wrong)
