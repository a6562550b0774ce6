"""The processes that train together."""

import torch
from torch import distributed


def in_process_group() -> bool:
    """Whether this process is one of a group of `torch.distributed`."""
    return distributed.is_available() and distributed.is_initialized()


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """`values` of all ranks added up, without gradient; in a single process a copy."""
    total = values.detach().clone()
    if in_process_group():
        distributed.all_reduce(total)
    return total
