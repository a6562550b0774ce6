"""Rotary frequencies are those of transformers, for every scaling, row by row."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import LlamaConfig, Phi3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from mixlora.modeling.configuration_mixlora import MixLoraTextConfig
from mixlora.modeling.rope import RotaryEmbedding, apply_rotary

ORIGINAL, LONGEST = 32, 128
SHAPE = {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": LONGEST}
BASE = {"rope_theta": 1e4}
SCALED = BASE | {"factor": 4.0, "original_max_position_embeddings": ORIGINAL}
SCALINGS = {
    "default": BASE,
    "linear": BASE | {"factor": 4.0},
    "dynamic": BASE | {"factor": 4.0},
    "yarn": SCALED,
    "llama3": SCALED | {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
}


@pytest.mark.parametrize("length", [20, LONGEST + 60])
@pytest.mark.parametrize("kind", SCALINGS)
def test_cos_and_sin_are_those_of_llama(kind, length):
    parameters = SCALINGS[kind] | {"rope_type": kind}
    ours = RotaryEmbedding(MixLoraTextConfig(**SHAPE, rope_parameters=dict(parameters)))
    theirs = LlamaRotaryEmbedding(LlamaConfig(**SHAPE, rope_parameters=dict(parameters)))
    x, positions = torch.zeros(1, length, 64), torch.arange(length)[None]
    for found, wanted in zip(ours(x, positions), theirs(x, positions), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [ORIGINAL, ORIGINAL + 1, LONGEST])
def test_longrope_is_that_of_phi3(length):
    parameters = BASE | {
        "rope_type": "longrope",
        "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
        "long_factor": [1.0, 2.0, 4.0, 7.0, 9.0, 16.0],
        "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": ORIGINAL,
    }
    ours = RotaryEmbedding(MixLoraTextConfig(**SHAPE, rope_parameters=dict(parameters)))
    options = {"original_max_position_embeddings": ORIGINAL, "pad_token_id": 0}
    theirs = Phi3RotaryEmbedding(Phi3Config(**SHAPE, **options, rope_parameters=dict(parameters)))
    x, positions = torch.zeros(1, length, 64), torch.arange(length)[None]
    cos, sin = ours(x, positions)
    assert cos.shape[-1] == 12
    for found, wanted in zip((cos, sin), theirs(x, positions), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_a_row_s_factors_follow_its_own_length(kind):
    parameters = {
        "longrope": SCALED | {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8},
        "dynamic": BASE | {"factor": 4.0},
    }[kind] | {"rope_type": kind}
    rotary = RotaryEmbedding(MixLoraTextConfig(**SHAPE, rope_parameters=parameters))
    limit = rotary.original_length
    lengths = torch.tensor([limit - 9, limit, limit + 1, limit + 30])
    padded = int(lengths.max())
    positions = (torch.arange(padded) - (padded - lengths)[:, None]).clamp(min=0)  # padded on the left
    x = torch.zeros(4, padded, 64)
    cos, _ = rotary(x, positions, lengths)
    for row, length in enumerate(lengths.tolist()):
        alone, _ = rotary(x[:1, :length], torch.arange(length)[None])
        assert torch.equal(cos[row, -length:], alone[0])
    assert torch.equal(cos[0, -9:], rotary(x[:1], positions[:1], lengths[:1])[0][0, -9:])
    assert not torch.allclose(cos[1, -5:], cos[2, -6:-1], atol=1e-3)


def test_announced_length_picks_the_factors():
    parameters = SCALED | {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    rotary = RotaryEmbedding(MixLoraTextConfig(**SHAPE, rope_parameters=parameters))
    x, positions = torch.zeros(1, 8, 64), torch.arange(8)[None]
    short, long = rotary(x, positions)[0], rotary(x, positions, torch.tensor([ORIGINAL + 1]))[0]
    assert not torch.allclose(short, long, atol=1e-2)


def test_partial_rotation_leaves_the_rest():
    x = torch.randn(1, 2, 5, 16, generator=torch.Generator().manual_seed(0))
    angle = torch.full((1, 5, 8), 0.7)
    turned = apply_rotary(x, angle.cos(), angle.sin())
    assert torch.equal(turned[..., 8:], x[..., 8:])
    torch.testing.assert_close(turned[..., :8].norm(dim=-1), x[..., :8].norm(dim=-1))


def longrope_config(**changes) -> MixLoraTextConfig:
    factors = {"short_factor": [1.0] * 8, "long_factor": [float(i) for i in range(2, 10)]}
    return MixLoraTextConfig(**SHAPE, rope_parameters=SCALED | factors | {"rope_type": "longrope"}, **changes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_frequencies_keep_their_bits_in_every_precision(dtype):
    rotary = RotaryEmbedding(longrope_config())
    x, positions = torch.zeros(1, LONGEST, 64), torch.arange(LONGEST)[None]
    wanted = rotary(x, positions)
    for length in (None, torch.tensor([5])):
        wanted = rotary(x, positions, length)
        for found, right in zip(rotary.to(dtype)(x, positions, length), wanted, strict=True):
            assert torch.equal(found, right)


@pytest.mark.parametrize("length", [3, ORIGINAL, ORIGINAL + 1])
def test_fixed_long_takes_the_long_factors_at_every_length(length):
    """Those of Phi-3 for a longer sequence, whatever the row's own length."""
    config = longrope_config(rope_mode="fixed_long")
    options = {"original_max_position_embeddings": ORIGINAL, "pad_token_id": 0}
    theirs = Phi3RotaryEmbedding(Phi3Config(**SHAPE, **options, rope_parameters=dict(config.rope_parameters)))
    x, positions = torch.zeros(1, LONGEST, 64), torch.arange(LONGEST)[None]
    wanted = [each[:, :length] for each in theirs(x, positions)]
    rotary = RotaryEmbedding(config)
    assert not rotary.varies and rotary.room(length) is None
    for found, right in zip(rotary(x[:, :length], positions[:, :length]), wanted, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)
    short = RotaryEmbedding(longrope_config())(x[:, :3], positions[:, :3])[0]
    assert not torch.allclose(short, wanted[0][:, :3], atol=1e-2)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rope_mode": "always_long"}, "rope_mode 'always_long' is not one of"),
        ({"rope_mode": "fixed_long", "rope_parameters": dict(BASE)}, "needs the rope_type 'longrope', got 'default'"),
    ],
)
def test_a_rope_mode_that_does_not_fit_is_refused(changes, message):
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        MixLoraTextConfig(**SHAPE, **changes)
