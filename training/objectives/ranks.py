"""Sums over all processes of a training."""

import torch
from torch import distributed


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """`values` of all ranks added up, without gradient; in a single process a copy."""
    total = values.detach().clone()
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(total)
    return total
