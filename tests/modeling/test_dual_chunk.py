"""Dual chunk attention: the merged parts against every pair computed by itself, and the settings that are refused."""

import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

from mixlora.modeling.configuration_mixlora import MixLoraTextConfig
from mixlora.modeling.dual_chunk import DualChunk, Rotations
from mixlora.modeling.long_attention import FEW, LongAttention
from mixlora.modeling.partial_attention import attend_part, merge, plain_part
from mixlora.modeling.rope import RotaryEmbedding, apply_rotary
from mixlora.modeling.row_layout import row_layout

CHUNK, LOCAL = 12, 4
STEP = CHUNK - LOCAL
HEADS, GROUPS, DIM = 4, 2, 8
SPEC = {"method": "dual_chunk", "chunk_size": CHUNK, "local_size": LOCAL}


def distance(i: int, j: int) -> int:
    """The relative position of query i and key j, as the paper has it."""
    apart = i // STEP - j // STEP
    query = i % STEP if apart == 0 else min(i % STEP + STEP, CHUNK) if apart == 1 else CHUNK
    return query - j % STEP


def turn(x: torch.Tensor, angle: int) -> torch.Tensor:
    """A vector `[dim]` rotated by a position, in complex numbers: dimension n goes with n + dim / 2."""
    theta = 1e4 ** (-torch.arange(DIM // 2, dtype=torch.double) * 2 / DIM)
    turned = torch.complex(*x.chunk(2)) * torch.polar(torch.ones_like(theta), angle * theta)
    return torch.cat((turned.real, turned.imag))


def every_pair(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, temperature: bool) -> torch.Tensor:
    """Attention of one row, pair by pair: `[heads, length, dim]`."""
    output = torch.zeros_like(query)
    for head in range(HEADS):
        shared = head // GROUPS
        for i in range(query.shape[1]):
            sharp = (1 + 0.1 * math.log(max(1, i / CHUNK))) ** 2 if temperature else 1.0
            scores = [
                sharp * float(turn(query[head, i], distance(i, j)) @ key[shared, j]) / DIM**0.5 for j in range(i + 1)
            ]
            output[head, i] = torch.tensor(scores, dtype=torch.double).softmax(0) @ value[shared, : i + 1]
    return output


class Double(RotaryEmbedding):
    """cos and sin in fp64 from the start: ours are computed in fp32, as everywhere."""

    def forward(self, x, position_ids, row_lengths=None):
        theta = 1e4 ** (-torch.arange(DIM // 2, dtype=torch.double) * 2 / DIM)
        angles = (position_ids[..., None] * theta).repeat(1, 1, 2)
        return angles.cos(), angles.sin()


def tensors(length: int, rows: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    shapes = [(rows, HEADS, length, DIM)] + [(rows, HEADS // GROUPS, length, DIM)] * 2
    query, key, value = (torch.randn(shape, generator=generator, dtype=torch.double) for shape in shapes)
    return 2 * query, 2 * key, value


def ours(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    mask: torch.Tensor | None = None,
    pairwise: bool = False,
    temperature: bool = False,
) -> torch.Tensor:
    """`[rows, heads, length, dim]` of rows without a cache."""
    text = MixLoraTextConfig(hidden_size=HEADS * DIM, num_attention_heads=HEADS, rope_parameters=None)
    chunks = DualChunk(CHUNK, LOCAL, temperature)
    rotations = Rotations.make(chunks, Double(text), query, positions, None)
    if temperature:  # in fp64 too
        sharp = (1 + 0.1 * (positions.double() / CHUNK).clamp(min=1).log()) ** 2
        rotations = Rotations(rotations.intra, rotations.successive, rotations.inter, sharp)
    attention = LongAttention(chunks, row_layout(positions, mask, None), rotations, pairwise)
    assert pairwise or not attention.pairwise
    output, _ = attention.attend(query, apply_rotary(key, *rotations.intra), value, DIM**-0.5)
    return output.transpose(1, 2)


@pytest.mark.parametrize("grad", [False, True], ids=["fused", "plain"])
@pytest.mark.parametrize("pairwise", [False, True], ids=["merged", "pairwise"])
@pytest.mark.parametrize("temperature", [False, True])
def test_parts_equal_every_pair(pairwise: bool, temperature: bool, grad: bool) -> None:
    query, key, value = tensors(3 * STEP + 5)
    wanted = every_pair(query[0], key[0], value[0], temperature)
    positions = torch.arange(query.shape[2])[None]
    found = ours(query.requires_grad_(grad), key, value, positions, pairwise=pairwise, temperature=temperature)
    assert (found[0] - wanted).abs().max() < 1e-12


@pytest.mark.parametrize("length", [FEW + 1, STEP * 2 + 1, STEP * 3 - 1, STEP * 3, STEP * 3 + 1])
def test_padded_and_packed_rows_equal_rows_alone(length: int) -> None:
    query, key, value = tensors(length + 6, rows=3)
    wanted = [
        ours(*(each[row : row + 1, :, :length] for each in (query, key, value)), torch.arange(length)[None])
        for row in range(3)
    ]
    moved = [torch.stack([each[0].roll(6, 1), each[1], each[2]]) for each in (query, key, value)]
    mask = torch.ones(3, length + 6, dtype=torch.long)
    mask[0, :6] = mask[1:, length:] = 0
    mask[2, 3:5] = 0  # a hole: what follows it moves up
    mask[2, length : length + 2] = 1
    hole = torch.tensor([*range(3), *range(5, length + 2)])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    third = ours(*(each[2:, :, hole] for each in moved), torch.arange(length)[None])
    for pairwise in (False, True):
        found = ours(*moved, positions, mask, pairwise)
        assert (found[0, :, 6:] - wanted[0]).abs().max() < 1e-12
        assert (found[1, :, :length] - wanted[1]).abs().max() < 1e-12
        assert (found[2, :, hole] - third).abs().max() < 1e-12
        packed = [torch.cat((each[:1, :, :length], each[1:2, :, :length]), dim=2) for each in (query, key, value)]
        found = ours(*packed, torch.arange(length).repeat(2)[None], pairwise=pairwise)
        assert (found - torch.cat(wanted[:2], dim=2)).abs().max() < 1e-12


def test_distances_are_exact_up_to_the_chunk_and_never_beyond() -> None:
    positions = torch.arange(5 * CHUNK)
    chunks = DualChunk(CHUNK, LOCAL)
    for i in positions.tolist():
        for j in range(i + 1):
            assert 0 <= distance(i, j) <= CHUNK
            assert distance(i, j) == i - j or (i > CHUNK and i - j > LOCAL)
    assert chunks.successive(positions).tolist() == [min(i % STEP + STEP, CHUNK) for i in positions.tolist()]


def test_plain_partial_attention_is_the_fused_one() -> None:
    query, key, value = tensors(23)
    mask = torch.zeros(1, 1, 1, 23, dtype=torch.double)
    mask[..., 5:9] = -torch.inf
    for options in ({}, {"causal": True}, {"mask": mask}):
        fused, plain = attend_part(query, key, value, 0.3, **options), plain_part(query, key, value, 0.3, **options)
        for mine, theirs in zip(fused, plain, strict=True):
            assert (mine - theirs).abs().max() < 1e-13
    whole, total = plain_part(query, key, value, 0.3)
    halves = [plain_part(query, key[:, :, part], value[:, :, part], 0.3) for part in (slice(9), slice(9, None))]
    merged, sums = merge(halves)
    assert (merged - whole).abs().max() < 1e-13 and (sums - total).abs().max() < 1e-13


def test_plain_partial_attention_takes_some_queries_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = tensors(23)
    mask = torch.randn(1, 1, 23, 23, dtype=torch.double)
    wanted = [plain_part(query, key, value, 0.3, causal, mask) for causal in (False, True)]
    monkeypatch.setattr("mixlora.modeling.partial_attention.SCORES_AT_ONCE", 23 * HEADS * 5)
    for causal in (False, True):
        for mine, theirs in zip(plain_part(query, key, value, 0.3, causal, mask), wanted[causal], strict=True):
            assert (mine - theirs).abs().max() < 1e-14


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "ring"}, "method 'ring' is not one of"),
        ({"chunk": 8}, r"unknown \['chunk'\]"),
        ({"chunk_size": None}, "chunk_size must be an integer of at least 2, got None"),
        ({"local_size": 0}, "local_size must be an integer of at least 1, got 0"),
        ({"local_size": True}, "local_size must be an integer"),
        ({"local_size": 7}, r"local_size \(7\) must be at most half of chunk_size \(12\)"),
        ({"temperature": 2}, "temperature must be true or false, got 2"),
    ],
)
def test_wrong_settings_are_refused_by_name(change: dict, message: str) -> None:
    with pytest.raises(StrictDataclassError, match=message):
        MixLoraTextConfig(long_context=SPEC | change)


def test_decoders_that_it_does_not_go_with_are_refused() -> None:
    with pytest.raises(StrictDataclassError, match="expected a dict"):
        MixLoraTextConfig(long_context="dual_chunk")
    with pytest.raises(StrictDataclassError, match=r"sliding_window \(8\) is not supported"):
        MixLoraTextConfig(long_context=SPEC, sliding_window=8)
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(StrictDataclassError, match="rope_type 'dynamic' is not supported"):
        MixLoraTextConfig(long_context=SPEC, rope_parameters=rope)
    assert MixLoraTextConfig(long_context=SPEC).long_context == SPEC | {"temperature": False}
