"""LoRA experts: an adapter's pair at one projection, held several times, and a router that picks some for each token.

After LLaVA-MoD (arXiv 2408.15881, section 3.1), which does so with whole MLPs. Here no token is ever dropped and
nothing is drawn, so a token's answer is its own: the same in every batch.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .ranks import in_process_group, sum_over_ranks


class Usage:
    """Collects, in one forward, how evenly the experts of every projection are used.

    It travels with the route, as an argument, and is closed before the loss is made: layers that activation
    checkpointing runs again in the backward pass add nothing.

    Args:
        tokens: `[batch, length]`, 0 at padding, which does not count; None where all tokens are real.
    """

    def __init__(self, tokens: torch.Tensor | None = None):
        self.tokens = tokens
        self.closed = False
        self._picks: list[torch.Tensor] = []
        self._chances: list[torch.Tensor] = []
        self._counts: list[torch.Tensor] = []
        self._trained = False

    @classmethod
    def of(cls, inputs: torch.Tensor, mask: torch.Tensor | None, rows: torch.Tensor | None) -> "Usage":
        """Of a batch of `inputs` `[batch, length, width]`.

        Args:
            mask: `[batch, past and length]`, 0 at padding; in another form all tokens count.
            rows: BoolTensor `[batch]` of the rows that count; None for all.
        """
        tokens = mask[:, -inputs.shape[1] :] if mask is not None and mask.dim() == 2 else None
        if rows is not None:
            tokens = rows[:, None] * (inputs.new_ones(inputs.shape[:2]) if tokens is None else tokens)
        return cls(tokens)

    def add(self, logits: torch.Tensor, gates: torch.Tensor, rows: torch.Tensor | None, trained: bool) -> None:
        """Adds one router's tokens.

        Args:
            logits: of the router, `[rows, length, experts]`; gates: the same shape, above 0 where an expert is picked.
            rows: LongTensor of the rows' places in the batch, or a BoolTensor `[batch, 1, 1]` of those that count.
            trained: whether the router is.
        """
        weights = torch.ones_like(logits[..., :1])
        if self.tokens is not None:
            tokens = self.tokens.to(logits.device)[..., None]
            weights = (tokens if rows is None or rows.dtype == torch.bool else tokens[rows]).to(logits.dtype)
        if rows is not None and rows.dtype == torch.bool:
            weights = weights * rows
        picked = (gates.detach() > 0).to(logits.dtype)
        picks = (picked / picked.sum(-1, keepdim=True) * weights).sum((0, 1))
        chances = (logits.softmax(-1) * weights).sum((0, 1))
        if not self.closed:  # not earlier: what runs again must save the same tensors
            self._picks.append(picks)
            self._chances.append(chances)
            self._counts.append(weights.sum())
            self._trained |= trained

    def close(self) -> torch.Tensor | None:
        """The mean of the routers' terms, None where no expert acted.

        A term is `E sum_i f_i P_i` over E experts, 1 where all are used alike. `f` is the share of the picks that go
        to an expert and has no gradient, `P` its mean probability (Switch Transformer, arXiv 2101.03961, eq. 4 to 6,
        with all k picks in place of the first).

        Where several ranks train, `f` and the numbers of tokens are those of all of them, and `P` has this rank's part
        times the ranks: the mean over the ranks is the value of all their rows in one batch, and so is its gradient.

        Raises:
            ValueError: activation checkpointing cut the gradient off.
        """
        self.closed = True
        if not self._counts:
            return None
        picks, chances, counts = ([each.to(self._counts[0].device) for each in kept] for kept in self._kept())
        known, ranks = torch.cat([*picks, torch.stack(counts)]), 1
        if together := torch.is_grad_enabled() and in_process_group():
            known, ranks = sum_over_ranks(known), torch.distributed.get_world_size()
        *picks, tokens = known.split([*map(len, picks), len(counts)])
        if together and not tokens.any():
            return None
        each = [
            len(ours) * (ours * chance).sum() / count.clamp(min=1) ** 2
            for ours, chance, count in zip(picks, chances, tokens, strict=True)
        ]
        mean = ranks * torch.stack(each).sum() / (tokens > 0).sum().clamp(min=1)
        for kept in self._kept():
            kept.clear()
        if self._trained and torch.is_grad_enabled() and not mean.requires_grad:
            raise ValueError(
                "the balance loss of LoRA experts has no gradient under reentrant checkpointing: pass "
                "use_reentrant=False to activation_checkpointing_enable"
            )
        return mean

    def _kept(self) -> tuple[list[torch.Tensor], ...]:
        return self._picks, self._chances, self._counts


class LoraExperts(nn.Module):
    """`experts` LoRA pairs, of which each token takes `top_k`, weighted by a softmax over those alone.

    All pairs are computed as one of rank `experts * r`, and those not picked are multiplied by 0: ranks are low, no
    token is gathered or dropped, and nothing is read back from the device.

    Attributes:
        down: `[experts, r, in]`; up: `[out, experts, r]`; router: `[experts, in]`.
    """

    def __init__(self, sizes: tuple[int, int], r: int, experts: int, top_k: int, scaling: float, **options: Any):
        """`sizes` are the projection's input and output width; `options` go to the tensors (`device`, `dtype`)."""
        super().__init__()
        self.top_k, self.scaling = top_k, scaling
        self.down = nn.Parameter(torch.empty(experts, r, sizes[0], **options))
        self.up = nn.Parameter(torch.empty(sizes[1], experts, r, **options))
        self.router = nn.Parameter(torch.empty(experts, sizes[0], **options))
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Draws `down` and `router` anew, as PyTorch does for a linear layer, and zeroes `up`."""
        bound = self.down.shape[-1] ** -0.5
        nn.init.uniform_(self.down, -bound, bound)
        nn.init.uniform_(self.router, -bound, bound)
        nn.init.zeros_(self.up)

    @torch.no_grad()
    def copy_pair(self, down: torch.Tensor, up: torch.Tensor) -> None:
        """Makes every expert the pair `down` `[r, in]`, `up` `[out, r]`: whatever is picked, the function is its."""
        self.down.copy_(down.expand_as(self.down))
        self.up.copy_(up[:, None].expand_as(self.up))

    def forward(
        self, x: torch.Tensor, dropped: torch.Tensor, usage: Usage | None = None, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What the experts add: `[rows, length, in]` -> `[rows, length, out]`.

        Args:
            x: what the router reads; dropped: the same after dropout, which the pairs read.
            usage: where given, it is told how evenly the experts are used; rows: see [`Usage.add`].
        """
        dtype = torch.promote_types(x.dtype, torch.float32)
        logits = F.linear(x.to(dtype), self.router.to(dtype))
        best, picked = logits.topk(self.top_k, dim=-1)
        gates = torch.zeros_like(logits).scatter(-1, picked, best.softmax(-1))
        if usage is not None:
            usage.add(logits, gates, rows, self.router.requires_grad)
        hidden = F.linear(dropped, self.down.flatten(0, 1)).unflatten(-1, self.down.shape[:2])
        hidden = hidden * (gates * self.scaling).to(hidden.dtype)[..., None]
        return F.linear(hidden.flatten(-2), self.up.flatten(1))
