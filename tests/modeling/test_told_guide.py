"""Answers that repeat what is told of a picture, as a mixture with the decoder's own."""

import itertools
import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError

from mixlora.modeling.ctc_prefix import REMEMBERED, UNHEARD, TextScorer, mixed
from mixlora.modeling.spelling import Spellings
from mixlora.modeling.told_guide import SHARE, SUPPORT, NameScorer, ToldGuide
from tests.modeling.model_fixtures import IMAGE, ROWS, batch_inputs, row_inputs, tiny_model
from tests.modeling.test_drafts import drafting

END = 5
NAMES = [((1, 2), math.log(0.5)), ((1,), math.log(0.2)), ((3, 3), math.log(0.1))]
SPELLINGS = Spellings(["", " a", " ab", "b", " b", "", "a", "c"])
TEXTS = [("ab", math.log(0.75)), ("b", math.log(0.25))]


def test_what_a_question_offers_needs_no_support() -> None:
    decoder = torch.tensor([0.0, 0, -20, -20, 0, 0, 0, 0]).log_softmax(-1)
    first = {}
    for offered in (False, True):
        tellers = [(NameScorer([((2,), math.log(0.9)), ((3,), math.log(0.1))], offered), 2.0)]
        guide = ToldGuide([tellers], 0.4, prompt_length=1, ends=[END])
        first[offered] = guide(torch.tensor([[9]]), decoder[None])[0].exp()
    assert first[False][2] < 1e-6 and first[True][2] > 0.5
    assert first[True].sum() == pytest.approx(1)


def test_all_tellers_together_leave_the_decoder_its_share() -> None:
    tellers = [(NameScorer([((token,), 0.0)]), counts) for token, counts in ((1, 1.0), (2, 1.0), (3, 2.0))]
    decoder = torch.tensor([9.0, 6, 6, 6, 0, 0, 0, 0]).log_softmax(-1)
    guide = ToldGuide([tellers], 0.4, prompt_length=1, ends=[END])
    both = guide(torch.tensor([[9]]), decoder[None])[0].exp()
    assert both.sum() == pytest.approx(1) and (both >= 0.2 * decoder.exp() - 1e-6).all()


def test_a_name_goes_on_token_by_token() -> None:
    scorer = NameScorer(NAMES)
    for prefix, chances, end in (((), {1: 7 / 8, 3: 1 / 8}, 0), ((1,), {2: 5 / 7}, 2 / 7), ((1, 2), {}, 1)):
        found = scorer(prefix)
        assert found is not None
        got = dict(zip(found.tokens.tolist(), found.chances.exp().tolist(), strict=True))
        assert got == pytest.approx(chances)
        assert found.end == (pytest.approx(math.log(end)) if end else UNHEARD)
    assert scorer((2,)) is None and scorer((1, 2, 2)) is None


def random_decoder(seed: int) -> dict[tuple[int, ...], torch.Tensor]:
    """Log-probabilities `[8]` of a next token after every beginning of up to two tokens."""
    draw = torch.Generator().manual_seed(seed)
    prefixes = [prefix for length in range(3) for prefix in itertools.product(range(8), repeat=length)]
    return {prefix: torch.randn(8, generator=draw).log_softmax(-1) for prefix in prefixes}


def test_it_is_the_mixture_of_whole_answers() -> None:
    """Bayes' rule from token to token gives each answer what the writers' own probabilities of it sum up to."""
    tellers = [(NameScorer(NAMES), 0.8), (TextScorer(TEXTS, SPELLINGS), 0.9)]
    guide, decoder = ToldGuide([tellers], 0.4, prompt_length=1, ends=[END]), random_decoder(0)
    found = {prefix: guide(torch.tensor([[9, *prefix]]), wanted[None])[0].exp() for prefix, wanted in decoder.items()}
    for answer in itertools.product(range(8), repeat=3):
        if END in answer[:2]:
            continue  # nothing comes behind the end
        own = math.prod(float(decoder[answer[:i]][answer[i]].exp()) for i in range(3))
        wanted = (1 - 0.4 * (0.8 + 0.9)) * own
        for scorer, chance in tellers:
            told = 0.4 * chance
            for i in range(3):
                expected = scorer(answer[:i])
                chances = None if expected is None else mixed(decoder[answer[:i]], expected, SHARE, [END]).softmax(-1)
                told *= 0 if chances is None else float(chances[answer[i]])
            wanted += told
        assert math.prod(float(found[answer[:i]][answer[i]]) for i in range(3)) == pytest.approx(wanted, rel=1e-3)


def test_what_the_decoder_hardly_begins_is_hardly_told() -> None:
    """A question for yes or no is not answered by what is written in the picture."""
    for support in (SUPPORT, SUPPORT / 100):
        own = torch.full((8,), (1 - support) / 7)
        own[3] = support
        guide = ToldGuide([[(NameScorer([((3,), 0.0)]), 1.0)]], 0.4, prompt_length=1, ends=[END])
        both = guide(torch.tensor([[9]]), own.log()[None])[0].exp()
        told = 0.4 * support / SUPPORT
        assert float(both[3]) == pytest.approx(told + (1 - told) * support, abs=1e-4)
        torch.testing.assert_close(both.sum(), torch.tensor(1.0))


def test_rows_without_tellers_keep_their_scores_and_beams_follow_their_row() -> None:
    guide = ToldGuide([[], [(NameScorer(NAMES), 0.8)]], 0.4, prompt_length=1, ends=[END])
    first, scores = torch.full((4, 1), 9), torch.randn(4, 8)
    begin = scores[[0, 0, 2, 2]]  # beams begin alike
    mixture = guide(first, begin)
    assert torch.equal(mixture[:2], begin[:2]) and not torch.equal(mixture[2:], begin[2:])
    ids = torch.cat([first, torch.tensor([[1], [3], [1], [3]])], dim=1)
    begun = guide(ids, scores)
    alone = ToldGuide([[(NameScorer(NAMES), 0.8)]], 0.4, prompt_length=1, ends=[END])
    for row in (2, 3):
        alone(first[:1], begin[row : row + 1])
        torch.testing.assert_close(alone(ids[row : row + 1], scores[row : row + 1])[0], begun[row])


def test_a_long_answer_keeps_little_and_what_was_never_begun_is_left_alone() -> None:
    guide = ToldGuide([[(NameScorer([((1,) * 200, 0.0)]), 1.0)]], 0.4, prompt_length=0, ends=[END])
    scores = torch.zeros(1, 8)
    for length in range(150):
        both = guide(torch.ones(1, length, dtype=torch.long), scores)
        assert len(guide._after[0]) <= REMEMBERED + 2
    assert both.softmax(-1)[0, 1] > 0.9
    torch.testing.assert_close(guide(torch.ones(1, 170, dtype=torch.long), scores), scores.log_softmax(-1))


SIZES = {
    "vision_names": {"count": 3, "longest": 3, "hidden_size": 5},
    "vision_letters": {"widths": [4], "layers": [1], "patch_size": 2, "tokens": 2},
}


def telling_model(seed: int = 0):
    """A model that knows three names, and reads what it likes."""
    model = tiny_model(seed, **SIZES, vision_told_weight=0.49)
    model.model.vision_names.learn_names([[11, 12, 13], [14, 15], [16, 17]])
    model.model.vision_names.head.bias.data[1] = 6
    for token in range(10, 90):
        model.model.vision_letters.spelling[token, : 1 + token % 2] = torch.tensor([token % 7 + 1, 2])[: 1 + token % 2]
    return model


def told_row(kind: str) -> dict:
    """A row, with placeholders for what is told of its picture."""
    row = row_inputs(kind)
    if IMAGE in row["ids"]:
        place = row["ids"].index(IMAGE)
        row["ids"][place:place] = [IMAGE] * 5
    return row


@pytest.mark.parametrize("beams", [1, 3])
def test_a_row_in_a_batch_is_guided_as_alone(beams: int) -> None:
    model = telling_model()
    rows = [told_row(kind) for kind in ROWS]
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams, "eos_token_id": None}
    together = model.generate(**batch_inputs(rows), **options)
    changed = 0
    for row, answer in zip(rows, together[:, -5:], strict=True):
        inputs = batch_inputs([row])
        assert torch.equal(model.generate(**inputs, **options)[0, -5:], answer)
        changed += not torch.equal(model.generate(**inputs, **options, told_weight=0)[0, -5:], answer)
    assert changed


def test_drafts_change_no_token() -> None:
    model = telling_model()
    inputs = batch_inputs([told_row("image")])
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    wanted = model.generate(**inputs, **options)
    assert not torch.equal(model.generate(**inputs, **options, told_weight=0), wanted)
    for drafter in (telling_model(), telling_model(1)):
        assert torch.equal(model.generate(**inputs, **options, assistant_model=drafting(drafter)), wanted)
    assert torch.equal(model.generate(**inputs, **options, prompt_lookup_num_tokens=3), wanted)


def test_which_pictures_are_told() -> None:
    model = telling_model()
    model.generation_config.eos_token_id = 9

    def told(ids: torch.Tensor, inputs: dict) -> list[int]:
        media = {name: inputs[name] for name in inputs if name not in ("input_ids", "attention_mask")}
        guides = model.guides(ids, model.model.encode_media(ids, **media), [9])
        assert not guides or any(model.follows(row) for row in ids)
        return [len(tellers) for guide in guides for tellers in guide.tellers] or [0] * len(ids)

    inputs = batch_inputs([told_row(kind) for kind in ROWS])
    found = dict(zip(ROWS, told(inputs["input_ids"], inputs), strict=True))
    assert found["image"] and found["both"] and not found["text"] and not found["speech"]
    picture = batch_inputs([told_row("image")])
    alone = found["image"]
    for ends in (1, 2):  # the picture's own turn ends; or an answer came since, and what follows may ask about it
        ids = torch.cat([picture["input_ids"], torch.full((1, ends), 9)], dim=1)
        assert told(ids, picture) == [alone]
    two = {name: torch.cat([picture[name]] * 2) for name in picture if name != "input_ids"}
    assert told(torch.cat([picture["input_ids"]] * 2, dim=1), two) == [0]
    turns = [picture["input_ids"], torch.full((1, 2), 9), picture["input_ids"]]
    assert told(torch.cat(turns, dim=1), two) == [alone]  # the last one
    assert told(torch.cat([*turns[1:], *turns[1:]], dim=1), two) == [alone]


@torch.no_grad()
def test_a_teller_has_the_probability_that_there_is_something_to_tell() -> None:
    model = telling_model()
    model.model.vision_names.head.bias[0] = 5  # none of the names
    picture = batch_inputs([told_row("image")])
    none = model.model.vision_names(torch.stack(model.model.encode_vision(picture["pixel_values"]))).softmax(-1)[0, 0]
    [guide] = model.guides(
        picture["input_ids"], model.model.encode_media(picture["input_ids"], picture["pixel_values"]), [9]
    )
    [(scorer, chance), *_] = guide.tellers[0]
    assert isinstance(scorer, NameScorer) and chance == pytest.approx(1 - float(none), abs=1e-5)
    assert 0.05 < none < 0.95


@torch.no_grad()
def test_of_several_things_each_may_be_the_answer() -> None:
    model = telling_model()
    picture = batch_inputs([told_row("image")])
    media = model.model.encode_media(picture["input_ids"], picture["pixel_values"])
    told = media["image"].told[0]
    told.names = [((14, 15), math.log(0.7)), ((), math.log(0.2)), ((16, 17), math.log(0.1))]
    told.seen = [((11, 12, 13), -0.2), ((16, 17), -0.7)]
    [guide] = model.guides(picture["input_ids"], media, [9])
    [(scorer, chance), *_] = guide.tellers[0]
    expected = scorer(())
    shares = dict(zip(expected.tokens.tolist(), expected.chances.exp().tolist(), strict=True))
    assert chance == 1 and shares[14] / shares[11] == pytest.approx(0.7 / 0.15)  # half of what the likeliest leaves
    assert shares[16] / shares[11] == pytest.approx(0.25 / 0.15)


def test_the_weight_is_checked() -> None:
    for wrong in (0.5, -0.1):
        with pytest.raises(StrictDataclassClassValidationError, match="goes from 0 to below 0.5"):
            tiny_model(vision_told_weight=wrong)
