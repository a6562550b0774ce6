"""What is counted between two points of the log: losses by modality and task, tokens, and the objective's figures."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import distributed, nn

from mixlora.modeling.ranks import in_process_group

Kind = tuple[str, str]
"""Modality and task of a row."""


class Ledger:
    """Sums and weights by name, those of this process until they are asked for."""

    def __init__(self) -> None:
        self.sums: dict[str, list[float]] = {}
        self.own: dict[str, list[float]] = {}
        self.tokens = 0
        """Of all ranks, since the training began."""
        self._own_tokens = 0

    def add_figures(self, figures: dict[str, float]) -> None:
        """Figures of a batch, which are those of all ranks."""
        for name, value in figures.items():
            _add(self.own, name, value, 1.0)

    def add_rows(self, kinds: Sequence[Kind], losses: torch.Tensor) -> None:
        """Losses of this process's rows, `[rows, 2]`: their sums and their tokens. A task without a name is none."""
        for (modality, task), (total, tokens) in zip(kinds, losses.tolist(), strict=True):
            for name in (f"loss/{modality}", *([f"loss/task/{task}"] if task else [])):
                _add(self.sums, name, total, tokens)

    def add_tokens(self, tokens: int) -> None:
        """Real tokens of this process's rows."""
        self._own_tokens += tokens

    def means(self) -> dict[str, float]:
        """Means since the last call, over all ranks, which must all call this; `tokens` is of all that was seen."""
        own = self.sums, self._own_tokens
        everyone: list[Any] = [own]
        if in_process_group():
            everyone = [None] * distributed.get_world_size()
            distributed.all_gather_object(everyone, own)
        total: dict[str, list[float]] = {}
        for sums, tokens in everyone:
            self.tokens += tokens
            for name, (value, weight) in sums.items():
                _add(total, name, value, weight)
        found = {name: value / weight for name, (value, weight) in sorted((self.own | total).items()) if weight}
        self.sums, self.own, self._own_tokens = {}, {}, 0
        return {**found, "tokens": self.tokens}

    def state(self) -> dict[str, Any]:
        """All that is counted, as JSON."""
        return {"sums": self.sums, "own": self.own, "tokens": self.tokens, "own_tokens": self._own_tokens}

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from `state`."""
        self.sums, self.own, self.tokens = state["sums"], state["own"], state["tokens"]
        self._own_tokens = state["own_tokens"]


def _add(sums: dict[str, list[float]], name: str, value: float, weight: float) -> None:
    before = sums.get(name, [0.0, 0.0])
    sums[name] = [before[0] + value, before[1] + weight]


@torch.no_grad()
def gradient_norms(parameters: dict[str, nn.Parameter], groups: dict[str, list[str]]) -> dict[str, float]:
    """The norm of each group's gradients, by `grad_norm/GROUP`; of all ranks where they are sharded.

    Args:
        parameters: by name.
        groups: name -> names of its parameters; the same on all ranks.
    """
    norms = {}
    for group, names in groups.items():
        squares = torch.zeros((), dtype=torch.float64)
        for name in names:
            grad: Any = parameters[name].grad
            if grad is not None:
                norm: Any = grad.norm()
                norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
                squares += norm.double().cpu() ** 2
        norms[f"grad_norm/{group}"] = float(squares.sqrt())
    return norms
