"""Two processes that train together on the CPU, over gloo."""

import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing

PATIENCE = timedelta(seconds=100)
"""After this long a rank that waits for the other in vain ends with an error, and so does the test."""


def _rank(rank: int, ranks: int, folder: str, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}  # as torchrun does
    os.environ |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    meet = f"file://{folder}/meet-{work.__name__}"
    distributed.init_process_group("gloo", init_method=meet, rank=rank, world_size=ranks, timeout=PATIENCE)
    torch.save(work(*arguments), f"{folder}/{work.__name__}-{rank}.pt")
    distributed.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # a training that was broken off may leave a thread of gloo behind, on which Python's own end aborts


def on_ranks(folder: Path, work: Callable[..., Any], *arguments: Any, ranks: int = 2) -> list[Any]:
    """What `work`, a function of a module, gives on each rank."""
    multiprocessing.spawn(_rank, args=(ranks, str(folder), work, arguments), nprocs=ranks)
    return [torch.load(folder / f"{work.__name__}-{rank}.pt", weights_only=True) for rank in range(ranks)]
