"""Where the rows of a batch lie among padded, cached and packed tokens, and at which positions."""

from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch
from transformers.cache_utils import Cache

Where: TypeAlias = slice | torch.Tensor


@dataclass(frozen=True)
class Segment:
    """The tokens of one sequence: a row without its padding, one of several sequences packed into a row, or all rows.

    Attributes:
        rows: rows of the batch; more than one where all lie alike.
        keys: its tokens among all keys, cached ones included.
        queries: its new tokens among the queries.
        first: position of its first token.
        length, new: how many tokens it has, and how many of them, the last ones, are new.
    """

    rows: slice
    keys: Where
    queries: Where
    first: int
    length: int
    new: int


@dataclass(frozen=True)
class RowLayout:
    """Positions and visibility of the keys of one forward.

    Attributes:
        query_positions: `[batch, queries]`.
        key_positions: `[batch, keys]`.
        real: which keys are tokens, BoolTensor `[batch, keys]`.
        sequence: `[batch, keys]`, which of the packed sequences a key belongs to; None where rows are not packed.
        given: a mask `[batch, 1, queries, keys]` in place of what follows from the others, or None.
        past: cached tokens; None where segments can't be told (a given mask, compiled code).
    """

    query_positions: torch.Tensor
    key_positions: torch.Tensor
    real: torch.Tensor
    sequence: torch.Tensor | None = None
    given: torch.Tensor | None = None
    past: int | None = None

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """The sequences that have new tokens."""
        assert self.past is not None
        return _segments(self.key_positions, self.real, self.sequence, self.past, self.query_positions.shape[1])

    def mask(self, scores: torch.Tensor) -> torch.Tensor:
        """`scores` `[batch, heads, queries, keys]` with the lowest number at keys that a query must not see."""
        if self.given is not None and self.given.dtype != torch.bool:
            return scores + self.given
        if self.given is not None:
            seen = self.given
        else:
            seen = self.real[:, None, None] & (
                self.key_positions[:, None, None] <= self.query_positions[:, None, :, None]
            )
            if self.sequence is not None:  # nothing is cached then: queries are keys
                seen = seen & (self.sequence[:, None, None] == self.sequence[:, None, :, None])
        return scores.masked_fill(~seen, torch.finfo(scores.dtype).min)


def row_layout(
    position_ids: torch.Tensor, attention_mask: torch.Tensor | None, past_key_values: Cache | None
) -> RowLayout:
    """The layout of new tokens at `position_ids` `[batch, length]` behind what is cached.

    Args:
        attention_mask: `[batch, cached + length]` or more, 0 at padding; None where all tokens are real; or, with an
            empty cache, one of four dimensions.

    Raises:
        ValueError: `position_ids` do not count the real tokens behind a filled cache, or the mask of four dimensions
            meets one.
    """
    batch, length = position_ids.shape
    compiling = torch.compiler.is_compiling()
    past = past_key_values.get_seq_length() if past_key_values is not None else 0
    keys = past_key_values.get_mask_sizes(length, 0)[0] if past_key_values is not None else length
    empty = not compiling and int(past) == 0
    index = torch.arange(keys, device=position_ids.device)
    if attention_mask is not None and (not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 2):
        if not empty or keys != length or not isinstance(attention_mask, torch.Tensor):
            raise ValueError(
                "long_context: with a filled cache the attention_mask must be [batch, length]; one of another kind "
                "does not tell where the cached tokens stand"
            )
        return RowLayout(position_ids, position_ids, torch.ones_like(position_ids).bool(), given=attention_mask)
    if attention_mask is None:
        real = (index < past + length).expand(batch, -1)
    else:
        short = keys - attention_mask.shape[1]  # a cache of fixed length has more room
        real = torch.nn.functional.pad(attention_mask.bool(), (0, max(short, 0)))[:, :keys] & (index < past + length)
    counted = (real.long().cumsum(-1) - 1).clamp(min=0)
    if compiling:
        return RowLayout(position_ids, counted, real)
    if empty:
        new, sequence = position_ids, None
        if attention_mask is None:
            starts = position_ids.diff(dim=-1, prepend=position_ids[:, :1] - 1) != 1
            sequence = starts.long().cumsum(-1) if bool(starts.any()) else None
        counted = torch.cat((new, counted[:, length:]), dim=-1)
        if sequence is not None:
            sequence = torch.nn.functional.pad(sequence, (0, keys - length), value=-1)
    else:
        sequence = None
        _check_counted(position_ids, counted[:, past : past + length], real[:, past : past + length])
    return RowLayout(position_ids, counted, real, sequence, past=int(past))


def _check_counted(position_ids: torch.Tensor, counted: torch.Tensor, real: torch.Tensor) -> None:
    wrong = ((position_ids != counted) & real).any(-1)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"row {row}: position_ids behind a filled cache must count its real tokens, {counted[row].tolist()}, "
            f"got {position_ids[row].tolist()}"
        )


def _segments(
    positions: torch.Tensor, real: torch.Tensor, sequence: torch.Tensor | None, past: int, length: int
) -> tuple[Segment, ...]:
    alike = bool((real == real[:1]).all()) and bool((positions == positions[:1]).all())
    if sequence is not None:
        alike = alike and bool((sequence == sequence[:1]).all())
    found = []
    for row in range(1 if alike else len(real)):
        rows = slice(None) if alike else slice(row, row + 1)
        groups = (
            [real[row]] if sequence is None else [real[row] & (sequence[row] == i) for i in sequence[row].unique()]
        )
        for group in groups:
            index = group[: past + length].nonzero().squeeze(1)
            new = int((index >= past).sum())
            if new:
                keys, queries = _compact(index), _compact(index[-new:] - past)
                found.append(Segment(rows, keys, queries, int(positions[row, index[0]]), len(index), new))
    return tuple(found)


def _compact(index: torch.Tensor) -> Where:
    """A slice where the indices follow each other: it takes a view, not a copy."""
    first, last = int(index[0]), int(index[-1])
    return slice(first, last + 1) if last - first + 1 == len(index) else index
