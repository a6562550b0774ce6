"""Sparse prefill: a head of a long prompt reads a few columns and diagonals of its attention (MInference, 2407.02490).

Most of what a head looks at in a long prompt are some keys that every query looks at (columns, "vertical") and keys at
some distances ("slash", diagonals). Which ones is told by the last queries of each stretch of the prompt, whose
attention is computed exactly. How many is a budget of the head, found by [`calibrate`] of `sparse_budgets`.

Diagonals are blocks of keys at the distance of so many blocks; columns are single keys. Each is a part of the
attention, dense inside, so that the work goes with the budget on any device, and nothing but columns is copied.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from .configuration_mixlora import MixLoraTextConfig
from .partial_attention import Partial, attend_part, merge
from .sparse_flex import attend_by_flex, goes_by_flex

Budget = tuple[int, int]
"""Columns, and diagonals of blocks, the queries' own block among them."""


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


@dataclass(frozen=True)
class Stretch:
    """Queries of one head, and the keys `[0, last)` that they may see.

    Attributes:
        queries: for each region of the keys `(first, last, rotated queries [queries, dim])`; the last region ends with
            the queries' own keys.
        key, value: `[keys, dim]`.
        first: index of the first query's own key.
        scale: factor of the scores.
    """

    queries: tuple[tuple[int, int, torch.Tensor], ...]
    key: torch.Tensor
    value: torch.Tensor
    first: int
    scale: float

    @property
    def length(self) -> int:
        """The number of queries."""
        return len(self.queries[0][2])

    @property
    def last(self) -> int:
        """The end of the keys."""
        return self.first + self.length


def sparse_blocks(queries: int, block: int) -> int:
    """How many blocks of a stretch are read sparsely: all but one or two at its end, whose attention is exact."""
    return max(queries // block - 1, 0)


def exact_end(stretch: Stretch, blocks: int, block: int) -> tuple[Partial, torch.Tensor]:
    """The attention of the queries behind the sparse blocks: output, log-sum-exp, and how much each key was looked at.

    Returns:
        the last are sums of weights `[2, last]`: over all these queries, and over the first `block` of them alone.
    """
    start, last = blocks * block, stretch.last
    wide = torch.promote_types(stretch.key.dtype, torch.float32)
    scores = stretch.key.new_empty(stretch.length - start, last, dtype=wide)
    for low, high, query in stretch.queries:
        high = min(high, last)
        scores[:, low:high] = (query[start:] * stretch.scale) @ stretch.key[low:high].T
    own = scores[:, stretch.first + start :]
    own.masked_fill_(torch.ones_like(own, dtype=torch.bool).triu(1), -torch.inf)
    # Few passes over the scores, in place: they are most of the cost of a head that reads little.
    most = scores.amax(-1, keepdim=True)
    weights = scores.sub_(most).exp_()
    norm = weights.sum(-1, keepdim=True)
    output = (weights.to(stretch.value.dtype) @ stretch.value[:last]) / norm
    share = (1 / norm).T.repeat(2, 1)
    share[1, block:] = 0
    return (output.to(stretch.value.dtype), (most + norm.log())[:, 0]), share @ weights


def choose(
    looked: torch.Tensor, stretch: Stretch, blocks: int, block: int, budget: Budget, sinks: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns and diagonals that are looked at most at the end of a stretch.

    Args:
        looked: `[2, keys]`, as [`exact_end`] gives it.

    Returns:
        indices of columns, in order; and BoolTensor over distances in blocks, True where that diagonal is read.
    """
    before = stretch.first % block  # keys before the first whole block, counted from the queries
    forced = max(sinks, before)
    columns = looked[0, : stretch.first + blocks * block].clone()
    columns[:forced] = torch.inf
    count = min(budget[0] + forced, len(columns))
    # What a column weighs must not make the block around it a diagonal.
    far = columns[: max(len(columns) - block, 0)]
    rest = looked[1].index_fill(0, far.topk(min(count, len(far))).indices, 0)
    grid = rest[before : stretch.first + (blocks + 1) * block]
    mass = grid.unflatten(0, (-1, block)).sum(1).flip(0)  # by distance
    mass[1:2] = torch.finfo(mass.dtype).max  # the neighbour of its own block
    mass[0] = torch.inf
    diagonals = torch.zeros(len(mass) + 1, dtype=torch.bool, device=looked.device)
    diagonals[mass.topk(min(budget[1], len(mass))).indices] = True
    at = torch.arange(len(columns), device=looked.device)
    apart = blocks - (at - stretch.first).div(block, rounding_mode="floor")
    read = diagonals[apart.clamp(max=len(mass))] & (at >= forced)  # by a diagonal
    chosen = columns.masked_fill(read, -1).topk(count).indices
    return chosen.sort().values, diagonals


def attend_sparsely(stretch: Stretch, budget: Budget, spec: SparsePrefill) -> tuple[Partial, int]:
    """Attention of a stretch over the keys that its budget allows.

    Returns:
        output `[queries, dim]`, log-sum-exp `[queries]`; and the number of scores that were computed.
    """
    block = spec.block_size
    blocks = sparse_blocks(stretch.length, block)
    (output, total), looked = exact_end(stretch, blocks, block)
    pairs = len(output) * stretch.last
    if not blocks:
        return (output, total), pairs
    columns, diagonals = choose(looked, stretch, blocks, block, budget, spec.sinks)
    if goes_by_flex(stretch, block):
        (start, until), computed = attend_by_flex(stretch, columns, diagonals, blocks, block)
        return (torch.cat((start, output)), torch.cat((until, total))), pairs + computed
    parts = [_own_blocks(stretch, blocks, block)]
    pairs += blocks * block**2
    for low, high, query in stretch.queries:
        region, mine = (low, min(high, stretch.last)), _blocked(query, blocks, block)
        inside = columns[(columns >= low) & (columns < high)]
        for part, computed in (
            *_columns(stretch, mine, inside, diagonals),
            *_diagonals(stretch, mine, diagonals, region),
        ):
            parts.append(part)
            pairs += computed
    sparse = merge(parts)
    return (torch.cat((sparse[0].flatten(0, 2), output)), torch.cat((sparse[1].flatten(), total))), pairs


def _blocked(x: torch.Tensor, blocks: int, block: int) -> torch.Tensor:
    """`[queries, ...]` -> `[blocks, 1, block, ...]`, without the end."""
    return x[: blocks * block].unflatten(0, (blocks, 1, block))


def _own_blocks(stretch: Stretch, blocks: int, block: int) -> Partial:
    """Attention of each block of queries over its own keys."""
    key, value = (_blocked(each[stretch.first :], blocks, block) for each in (stretch.key, stretch.value))
    return attend_part(_blocked(stretch.queries[-1][2], blocks, block), key, value, stretch.scale, causal=True)


def _columns(
    stretch: Stretch, query: torch.Tensor, columns: torch.Tensor, diagonals: torch.Tensor
) -> Iterator[tuple[Partial, int]]:
    """Attention of `query` `[blocks, 1, block, dim]` over columns, as parts with the number of their scores.

    A block does not read columns that it reads by a diagonal, nor those of its own keys and of later ones.
    """
    blocks, _, block, _ = query.shape
    number = torch.arange(blocks, device=columns.device)[:, None]
    apart = number - (columns - stretch.first).div(block, rounding_mode="floor")
    by_diagonal = diagonals[apart.clamp(0, len(diagonals) - 1)] & (columns >= stretch.first % block)
    seen = (apart >= 1) & ~by_diagonal
    by_all = seen.all(0)
    if bool(by_all.any()):
        key, value = (each[columns[by_all]][None, None] for each in (stretch.key, stretch.value))
        output, total = attend_part(query.flatten(0, 2)[None, None], key, value, stretch.scale)
        yield (
            (_blocked(output[0, 0], blocks, block), _blocked(total[0, 0], blocks, block)),
            query[..., 0].numel() * len(key[0, 0]),
        )
    by_some = seen.any(0) & ~by_all
    if bool(by_some.any()):
        key, value = (each[columns[by_some]].expand(blocks, 1, -1, -1) for each in (stretch.key, stretch.value))
        hidden = ~seen[:, by_some]
        nothing = hidden.all(1)
        hidden = hidden & ~nothing[:, None]  # such a block sees all here, and counts for nothing below
        mask = torch.zeros(hidden.shape, dtype=query.dtype, device=query.device).masked_fill(hidden, -torch.inf)
        output, total = attend_part(query, key, value, stretch.scale, mask=mask[:, None, None])
        yield (output, total.masked_fill(nothing[:, None, None], -torch.inf)), hidden.numel() * block


def runs(distances: list[int]) -> list[tuple[int, int]]:
    """First and last of each stretch of numbers that follow each other."""
    found: list[tuple[int, int]] = []
    for each in distances:
        if found and found[-1][1] == each - 1:
            found[-1] = (found[-1][0], each)
        else:
            found.append((each, each))
    return found


def _diagonals(
    stretch: Stretch, query: torch.Tensor, diagonals: torch.Tensor, region: tuple[int, int]
) -> Iterator[tuple[Partial, int]]:
    """Attention of `query` `[blocks, 1, block, dim]` over diagonals but its own blocks, as parts; see [`_columns`].

    The keys that neighbouring diagonals give to the blocks are windows on the row, so they are not copied.
    """
    (low, high), (blocks, _, block, _) = region, query.shape
    chosen = (diagonals[1:].nonzero().squeeze(1) + 1).tolist()
    near = [each for each in chosen if each * block <= stretch.first]
    far = [each for each in chosen if each * block > stretch.first]  # the first blocks have no such keys
    for nearest, farthest in (*runs(near), *((each, each) for each in far)):
        start, width = stretch.first - farthest * block, (farthest - nearest + 1) * block
        since = max(-(start // block), (low - width - start) // block + 1, 0)
        until = min(-((start - high) // block), blocks)
        if since >= until:
            continue
        begin, end = start + since * block, start + (until - 1) * block + width
        key, value = (
            each[begin:end].unfold(0, width, block).transpose(1, 2).unsqueeze(1)
            for each in (stretch.key, stretch.value)
        )
        mask = None
        if begin < low or end > high:
            at = torch.arange(since, until, device=query.device)[:, None] * block + start
            at = at + torch.arange(width, device=query.device)
            mask = torch.zeros(at.shape, dtype=query.dtype, device=query.device)
            mask = mask.masked_fill((at < low) | (at >= high), -torch.inf)[:, None, None]
        output, total = attend_part(query[since:until], key, value, stretch.scale, mask=mask)
        around = (since, blocks - until)
        if any(around):
            output = F.pad(output, (0, 0, 0, 0, 0, 0, *around))
            total = F.pad(total, (0, 0, 0, 0, *around), value=-torch.inf)
        yield (output, total), (until - since) * block * width
