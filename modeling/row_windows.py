"""Which cached tokens a step of decoding has to look at, row by row: not the padding in front of short rows."""

from typing import Any, TypeAlias

import torch
from transformers.cache_utils import Cache

Windows: TypeAlias = tuple[tuple[slice, int, bool], ...]
"""Runs of rows, the first column that any of them needs, and whether all of a run need all columns from there on."""

FEWEST = 4096
"""Cached tokens of all rows from which on two calls for two runs of rows are quicker than one for both."""
NEAR = 0.25
"""Rows of one run begin within this share of its columns."""


def windows_of(attention_mask: Any, past_key_values: Cache | None, length: int, backend: str) -> Windows | None:
    """The windows of a step of `length` new tokens; None where one call for all rows is as good, or needed.

    It is for CPUs, whose attention takes time for each column: elsewhere a call more costs more than it saves.

    Args:
        attention_mask: `[batch, cached + length]`.
    """
    if length != 1 or backend != "sdpa" or past_key_values is None or torch.compiler.is_compiling():
        return None
    if (
        not isinstance(attention_mask, torch.Tensor)
        or attention_mask.dim() != 2
        or attention_mask.device.type != "cpu"
    ):
        return None
    columns = attention_mask.shape[1]
    if attention_mask.numel() < FEWEST or past_key_values.is_compileable:
        return None
    if int(past_key_values.get_seq_length()) + 1 != columns:
        return None
    real = attention_mask.bool()
    starts = real.int().argmax(-1).tolist()
    whole = (real.sum(-1) == columns - torch.tensor(starts)).tolist()  # nothing is masked behind the start
    runs = [[0]]
    for row in range(1, len(starts)):
        mine = [starts[i] for i in (*runs[-1], row)]
        if max(mine) - min(mine) <= NEAR * (columns - min(mine)):
            runs[-1].append(row)
        else:
            runs.append([row])
    if len(runs) == 1:
        return None
    found = []
    for run in runs:
        first = min(starts[row] for row in run)
        found.append((slice(run[0], run[-1] + 1), first, all(starts[r] == first and whole[r] for r in run)))
    return tuple(found)
