"""The sparse blocks of a stretch by `flex_attention`, for GPUs: one kernel that skips blocks beats many small parts.

The columns are copied to the front, so that they fill blocks of keys; behind them lie the row's own keys, whose blocks
of diagonals are visited and the others skipped.
"""

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from .partial_attention import Partial, merge

if TYPE_CHECKING:
    from .sparse_parts import Stretch

TILE = 128
"""Queries and keys of a kernel's block, at least."""


def goes_by_flex(stretch: "Stretch", block: int) -> bool:
    """Whether a stretch is read by this kernel: on a GPU, with blocks that tiles can be made of."""
    return stretch.key.device.type == "cuda" and (TILE % block == 0 or block % TILE == 0)


def attend_by_flex(
    stretch: "Stretch", columns: torch.Tensor, diagonals: torch.Tensor, blocks: int, block: int
) -> tuple[Partial, int]:
    """Attention of the first `blocks` blocks of queries over columns, diagonals and their own blocks.

    Args:
        columns, diagonals: as `choose` gives them.

    Returns:
        output `[blocks * block, dim]`, log-sum-exp `[blocks * block]`; and the number of scores that are computed.
    """
    parts, pairs = [], 0
    size = max(TILE, block)
    places = key_places(stretch, columns, blocks, block, size)
    held = places.clamp(max=stretch.last - 1)
    key, value = (each[held][None, None] for each in (stretch.key, stretch.value))
    for low, high, query in stretch.queries:
        mask = block_mask(stretch, places, diagonals, blocks, block, (low, high))
        options = {"scale": stretch.scale, "block_mask": mask, "return_aux": AuxRequest(lse=True)}
        output, aux = _kernel(key.device.type)(query[None, None, : blocks * block], key, value, **options)
        parts.append((output[0, 0], aux.lse[0, 0]))
        pairs += int(mask.kv_num_blocks.sum()) * size**2
    return merge(parts), pairs


@cache
def _kernel(device: str) -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=True) if device == "cuda" else flex_attention


def key_places(stretch: "Stretch", columns: torch.Tensor, blocks: int, block: int, size: int) -> torch.Tensor:
    """Which key of the row stands where: columns, then all keys from the first whole block on.

    Each of the two is filled up to whole tiles by `stretch.last`, which is no key.
    """
    every = torch.arange(stretch.first % block, stretch.first + blocks * block, device=columns.device)
    none = columns.new_full((size,), stretch.last)
    return torch.cat([part for each in (columns, every) for part in (each, none[: -len(each) % size])])


def block_mask(
    stretch: "Stretch",
    places: torch.Tensor,
    diagonals: torch.Tensor,
    blocks: int,
    block: int,
    region: tuple[int, int],
) -> BlockMask:
    """Who sees whom among `blocks * block` queries and the keys at `places`, by pairs and by tiles."""
    size, queries, every = max(TILE, block), blocks * block, blocks + stretch.first // block
    front = len(places) - -(-every * block // size) * size  # columns, and what fills them up
    low, high = region
    first, whole, farthest = stretch.first, stretch.first % block, len(diagonals) - 1

    def sees(batch: Any, head: Any, query: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        key = places[place]
        # Counted from the first whole block, so that no number that is divided is negative.
        apart = query // block + first // block - torch.where(key < whole, 0, key - whole) // block
        apart = torch.where(key < whole, farthest, apart)  # before all blocks, and behind no diagonal
        by_diagonal = (apart >= 1) & (key >= whole) & diagonals[apart.clamp(0, farthest)]
        own = (apart == 0) & (key - first <= query)
        seen = torch.where(place < front, (apart >= 1) & ~by_diagonal, own | by_diagonal)
        return seen & (key >= low) & (key < high) & (key < stretch.last)

    number = torch.arange(blocks, device=places.device)[:, None]
    start = torch.arange(every, device=places.device) * block + whole
    apart = number + first // block - torch.arange(every, device=places.device)
    visited = (apart == 0) | ((apart >= 1) & diagonals[apart.clamp(0, farthest)])
    visited = _tiles(visited & (start < high) & (start + block > low), size // block)
    inside = (places[:front] >= low) & (places[:front] < high)
    columns = inside.unflatten(0, (-1, size)).any(-1).expand(len(visited), -1)
    tiles = torch.cat((columns, visited), dim=1)
    order = tiles.int().argsort(dim=-1, descending=True, stable=True).int()
    return BlockMask.from_kv_blocks(
        tiles.sum(-1, dtype=torch.int32)[None, None],
        order[None, None],
        BLOCK_SIZE=size,
        mask_mod=sees,
        seq_lengths=(queries, len(places)),
        compute_q_blocks=False,
    )


def _tiles(visited: torch.Tensor, times: int) -> torch.Tensor:
    """Blocks `[blocks, keys]` as tiles of `times` by `times` blocks, visited where one of them is."""
    rows, columns = (-each % times for each in visited.shape)
    padded = torch.nn.functional.pad(visited, (0, columns, 0, rows))
    return padded.unflatten(0, (-1, times)).unflatten(2, (-1, times)).any(3).any(1)
