"""New tokens cut at the borders of chunks, and the regions of keys that they meet under one rotation each."""

from dataclasses import dataclass

import torch

from .partial_attention import Partial, attend_part, merge
from .row_layout import Segment
from .sparse_parts import Stretch


@dataclass(frozen=True)
class Region:
    """Keys that the queries of a [`Piece`] meet under one rotation: tokens `[first, last)` of the segment."""

    kind: str
    first: int
    last: int


@dataclass(frozen=True)
class Piece:
    """New tokens `[first, last)` of a segment that lie in one chunk, and their regions, the oldest first.

    The last region is their own chunk's, up to the last of them: there a query sees the keys up to itself.
    """

    first: int
    last: int
    regions: tuple[Region, ...]


def pieces(segment: Segment, step: int | None, longest: int | None = None) -> list[list[Piece]]:
    """A segment's new tokens in groups of at most `longest` of them, each cut at the borders of chunks of `step`."""
    groups: list[list[Piece]] = []
    first, until = segment.length - segment.new, segment.length - segment.new
    while first < segment.length:
        if first == until:
            groups.append([])
            until = segment.length if longest is None else min(first + longest, segment.length)
        last, start, before = until, 0, 0
        if step is not None:
            start = (first + segment.first) // step * step - segment.first
            last = min(last, start + step)
            start, before = max(start, 0), max(start - step, 0)
        regions = [Region("inter", 0, before), Region("successive", before, start), Region("intra", start, last)]
        groups[-1].append(Piece(first, last, tuple(region for region in regions if region.last > region.first)))
        first = last
    return groups


def dense_piece(
    piece: Piece, queries: list[torch.Tensor], key: torch.Tensor, value: torch.Tensor, scale: float
) -> Partial:
    """Attention of a piece over the keys of its segment.

    Args:
        queries: for each region, `[rows, heads, queries, dim]`.
        key, value: `[rows, key_value_heads, length, dim]`.
    """
    parts = []
    for region, query in zip(piece.regions, queries, strict=True):
        last = piece.first if region.kind == "intra" else region.last
        if last > region.first:
            old = slice(region.first, last)
            parts.append(attend_part(query, key[:, :, old], value[:, :, old], scale))
        if region.kind == "intra":
            own = slice(piece.first, piece.last)
            parts.append(attend_part(query, key[:, :, own], value[:, :, own], scale, causal=True))
    return merge(parts)


def stretches_of(
    group: list[Piece],
    queries: list[list[torch.Tensor]],
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    row: int,
    head: int,
) -> list[Stretch]:
    """One head of one row of each piece of a group; arguments as in [`dense_piece`], queries for each piece."""
    shared = head * key.shape[1] // queries[0][0].shape[1]
    found = []
    for piece, turned in zip(group, queries, strict=True):
        regions = zip(piece.regions, turned, strict=True)
        mine = tuple((region.first, region.last, query[row, head]) for region, query in regions)
        found.append(Stretch(mine, key[row, shared], value[row, shared], piece.first, scale))
    return found
