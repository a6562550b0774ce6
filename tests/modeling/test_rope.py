"""Rotary frequencies are those of transformers, for every scaling, row by row."""

import pytest
import torch
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
