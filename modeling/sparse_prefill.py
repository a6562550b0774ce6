"""Sparse prefill: a head of a long prompt reads a few columns and diagonals of its attention (MInference, 2407.02490).

Most of what a head looks at in a long prompt are some keys that every query looks at (columns, "vertical") and keys at
some distances ("slash", diagonals). Which ones is told by the last queries of each segment of the prompt, whose
attention is computed exactly. How many is a budget of the head, found by [`calibrate`] of `sparse_budgets`. A segment
may lie in several chunks of dual chunk attention: its stretches read the same keys, each under its own rotations.

Diagonals are blocks of keys at the distance of so many blocks; columns are single keys. Each is a part of the
attention, dense inside, so that the work goes with the budget on any device, and nothing but columns is copied.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .configuration_mixlora import MixLoraTextConfig
from .partial_attention import Partial, merge
from .sparse_flex import attend_by_flex, goes_by_flex
from .sparse_parts import Stretch, blocked, column_parts, diagonal_parts, own_blocks

Budget = tuple[int, int]
"""Columns, and diagonals of blocks, the queries' own block among them."""


NOTHING = -80.0
"""What scores below the largest count as, at least: exponentials of lower ones are denormal, which is slow."""


@dataclass(frozen=True)
class SparsePrefill:
    """A decoder's `config.sparse_prefill`.

    Attributes:
        min_length: shorter rows are read densely.
        block_size: queries that read the same keys, and keys of a diagonal.
        segment: queries for which keys are chosen anew.
        sinks: first keys of a row that are always read.
        budgets: for each layer, for each head `(columns, diagonals)`, or None for a dense head.
    """

    min_length: int
    block_size: int
    segment: int
    sinks: int
    budgets: tuple[tuple[Budget | None, ...], ...] = ()

    @classmethod
    def of(cls, config: MixLoraTextConfig) -> "SparsePrefill | None":
        """The decoder's settings, or None where it has none."""
        spec = config.sparse_prefill
        if spec is None:
            return None
        budgets = tuple(tuple(None if each is None else tuple(each) for each in layer) for layer in spec["budgets"])
        return cls(spec["min_length"], spec["block_size"], spec["segment"], spec["sinks"], budgets)


def sparse_blocks(queries: int, block: int) -> int:
    """How many blocks of a segment are read sparsely: all but one or two at its end, whose attention is exact."""
    return max(queries // block - 1, 0)


def exact(stretch: Stretch, start: int, end: int, block: int) -> tuple[Partial, torch.Tensor]:
    """The attention of the queries from `start` on: output, log-sum-exp, and how much each key was looked at.

    Args:
        end: index of the key of the first query that tells which keys are read.

    Returns:
        the last are sums of weights `[2, last]`: over all queries from `end` on, and over `block` of them alone.
    """
    last = stretch.last
    wide = torch.promote_types(stretch.key.dtype, torch.float32)
    scores = stretch.key.new_empty(stretch.length - start, last, dtype=wide)
    for low, high, query in stretch.queries:
        high = min(high, last)
        scores[:, low:high] = (query[start:] * stretch.scale) @ stretch.key[low:high].T
    own = scores[:, stretch.first + start :]
    later = torch.ones_like(own, dtype=torch.bool).triu(1)
    own.masked_fill_(later, -torch.inf)
    # Few passes over the scores, in place: they are most of the cost of a head that reads little.
    most = scores.amax(-1, keepdim=True)
    weights = scores.sub_(most).clamp_(min=NOTHING).exp_()
    own.masked_fill_(later, 0)
    norm = weights.sum(-1, keepdim=True)
    output = (weights.to(stretch.value.dtype) @ stretch.value[:last]) / norm
    at = torch.arange(stretch.first + start, last, device=scores.device)
    tells = torch.stack((at >= end, (at >= end) & (at < end + block)))
    return (output.to(stretch.value.dtype), (most + norm.log())[:, 0]), (tells / norm.T) @ weights


def choose(
    looked: torch.Tensor, end: int, block: int, budget: Budget, forced: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns and diagonals that are looked at most at the end of a segment.

    Args:
        looked: `[2, keys]`, as [`exact`] gives it.
        end: as there.
        forced: first keys that are read in any case.

    Returns:
        indices of columns, in order; and BoolTensor over distances in blocks, True where that diagonal is read.
    """
    columns = looked[0, :end].clone()
    columns[:forced] = torch.inf
    count = min(budget[0] + forced, len(columns))
    # What a column weighs must not make the block around it a diagonal.
    far = columns[: max(len(columns) - block, 0)]
    rest = looked[1].index_fill(0, far.topk(min(count, len(far))).indices, 0)
    mass = rest[end % block : end + block].unflatten(0, (-1, block)).sum(1).flip(0)  # by distance
    mass[1:2] = torch.finfo(mass.dtype).max  # the neighbour of its own block
    mass[0] = torch.inf
    diagonals = torch.zeros(len(mass) + 1, dtype=torch.bool, device=looked.device)
    diagonals[mass.topk(min(budget[1], len(mass))).indices] = True
    at = torch.arange(len(columns), device=looked.device)
    apart = -(at - end).div(block, rounding_mode="floor")
    read = diagonals[apart.clamp(max=len(mass))] & (at >= forced)  # by a diagonal
    chosen = columns.masked_fill(read, -1).topk(count).indices
    return chosen.sort().values, diagonals


def attend_sparsely(stretches: Sequence[Stretch], budget: Budget, spec: SparsePrefill) -> tuple[Partial, int]:
    """Attention of a segment over the keys that its budget allows.

    Args:
        stretches: the segment's, one behind the other. The end of the last one chooses the keys of all.

    Returns:
        output `[queries, dim]`, log-sum-exp `[queries]`; and the number of scores that were computed.
    """
    block, first, last = spec.block_size, stretches[0].first, stretches[-1].last
    end = first + sparse_blocks(last - first, block) * block
    blocks = [max(min(each.last, end) - each.first, 0) // block for each in stretches]
    wide = torch.promote_types(stretches[-1].key.dtype, torch.float32)
    looked, pairs = stretches[-1].key.new_zeros(2, last, dtype=wide), 0
    tails: list[Partial | None] = []
    for each, count in zip(stretches, blocks, strict=True):
        if count * block == each.length:
            tails.append(None)
            continue
        tail, weights = exact(each, count * block, end, block)
        looked[:, : each.last] += weights
        tails.append(tail)
        pairs += (each.length - count * block) * each.last
    found: list[Partial] = []
    if any(blocks):
        # Keys before the first whole block, counted from the queries, are in no diagonal.
        before = [each.first % block for each, count in zip(stretches, blocks, strict=True) if count]
        columns, diagonals = choose(looked, end, block, budget, max(spec.sinks, *before))
    for each, count, tail in zip(stretches, blocks, tails, strict=True):
        if count:
            part, computed = sparse_start(each, columns[columns < each.last], diagonals, count, block)
            found.append(part)
            pairs += computed
        if tail is not None:
            found.append(tail)
    output, total = zip(*found, strict=True)
    return (torch.cat(output), torch.cat(total)), pairs


def sparse_start(
    stretch: Stretch, columns: torch.Tensor, diagonals: torch.Tensor, blocks: int, block: int
) -> tuple[Partial, int]:
    """Attention of the first `blocks` blocks of queries over keys that were chosen; returns as [`attend_sparsely`]."""
    if goes_by_flex(stretch, block):
        return attend_by_flex(stretch, columns, diagonals, blocks, block)
    parts, pairs = [own_blocks(stretch, blocks, block)], blocks * block**2
    for low, high, query in stretch.queries:
        region, mine = (low, min(high, stretch.last)), blocked(query, blocks, block)
        inside = columns[(columns >= low) & (columns < high)]
        for part, computed in (
            *column_parts(stretch, mine, inside, diagonals),
            *diagonal_parts(stretch, mine, diagonals, region),
        ):
            parts.append(part)
            pairs += computed
    output, total = merge(parts)
    return (output.flatten(0, 2), total.flatten()), pairs
