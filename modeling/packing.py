"""Rows of different lengths without their padding: layers see real tokens only, attention each row by itself.

A packed batch is `[tokens, 1, size]`: to a layer each token is a row of length one, so that a route over tokens is a
route like any other. Rows lie in order of their length, whatever their adapters are: what the base gives for a row
does not depend on the route.

In training, rows that no gradient flows through are packed apart from the others. The last layer gives only those
tokens that are looked at: of its keys and values all are needed, of all else these alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .configuration_mixlora import MixLoraTextConfig
from .routed_lora import Route, runs_of

SAVED = 64
"""Tokens of padding in a batch, and the share of it, from which on packing is worth its while."""
SHARE = 0.08
FEW = 0.75
"""Share of the tokens up to which on the last layer is spared those that nobody looks at."""
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
        learns: whether gradients may flow through them.
    """

    shape: tuple[int, int]
    index: torch.Tensor
    rows: tuple[int, ...]
    lengths: tuple[int, ...]
    learns: bool = True

    @classmethod
    def of(cls, attention_mask: torch.Tensor) -> "Packing | None":
        """For a mask `[batch, length]`, None where there is too little padding to gain from."""
        batch, length = attention_mask.shape
        counts = attention_mask.bool().sum(-1).tolist()
        saved = batch * length - sum(counts)
        if saved < max(SAVED, SHARE * batch * length) or min(counts) == 0:
            return None
        return cls.of_rows(attention_mask, list(range(batch)))

    @classmethod
    def of_rows(cls, attention_mask: torch.Tensor, rows: list[int], learns: bool = True) -> "Packing":
        """For some rows of a mask `[batch, length]`, whether or not that gains anything."""
        batch, length = attention_mask.shape
        real = attention_mask.bool()
        counts = real.sum(-1).tolist()
        rows = sorted(rows, key=counts.__getitem__)
        places = torch.arange(batch * length, device=real.device).view(batch, length)
        index = torch.cat([places[row][real[row]] for row in rows])
        return cls((batch, length), index, tuple(rows), tuple(counts[row] for row in rows), learns)

    def kept(self, wanted: torch.Tensor | None, route: Route) -> "Kept | None":
        """The tokens that are wanted, BoolTensor `[batch, length]`; None where these are most of all."""
        if wanted is None:
            return None
        chosen = wanted.to(self.index.device).flatten()[self.index]
        places = chosen.nonzero().squeeze(1)
        if len(places) > FEW * len(chosen):
            return None
        counts = tuple(int(row.sum()) for row in chosen.split(self.lengths))
        packing = replace(self, index=self.index[places], lengths=counts)
        return Kept(places, packing, packing.route(route))

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
            runs = runs_of(sorted(place[row] for row in mine if row in place))
            if mine and not runs:
                continue  # its rows are packed elsewhere
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


@dataclass(frozen=True)
class Kept:
    """Tokens of a packed batch that its last layer gives.

    Attributes:
        places: LongTensor `[kept]`, where they lie among the packed tokens.
        packing: where they go in the padded batch; a row may have none.
        route: the route of these tokens.
    """

    places: torch.Tensor
    packing: Packing
    route: Route

    def attend(
        self,
        attention: Callable[..., tuple[torch.Tensor, Any]],
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        lengths: tuple[int, ...],
    ) -> torch.Tensor:
        """Each row by itself, its kept tokens to all of it that are not behind them.

        Args:
            attention: takes query, key and value `[1, heads, length, dim]` and a mask `[1, 1, queries, keys]`.
            query: `[kept, heads, 1, dim]`; key, value: `[tokens, heads, 1, dim]`.
            lengths: all tokens of each row.

        Returns:
            `[kept, 1, heads, dim]`.
        """
        found, start, counts = [], 0, self.packing.lengths
        for mine, places, length in zip(query.split(counts), self.places.split(counts), lengths, strict=True):
            if len(mine):
                mask = torch.arange(start, start + length, device=places.device) <= places[:, None]
                states = (x[:, :, 0].transpose(0, 1)[None] for x in
                          (mine, key[start : start + length], value[start : start + length]))  # fmt: skip
                found.append(attention(*states, mask[None, None])[0].flatten(0, 1))
            start += length
        return torch.cat(found).unsqueeze(1) if found else query.transpose(1, 2)


def unpack_all(packings: Sequence[Packing], states: Sequence[torch.Tensor]) -> torch.Tensor:
    """Packed states `[tokens, 1, ...]` of several packings of one batch as `[batch, length, ...]`, else zeros."""
    index = torch.cat([packing.index for packing in packings])
    return replace(packings[0], index=index).unpack(torch.cat(list(states)))


def packing_of(
    config: MixLoraTextConfig,
    attention_mask: Any,
    length: int,
    past: int,
    route: Route,
    still: Sequence[bool] | None = None,
) -> tuple[Packing, ...]:
    """How to pack the rows of a forward; nothing where they are read padded.

    That is so where nothing would be gained; behind a filled cache; with a mask of another kind, a backend that needs
    a mask, a sliding window that is shorter than a row; in compiled code; where experts count their tokens; and
    where the base keeps its bits, see [`Route`].

    Args:
        still: for each row whether no gradient flows through it; such rows are packed apart, if there are others.
    """
    if (
        length == 1
        or past
        or not route.quick
        or torch.compiler.is_compiling()
        or route.masks
        or route.usage is not None
    ):
        return ()
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 2 or attention_mask.shape[1] != length:
        return ()
    window = config.sliding_window
    if config._attn_implementation not in BACKENDS or (window is not None and window < length):
        return ()
    if still is not None and any(still) and not all(still) and bool(attention_mask.any(-1).all()):
        moving, resting = ([i for i, each in enumerate(still) if each is which] for which in (False, True))
        return Packing.of_rows(attention_mask, moving), Packing.of_rows(attention_mask, resting, learns=False)
    packing = Packing.of(attention_mask)
    return () if packing is None else (packing,)
