"""Attention of rows that are cut into chunks: made once for a forward, and given to every layer as an argument."""

from typing import Protocol

import torch
from torch import nn
from transformers.cache_utils import Cache

from .chunk_pieces import Piece, dense_piece, pieces, stretches_of
from .configuration_mixlora import MixLoraTextConfig
from .dual_chunk import DualChunk, Rotations
from .rope import RotaryEmbedding, apply_rotary
from .row_layout import RowLayout, Segment, row_layout
from .sparse_parts import Stretch
from .sparse_prefill import SparsePrefill, attend_sparsely

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

    def __call__(self, layer: int, head: int, stretches: list[Stretch], total: torch.Tensor) -> None:
        """`total` `[queries]`: the log-sum-exp of all queries of these stretches over all keys."""


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
        for group in pieces(segment, step, longest):
            where = [_within(segment.queries, slice(piece.first - cached, piece.last - cached)) for piece in group]
            mine = (
                self._turned(piece, segment.rows, at, query[segment.rows, :, at])
                for piece, at in zip(group, where, strict=True)
            )
            if spec is None:  # one piece after the other: a group may be the whole prompt
                outputs = [
                    dense_piece(piece, each, key, value, scale)[0] for piece, each in zip(group, mine, strict=True)
                ]
            elif self.probe is not None:
                outputs = self._probed(self.probe, layer, group, list(mine), key, value, scale)
            else:
                outputs = self._sparse(spec, layer, group, list(mine), key, value, scale)
            found += [(segment.rows, at, output) for at, output in zip(where, outputs, strict=True)]
        return found

    def _turned(
        self, piece: Piece, rows: slice, where: torch.Tensor | slice, query: torch.Tensor
    ) -> list[torch.Tensor]:
        """The queries `[rows, heads, queries, dim]` as they meet each region of a piece."""
        return [apply_rotary(query, *self.rotation(region.kind, rows, where)) for region in piece.regions]

    def _sparse(
        self,
        spec: SparsePrefill,
        layer: int,
        group: list[Piece],
        queries: list[list[torch.Tensor]],
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
    ) -> list[torch.Tensor]:
        """The output of each piece of a group, as of [`dense_piece`], each head of each row by its budget."""
        outputs = [torch.empty_like(each[0]) for each in queries]
        for head, budget in enumerate(spec.budgets[layer]):
            if budget is None:
                at = head * key.shape[1] // outputs[0].shape[1]
                shared = slice(at, at + 1)
                for output, piece, each in zip(outputs, group, queries, strict=True):
                    mine = [query[:, head : head + 1] for query in each]
                    output[:, head : head + 1] = dense_piece(piece, mine, key[:, shared], value[:, shared], scale)[0]
                continue
            for row in range(len(key)):
                stretches = stretches_of(group, queries, key, value, scale, row, head)
                whole = attend_sparsely(stretches, budget, spec)[0][0]
                for output, part in zip(outputs, whole.split([each.length for each in stretches]), strict=True):
                    output[row, head] = part
        return outputs

    def _probed(
        self,
        probe: Probe,
        layer: int,
        group: list[Piece],
        queries: list[list[torch.Tensor]],
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
    ) -> list[torch.Tensor]:
        """The output of each piece of a group, all dense, and what each head attends to shown to the probe."""
        found = [dense_piece(piece, each, key, value, scale) for piece, each in zip(group, queries, strict=True)]
        totals = torch.cat([total for _, total in found], dim=2)
        for row, heads in enumerate(totals):
            for head, total in enumerate(heads):
                probe(layer, head, stretches_of(group, queries, key, value, scale, row, head), total)
        return [output for output, _ in found]

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
