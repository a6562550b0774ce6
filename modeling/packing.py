"""Rows of different lengths without their padding: layers see real tokens only, attention each row by itself.

A packed batch is `[tokens, 1, size]`: to a layer each token is a row of length one, so that a route over tokens is a
route like any other. Rows lie in order of their length, whatever their adapters are: what the base gives for a row
does not depend on the route.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from .configuration_mixlora import MixLoraTextConfig
from .routed_lora import Route, runs_of

SAVED = 64
"""Tokens of padding in a batch, and the share of it, from which on packing is worth its while."""
SHARE = 0.08
BACKENDS = ("sdpa",)
"""Backends that take causality without a mask; flash attention leaves out padding by itself."""


@dataclass(frozen=True)
class Packing:
    """Where the real tokens of a batch go.

    Attributes:
        shape: rows and length of the padded batch.
        index: LongTensor `[tokens]`, their places in the flattened padded batch, row after row, the shortest first.
        rows: the number of each packed row in the batch.
        lengths: of each packed row.
    """

    shape: tuple[int, int]
    index: torch.Tensor
    rows: tuple[int, ...]
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, attention_mask: torch.Tensor) -> "Packing | None":
        """For a mask `[batch, length]`, None where there is too little padding to gain from."""
        batch, length = attention_mask.shape
        real = attention_mask.bool()
        counts = real.sum(-1).tolist()
        saved = batch * length - sum(counts)
        if saved < max(SAVED, SHARE * batch * length) or min(counts) == 0:
            return None
        rows = sorted(range(batch), key=counts.__getitem__)
        places = torch.arange(batch * length, device=real.device).view(batch, length)
        index = torch.cat([places[row][real[row]] for row in rows])
        return cls((batch, length), index, tuple(rows), tuple(counts[row] for row in rows))

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        """`[batch, length, ...]` -> `[tokens, 1, ...]`."""
        return x.flatten(0, 1).index_select(0, self.index).unsqueeze(1)

    def unpack(self, x: torch.Tensor) -> torch.Tensor:
        """`[tokens, 1, ...]` -> `[batch, length, ...]`, zeros at padding."""
        padded = x.new_zeros(self.shape[0] * self.shape[1], *x.shape[2:])
        return padded.index_copy(0, self.index, x.squeeze(1)).unflatten(0, self.shape)

    def route(self, route: Route) -> Route:
        """The route of tokens for one of rows."""
        if not route.rows:
            return route
        starts = [0]
        for length in self.lengths:
            starts.append(starts[-1] + length)
        place = {row: i for i, row in enumerate(self.rows)}
        planned: list[tuple[str, Any]] = []
        for name, where in route.rows:
            if where is None:
                planned.append((name, None))
                continue
            mine = range(where.start, where.stop) if isinstance(where, slice) else where.tolist()
            runs = runs_of(sorted(place[row] for row in mine))
            planned += [(name, slice(starts[run.start], starts[run.stop])) for run in runs]
            if not runs:  # it acts on nothing, so that ranks run alike
                planned.append((name, where))
        return replace(route, rows=tuple(planned))

    def attend(self, attention: Callable[..., tuple[torch.Tensor, Any]], *states: torch.Tensor) -> torch.Tensor:
        """Each row by itself, rows of one length together.

        Args:
            attention: takes query, key and value `[rows, heads, length, dim]`, gives `[rows, length, heads, dim]`.
            states: query, key and value, `[tokens, heads, 1, dim]`.

        Returns:
            `[tokens, 1, heads, dim]`.
        """
        found, start, i = [], 0, 0
        while i < len(self.lengths):
            length, alike = self.lengths[i], self.lengths.count(self.lengths[i])
            stop = start + alike * length
            mine = [x[start:stop, :, 0].unflatten(0, (alike, length)).transpose(1, 2) for x in states]
            found.append(attention(*mine)[0].flatten(0, 1))
            start, i = stop, i + alike
        return torch.cat(found).unsqueeze(1)


def packing_of(config: MixLoraTextConfig, attention_mask: Any, length: int, past: int, route: Route) -> Packing | None:
    """How to pack the rows of a forward; None where they are read padded.

    That is so where nothing would be gained; behind a filled cache; with a mask of another kind, a backend that needs
    a mask, a sliding window that is shorter than a row; in compiled code; where experts count their tokens; and
    where the base keeps its bits, see [`Route`].
    """
    if (
        length == 1
        or past
        or not route.quick
        or torch.compiler.is_compiling()
        or route.masks
        or route.usage is not None
    ):
        return None
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 2 or attention_mask.shape[1] != length:
        return None
    window = config.sliding_window
    if config._attn_implementation not in BACKENDS or (window is not None and window < length):
        return None
    return Packing.of(attention_mask)
