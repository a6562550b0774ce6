"""Convolutions over time between the speech tower and its projectors."""

import pytest
import torch

from mixlora import MixLoraForConditionalGeneration
from mixlora.modeling.speech_context import SpeechContext
from tests.modeling.model_fixtures import batch_inputs, make_loud, row_inputs, tiny_config, tiny_model

SIZES = {"layers": 2, "kernel_size": 3, "intermediate_size": 12, "stride": 1}


@pytest.fixture
def context() -> SpeechContext:
    torch.manual_seed(0)
    return make_loud(SpeechContext(6, 8, dropout=0.5, **SIZES)).eval()


@torch.no_grad()
def test_a_clip_is_the_same_alone_and_beside_a_longer_one(context: SpeechContext) -> None:
    clips = [torch.randn(length, 6) for length in (5, 11, 1)]
    for together, clip in zip(context(clips), clips, strict=True):
        assert together.shape == (len(clip), 8)
        torch.testing.assert_close(together, context([clip])[0])
    assert context([]) == []


@torch.no_grad()
def test_a_token_hears_as_many_neighbours_as_kernels_reach(context: SpeechContext) -> None:
    clip = torch.randn(11, 6)
    changed = clip.clone()
    changed[0, 0] += 1  # the norm would take out what is added to the whole token
    different = (context([clip])[0] != context([changed])[0]).any(-1)
    assert different.tolist() == [True] * 3 + [False] * 8  # two layers of a kernel of 3: two neighbours on either side


def test_neighbours_are_joined_behind_the_blocks() -> None:
    context = SpeechContext(6, 8, dropout=0.0, **SIZES | {"stride": 2})
    long, short = context.joined([torch.ones(5, 8), torch.ones(2, 8)])
    assert long.shape == (3, 16) and short.shape == (1, 16)
    assert long[:2].eq(1).all() and long[2, :8].eq(1).all() and not long[2, 8:].any()


def test_dropout_acts_in_training_alone(context: SpeechContext) -> None:
    clip = [torch.randn(5, 6)]
    assert torch.equal(context(clip)[0], context(clip)[0])
    context.train()
    assert not torch.equal(context(clip)[0], context(clip)[0])


@torch.no_grad()
def test_both_projectors_take_what_the_blocks_give() -> None:
    model = tiny_model(speech_context=SIZES)
    inputs = [batch_inputs([row_inputs(kind)]) for kind in ("speech", "both")]
    before = [model(**row).logits for row in inputs]
    for parameter in model.model.speech_context.blocks.parameters():
        parameter.zero_()
    for row, logits in zip(inputs, before, strict=True):
        assert not torch.allclose(model(**row).logits, logits, atol=1e-3)


def test_the_blocks_are_a_group_and_stay_in_eval_while_frozen() -> None:
    model = tiny_model(speech_context=SIZES | {"dropout": 0.5})
    names = model.parameter_groups()["speech_context"]
    assert len(names) == 4 + 2 * 8
    model.requires_grad_(False).train()
    assert not model.model.speech_context.blocks[0].dropout.training
    model.get_parameter(names[0]).requires_grad_(True)
    assert model.train().model.speech_context.blocks[0].dropout.training


def test_it_is_saved_and_loaded(tmp_path) -> None:
    model = tiny_model(speech_context=SIZES)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    row = batch_inputs([row_inputs("speech")])
    assert again.config.speech_context == SIZES | {"dropout": 0.0}
    assert torch.equal(again(**row).logits, model(**row).logits)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"depth": 2}, "unknown depth, expected some of layers"),
        ({"layers": 0}, "layers must be an integer of at least 1, got 0"),
        ({"kernel_size": 4}, "kernel_size must be odd, got 4"),
        ({"dropout": 1}, "dropout must be from 0 to below 1, got 1"),
    ],
)
def test_wrong_settings_are_named(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"speech_context: {message}"):
        tiny_model(speech_context=wrong)


def test_convolutions_begin_as_wide_as_torch_makes_them() -> None:
    torch.manual_seed(0)
    model = MixLoraForConditionalGeneration(tiny_config(speech_context=SIZES))
    for block in model.model.speech_context.blocks:
        assert block.mix.weight.std() > 0.2  # transformers' 0.02 would be lost in a sum of three
