"""Routed LoRA: a frozen linear layer, and for each adapter the rows it acts on.

The route is a value that is made once per forward and passed down as an argument; no hook and no module state says
which adapter acts, so checkpointing, threads, beams and exceptions cannot change it.
"""

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from .dense import dense, plain_weight
from .lora_experts import LoraExperts, Usage
from .routed_function import Pair, RoutedSum, Where, add_pairs, apply_linear

LONG = 16
"""Tokens of a row from which on separate runs of rows are quicker than gathering them by index."""


def runs_of(rows: list[int]) -> list[slice]:
    """Ascending row numbers as runs: `[2, 3, 4, 7]` is `2:5` and `7:8`."""
    starts = [i for i, row in enumerate(rows) if i == 0 or row != rows[i - 1] + 1]
    stops = [*starts[1:], len(rows)] if rows else []
    return [slice(rows[i], rows[j - 1] + 1) for i, j in zip(starts, stops, strict=True)]


@dataclass(frozen=True)
class Route:
    """For each adapter that a batch needs, the rows it acts on.

    Attributes:
        rows: `(adapter name, rows)`: a slice where they follow each other, else a LongTensor of indices, or None for
            every row of the batch. An adapter may come several times, with rows of its own each time.
        masks: `(adapter name, BoolTensor [batch, 1, 1])`, the form made of tensor operations alone, for compiling.
        usage: where given, adapters of experts tell it how evenly these are used.
        quick: whether layers and lengths are computed in the quickest way, or so that the base keeps its bits (see
            `exact_base` of the config).
    """

    rows: tuple[tuple[str, Where], ...] = ()
    masks: tuple[tuple[str, torch.Tensor], ...] = ()
    usage: Usage | None = field(default=None, compare=False)
    quick: bool = field(default=False, compare=False)

    @classmethod
    def from_adapter_ids(
        cls,
        adapter_ids: torch.Tensor,
        names: list[str],
        masked: bool = False,
        everywhere: Collection[str] = (),
        length: int = 1,
    ) -> "Route":
        """Plans a batch.

        Args:
            adapter_ids: LongTensor `[batch]`, an index into `names`, -1 for the base alone.
            names: the model's adapters, sorted.
            masked: make the mask form. It never reads a value back from the device.
            everywhere: adapters that act on no row at all where none needs them: other ranks have rows that do.
            length: tokens of a row; where rows are long, those of an adapter are planned as several runs.

        Raises:
            ValueError: an id outside `-1 .. len(names) - 1`, with its row.
        """
        if masked:
            return cls(masks=tuple((name, (adapter_ids == i)[:, None, None]) for i, name in enumerate(names)))
        ids = adapter_ids.tolist()
        for row, i in enumerate(ids):
            if not -1 <= i < len(names):
                raise ValueError(f"row {row}: adapter id {i} is not in -1 .. {len(names) - 1} ({names})")
        plan: list[tuple[str, Where]] = []
        for i, name in enumerate(names):
            mine = [row for row, j in enumerate(ids) if j == i]
            runs = runs_of(mine)
            if mine and len(mine) == len(ids):
                plan.append((name, None))
            elif mine and (len(runs) == 1 or length >= LONG):
                plan += [(name, run) for run in runs]
            elif mine or name in everywhere:
                plan.append((name, torch.tensor(mine, dtype=torch.long, device=adapter_ids.device)))
        return cls(rows=tuple(plan))

    def to(self, device: torch.device | str) -> "Route":
        """The same route with its tensors on `device`."""
        rows = tuple(
            (name, where.to(device) if isinstance(where, torch.Tensor) else where) for name, where in self.rows
        )
        return replace(self, rows=rows, masks=tuple((name, mask.to(device)) for name, mask in self.masks))

    @property
    def names(self) -> set[str]:
        """Adapters that may act."""
        return {name for name, _ in (*self.rows, *self.masks)}


def is_named(path: str, name: str) -> bool:
    """Whether a projection's path is `name` or ends with it, as PEFT reads a list of `target_modules`."""
    return path == name or path.endswith("." + name)


def pair_size(spec: dict[str, Any], path: str) -> tuple[int, float] | None:
    """Rank and alpha of an adapter's pair at the projection `path`, None where it has none there.

    Args:
        spec: an entry of `config.adapters`. Keys of its patterns are read as [`is_named`] says.
    """
    targets = spec["target_modules"]
    if targets is not None and not any(is_named(path, target) for target in targets):
        return None
    rank, alpha = (
        next((value for key, value in (spec.get(field) or {}).items() if is_named(path, key)), spec[default])
        for field, default in (("rank_pattern", "r"), ("alpha_pattern", "alpha"))
    )
    return rank, alpha


class LoraDown(nn.Linear):
    """`lora_A`, drawn as a linear layer is (LoRA, arXiv 2106.09685, section 4.1)."""


class LoraUp(nn.Linear):
    """`lora_B`, zero until it learns, so that a fresh adapter changes nothing."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)


class RoutedLinear(nn.Module):
    """`base_layer(x)` plus, on the rows of each adapter, `scaling * lora_B(lora_A(dropout(x)))`.

    The base stays an ordinary submodule, so that a quantizer can replace it. Sub-module names are PEFT's. An adapter
    of experts has a [`LoraExperts`] in place of the pair.
    """

    def __init__(self, base_layer: nn.Linear):
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self.lora_experts = nn.ModuleDict()
        self.lora_dropout = nn.ModuleDict()
        self.scaling: dict[str, float] = {}

    @property
    def in_features(self) -> int:
        return self.base_layer.in_features

    @property
    def out_features(self) -> int:
        return self.base_layer.out_features

    def holds(self, name: str) -> bool:
        """Whether an adapter acts here."""
        return name in self.scaling

    def add_adapter(
        self, name: str, r: int, alpha: float, dropout: float = 0.0, experts: int = 0, top_k: int = 0
    ) -> None:
        """Adds a LoRA pair of rank `r`, scaled by `alpha / r`. It starts as zero: `lora_B` is zero-initialised.

        Where `experts` is given, it adds so many of them, of which each token takes `top_k`.
        """
        weight = self.base_layer.weight
        options: dict[str, Any] = {"device": weight.device}
        if weight.dtype.is_floating_point:
            options["dtype"] = weight.dtype
        self.lora_dropout[name] = nn.Dropout(dropout) if dropout else nn.Identity()
        self.scaling[name] = alpha / r
        if experts:
            sizes = self.in_features, self.out_features
            self.lora_experts[name] = LoraExperts(sizes, r, experts, top_k, alpha / r, **options)
            return
        self.lora_A[name] = LoraDown(self.in_features, r, bias=False, **options)
        self.lora_B[name] = LoraUp(r, self.out_features, bias=False, **options)

    def remove_adapter(self, name: str) -> None:
        """Drops an adapter."""
        for part in (self.lora_A, self.lora_B, self.lora_experts, self.lora_dropout, self.scaling):
            if name in part:
                del part[name]

    def pair(self, name: str) -> tuple[nn.Linear, nn.Linear]:
        """`lora_A` and `lora_B` of an adapter."""
        down, up = self.lora_A[name], self.lora_B[name]
        assert isinstance(down, nn.Linear) and isinstance(up, nn.Linear)
        return down, up

    @torch.no_grad()
    def split_adapter(self, name: str, experts: int, top_k: int) -> None:
        """Makes a pair `experts` copies of itself with a fresh router; what it computes stays the same."""
        down, up = (layer.weight for layer in self.pair(name))
        options: dict[str, Any] = {"device": down.device, "dtype": down.dtype}
        sizes = self.in_features, self.out_features
        split = LoraExperts(sizes, len(down), experts, top_k, self.scaling[name], **options)
        split.copy_pair(down, up)
        del self.lora_A[name], self.lora_B[name]
        self.lora_experts[name] = split

    @torch.no_grad()
    def merge_adapter(self, name: str) -> None:
        """Adds `scaling * lora_B lora_A` to the base weight, summed in fp32 at least, and drops the adapter."""
        weight = self.base_layer.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        down, up = self.pair(name)
        delta = self.scaling[name] * (up.weight.to(dtype) @ down.weight.to(dtype))
        weight.copy_(weight.to(dtype) + delta)
        self.remove_adapter(name)

    def delta(
        self, name: str, x: torch.Tensor, usage: Usage | None = None, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What adapter `name` adds for `x` `[rows, length, in]`: `[rows, length, out]`.

        `usage` and `rows` are for experts, see [`Usage.add`].
        """
        if name in self.lora_experts:
            return self.lora_experts[name](x, self.lora_dropout[name](x), usage, rows)
        return self.lora_B[name](self.lora_A[name](self.lora_dropout[name](x))) * self.scaling[name]

    def forward(self, x: torch.Tensor, route: Route) -> torch.Tensor:
        """`x` `[batch, length, in]` -> `[batch, length, out]`."""
        acting = [(name, where) for name, where in route.rows if self.holds(name)]
        may_fuse = route.quick or not torch.is_grad_enabled()
        if acting and not route.masks and may_fuse:
            pairs = self._plain_pairs(x, acting)
            if pairs is not None:
                return self._fused(x, pairs, route.quick)
        out = apply_linear(self.base_layer, x) if route.quick else self.base_layer(x)
        for name, where in self._joined(acting, x.device):
            out = self._added(out, x, name, where, route.usage)
        for name, mask in route.masks:
            if self.holds(name):
                # `where`, not a product with the mask: rows of the base keep their bits.
                out = torch.where(mask, out + self.delta(name, x, route.usage, mask), out)
        return out

    def _joined(self, acting: list[tuple[str, Where]], device: torch.device) -> list[tuple[str, Where]]:
        """The same, with all runs of rows of an adapter of experts as one: their usage is that of all its rows."""
        runs: dict[str, list[torch.Tensor]] = {}
        for name, where in acting:
            if name in self.lora_experts and isinstance(where, slice):
                runs.setdefault(name, []).append(torch.arange(where.start, where.stop, device=device))
        joined: list[tuple[str, Where]] = [(name, torch.cat(parts)) for name, parts in runs.items()]
        return [each for each in acting if each[0] not in runs] + joined

    def _added(self, out: torch.Tensor, x: torch.Tensor, name: str, where: Where, usage: Usage | None) -> torch.Tensor:
        """`out` with what an adapter of any kind gives for its rows; a new tensor."""
        if where is None:
            return out + self.delta(name, x, usage)
        if isinstance(where, slice):
            where = torch.arange(where.start, where.stop, device=x.device)
        delta = self.delta(name, x.index_select(0, where), usage, where)
        return out.index_add(0, where, delta.to(out.dtype))

    def _plain_pairs(self, x: torch.Tensor, acting: list[tuple[str, Where]]) -> list[Pair] | None:
        """The pairs that act, where plain matrices of one dtype are all there is, so that products suffice.

        Not so, and None: experts, a quantized or sharded layer, one with hooks, autocast, a base that trains; and with
        gradients or dropout, rows by index.
        """
        training = torch.is_grad_enabled()
        if torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type) or x.dim() != 3:
            return None
        base = self.base_layer
        if training and any(parameter.requires_grad for parameter in base.parameters()):
            return None
        if plain_weight(base, x) is None:
            return None
        pairs = []
        for name, where in acting:
            if name in self.lora_experts:
                return None
            down, up = plain_weight(self.lora_A[name], x), plain_weight(self.lora_B[name], x)
            dropped = self._dropped(name)
            if down is None or up is None or (isinstance(where, torch.Tensor) and (training or dropped)):
                return None
            pairs.append(Pair(where, down, up, self.scaling[name], dropped))
        return pairs

    def _dropped(self, name: str) -> float:
        """Share of an adapter's input that is dropped now."""
        dropout = self.lora_dropout[name]
        return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0

    def _fused(self, x: torch.Tensor, pairs: list[Pair], quick: bool) -> torch.Tensor:
        base = self.base_layer
        if torch.is_grad_enabled():
            matrices = [matrix for pair in pairs for matrix in (pair.down, pair.up)]
            places = [(pair.where, pair.scaling, pair.dropout) for pair in pairs]
            return RoutedSum.apply(x, base.weight, base.bias, places, *matrices)
        out = dense(x, base.weight, base.bias) if quick else base(x)
        add_pairs(out, x, pairs, quick)
        return out
