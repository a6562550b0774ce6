"""Attention of rows that are cut into chunks: made once for a forward, and given to every layer as an argument."""

from typing import Protocol

import torch
from torch import nn
from transformers.cache_utils import Cache

from .chunk_pieces import Piece, dense_piece, pieces, stretch_of
from .configuration_mixlora import MixLoraTextConfig
from .dual_chunk import DualChunk, Rotations
from .rope import RotaryEmbedding, apply_rotary
from .row_layout import RowLayout, Segment, row_layout
from .sparse_prefill import SparsePrefill, Stretch, attend_sparsely

FEW = 16
"""Up to this number of queries, one product with all keys is quicker than one for each part."""


def long_layout(
    config: MixLoraTextConfig,
    position_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    past_key_values: Cache | None,
    always: bool = False,
) -> RowLayout | None:
    """The layout of rows that need [`LongAttention`]; None where all are so short that it changes nothing.

    A first chunk is rotated as a plain row is: its attention, and its bits, are those of the plain decoder.

    Args:
        always: a layout is wanted in any case.
    """
    chunks, sparse = DualChunk.of(config), SparsePrefill.of(config)
    if always:
        return row_layout(position_ids, attention_mask, past_key_values)
    if torch.compiler.is_compiling():
        return None if chunks is None else row_layout(position_ids, attention_mask, past_key_values)
    longest = 0 if chunks is None and sparse is None else int(position_ids.max()) + 1
    if chunks is not None and longest > chunks.step:
        return row_layout(position_ids, attention_mask, past_key_values)
    if sparse is None or longest < sparse.min_length or not may_be_sparse(config, sparse, position_ids.shape[1]):
        return None
    if attention_mask is not None and (not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 2):
        return None  # read densely
    return row_layout(position_ids, attention_mask, past_key_values)


def may_be_sparse(config: MixLoraTextConfig, sparse: SparsePrefill, queries: int) -> bool:
    """Whether so many queries may be read sparsely: not a few, not with gradients, and not by the reference."""
    return queries > 2 * sparse.block_size and config._attn_implementation != "eager" and not torch.is_grad_enabled()


class Probe(Protocol):
    """Sees what each head attends to, to find its budget. All is dense then."""

    spec: SparsePrefill

    def __call__(self, layer: int, head: int, stretch: Stretch, total: torch.Tensor) -> None:
        """`total` `[queries]`: the log-sum-exp over all keys."""


class LongAttention:
    """Dual chunk attention of one forward.

    Args:
        chunks: the sizes; None where rows are not cut.
        layout: where rows lie.
        rotations: of this forward's positions.
        pairwise: compute all scores at once: the reference, which also gives weights and takes any mask.
        sparse: how long prompts are read sparsely; None for densely.
        probe: see [`Probe`].
    """

    def __init__(
        self,
        chunks: DualChunk | None,
        layout: RowLayout,
        rotations: Rotations,
        pairwise: bool,
        sparse: SparsePrefill | None = None,
        probe: Probe | None = None,
    ):
        self.chunks, self.layout, self.rotations, self.sparse, self.probe = chunks, layout, rotations, sparse, probe
        few = layout.query_positions.shape[1] <= FEW
        self.pairwise = pairwise or layout.past is None or (few and chunks is not None)

    @classmethod
    def make(
        cls,
        config: MixLoraTextConfig,
        layout: RowLayout,
        rotary: RotaryEmbedding,
        x: torch.Tensor,
        row_lengths: torch.Tensor | None,
        probe: Probe | None = None,
    ) -> "LongAttention":
        """For new tokens `x` `[batch, length, width]` that lie as `layout` says."""
        chunks = DualChunk.of(config)
        rotations = Rotations.make(chunks, rotary, x, layout.query_positions, row_lengths)
        sparse = SparsePrefill.of(config)
        if sparse is not None and not may_be_sparse(config, sparse, x.shape[1]):
            sparse = None
        return cls(chunks, layout, rotations, config._attn_implementation == "eager", sparse, probe)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        dropout: float = 0.0,
        layer: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Output `[batch, queries, heads, dim]`, and the weights where all scores are computed at once.

        Args:
            query: `[batch, heads, queries, dim]`, not rotated.
            key, value: `[batch, key_value_heads, keys, dim]`, cached ones first, keys rotated at their place within
                their chunk.
        """
        if self.rotations.sharpness is not None:
            query = (query * self.rotations.sharpness[:, None, :, None]).to(query.dtype)
        if self.pairwise or dropout:
            return self._all_pairs(query, key, value, scale, dropout)
        output = query.new_zeros(query.shape)
        for segment in self.layout.segments:
            for rows, queries, part in self._segment(segment, query, key, value, scale, layer):
                output[rows, :, queries] = part
        return output.transpose(1, 2), None

    def _all_pairs(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, dropout: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        groups, turned = query.shape[1] // key.shape[1], [self.rotations.intra]
        if self.chunks is not None:
            turned += [self.rotations.successive, self.rotations.inter]
        # All heads of a group, under each rotation, meet their keys in one product: the cache is read once.
        queries = torch.stack([apply_rotary(query, *each).unflatten(1, (-1, groups)) for each in turned], dim=2)
        products = queries.flatten(2, 4) @ key.transpose(-1, -2)
        by_rotation = products.unflatten(2, (len(turned), groups, -1)).unbind(2)
        scores, *older = (each.flatten(1, 2) for each in by_rotation)
        if self.chunks is not None:
            step = self.chunks.step
            own = self.layout.query_positions[:, None, :, None] // step
            apart = own - self.layout.key_positions[:, None, None] // step
            scores = scores.where(apart == 0, older[0].where(apart == 1, older[1]))
        scores = self.layout.mask(scores * scale)
        # In fp32 at least. The lowest number, not -inf, keeps rows of padding finite.
        weights = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
        weights = nn.functional.dropout(weights, p=dropout)
        mixed = weights.unflatten(1, (-1, groups)).flatten(2, 3) @ value
        return mixed.unflatten(2, (groups, -1)).flatten(1, 2).transpose(1, 2).contiguous(), weights

    def _segment(
        self, segment: Segment, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, layer: int
    ) -> list[tuple[slice, torch.Tensor | slice, torch.Tensor]]:
        """For each piece its rows, its queries and its output `[rows, heads, queries, dim]`."""
        key, value = key[segment.rows, :, segment.keys], value[segment.rows, :, segment.keys]
        cached = segment.length - segment.new
        found = []
        spec = self.sparse if self.probe is None else self.probe.spec
        if spec is not None and segment.length < spec.min_length:
            spec = None
        step, longest = None if self.chunks is None else self.chunks.step, None if spec is None else spec.segment
        for piece in pieces(segment, step, longest):
            where = _within(segment.queries, slice(piece.first - cached, piece.last - cached))
            mine = self._turned(piece, segment.rows, where, query[segment.rows, :, where])
            if spec is None or self.probe is not None:
                output, total = dense_piece(piece, mine, key, value, scale)
                if spec is not None and self.probe is not None:
                    self._show(self.probe, layer, piece, mine, key, value, scale, total)
            else:
                output = self._sparse_piece(spec, layer, piece, mine, key, value, scale)
            found.append((segment.rows, where, output))
        return found

    def _turned(
        self, piece: Piece, rows: slice, where: torch.Tensor | slice, query: torch.Tensor
    ) -> list[torch.Tensor]:
        """The queries `[rows, heads, queries, dim]` as they meet each region of a piece."""
        return [apply_rotary(query, *self.rotation(region.kind, rows, where)) for region in piece.regions]

    def _sparse_piece(
        self,
        spec: SparsePrefill,
        layer: int,
        piece: Piece,
        queries: list[torch.Tensor],
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """As [`dense_piece`], each head of each row by its budget."""
        output = torch.empty_like(queries[0])
        for head, budget in enumerate(spec.budgets[layer]):
            if budget is None:
                shared = slice(head * key.shape[1] // output.shape[1], head * key.shape[1] // output.shape[1] + 1)
                mine = [query[:, head : head + 1] for query in queries]
                output[:, head : head + 1] = dense_piece(piece, mine, key[:, shared], value[:, shared], scale)[0]
                continue
            for row in range(len(output)):
                stretch = stretch_of(piece, queries, key, value, scale, row, head)
                output[row, head] = attend_sparsely(stretch, budget, spec)[0][0]
        return output

    def _show(
        self,
        probe: Probe,
        layer: int,
        piece: Piece,
        queries: list[torch.Tensor],
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        total: torch.Tensor,
    ) -> None:
        for row, heads in enumerate(total):
            for head, mine in enumerate(heads):
                probe(layer, head, stretch_of(piece, queries, key, value, scale, row, head), mine)

    def rotation(self, kind: str, rows: slice, where: torch.Tensor | slice) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin `[rows, queries or 1, rotary_dim]` with which queries meet the keys of a region."""
        cos, sin = getattr(self.rotations, kind)
        where = slice(None) if kind == "inter" else where
        return cos[rows, where], sin[rows, where]


def _within(whole: torch.Tensor | slice, part: slice) -> torch.Tensor | slice:
    """The `part` of a slice or of indices."""
    if isinstance(whole, slice):
        return slice(whole.start + part.start, whole.start + part.stop)
    return whole[part]
