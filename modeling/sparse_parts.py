"""The parts that queries read in sparse prefill, each dense inside, in plain torch and its fused kernel."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from .partial_attention import Partial, attend_part


@dataclass(frozen=True)
class Stretch:
    """Queries of one head that lie in one chunk, and the keys `[0, last)` that they may see.

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


def blocked(x: torch.Tensor, blocks: int, block: int) -> torch.Tensor:
    """`[queries, ...]` -> `[blocks, 1, block, ...]`, without the end."""
    return x[: blocks * block].unflatten(0, (blocks, 1, block))


def own_blocks(stretch: Stretch, blocks: int, block: int) -> Partial:
    """Attention of each block of queries over its own keys."""
    key, value = (blocked(each[stretch.first :], blocks, block) for each in (stretch.key, stretch.value))
    return attend_part(blocked(stretch.queries[-1][2], blocks, block), key, value, stretch.scale, causal=True)


def column_parts(
    stretch: Stretch, query: torch.Tensor, columns: torch.Tensor, diagonals: torch.Tensor
) -> Iterator[tuple[Partial, int]]:
    """Attention of `query` `[blocks, 1, block, dim]` over columns, as parts with the number of their scores.

    A block does not read columns that it reads by a diagonal, nor those of its own keys and of later ones.
    """
    if not len(columns):
        return
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
            (blocked(output[0, 0], blocks, block), blocked(total[0, 0], blocks, block)),
            query[..., 0].numel() * len(key[0, 0]),
        )
    by_some = seen.any(0) & ~by_all
    if bool(by_some.any()):
        key, value = (each[columns[by_some]][None, None] for each in (stretch.key, stretch.value))
        hidden = ~seen[:, by_some]
        nothing = hidden.all(1)
        hidden = hidden & ~nothing[:, None]  # such a block sees all here, and counts for nothing below
        mask = torch.zeros(hidden.shape, dtype=query.dtype, device=query.device).masked_fill(hidden, -torch.inf)
        # All blocks together: the kernel is quicker with many queries than with many batches.
        mask = mask.repeat_interleave(block, dim=0)
        output, total = attend_part(query.flatten(0, 2)[None, None], key, value, stretch.scale, mask=mask[None, None])
        total = blocked(total[0, 0], blocks, block).masked_fill(nothing[:, None, None], -torch.inf)
        yield (blocked(output[0, 0], blocks, block), total), hidden.numel() * block


def runs(distances: list[int]) -> list[tuple[int, int]]:
    """First and last of each stretch of numbers that follow each other."""
    found: list[tuple[int, int]] = []
    for each in distances:
        if found and found[-1][1] == each - 1:
            found[-1] = (found[-1][0], each)
        else:
            found.append((each, each))
    return found


def diagonal_parts(
    stretch: Stretch, query: torch.Tensor, diagonals: torch.Tensor, region: tuple[int, int]
) -> Iterator[tuple[Partial, int]]:
    """Attention of `query` `[blocks, 1, block, dim]` over diagonals but its own blocks; see [`column_parts`].

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
