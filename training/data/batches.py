"""The order of a training, drawn before it starts: batches of rows of similar length, the same for the same seed."""

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import Sampler


class BatchPlan(Sampler[list[int]]):
    """Every batch of a stage, all epochs in a row, as lists of row indices.

    One flat plan has a known length and needs no state: to resume is to skip as many batches as were done.
    """

    def __init__(self, batches: list[list[int]]):
        self.batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class RankShare(Sampler[list[tuple[int, int]]]):
    """What one of several processes takes of each batch of a plan, as pairs of a row and a draw.

    All ranks go through the same batches, so a training is the same on any number of them, and so is what is done when
    it is interrupted. The draw seeds what is drawn for the row: it says where the row stands in the plan, whatever the
    ranks. A rank for which nothing is left takes the batch's first row without its labels, written `-1 - row`: the row
    runs, and teaches nothing.
    """

    def __init__(self, plan: BatchPlan, rank: int, ranks: int, seed: int = 0):
        self.plan, self.rank, self.ranks, self.seed = plan, rank, ranks, seed

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for number, batch in enumerate(self.plan):
            drawn = list(zip(batch, draws_of(number, len(batch), self.seed), strict=True))
            yield share_of(drawn, self.rank, self.ranks) or [(-1 - batch[0], drawn[0][1])]

    def __len__(self) -> int:
        return len(self.plan)


def share_of(batch: list[Any], rank: int, ranks: int) -> list[Any]:
    """Every so many rows, in the order of the batch: rows lie sorted by length, so that the shares are alike."""
    return batch[rank::ranks]


def draws_of(number: int, rows: int, seed: int) -> list[int]:
    """A seed for each row of the `number`th batch, up to a million rows."""
    return [((seed << 41) + (number << 20) + row) % 2**63 for row in range(rows)]


def plan_batches(
    lengths: Sequence[int],
    weights: Sequence[float],
    *,
    tokens_per_batch: int = 0,
    rows_per_batch: int = 0,
    epochs: float = 0.0,
    num_batches: int = 0,
    seed: int = 0,
    views: Sequence[Sequence[int]] = (),
) -> BatchPlan:
    """Draws the batches of a stage.

    Args:
        lengths: tokens of each row, or of each view of each row.
        weights: how often each row is seen in an epoch; a fraction is settled by a draw, anew each epoch.
        tokens_per_batch: budget, padding included. A longer row is a batch of its own.
        rows_per_batch: the other way to bound a batch; one of the two is 0.
        epochs: passes over the data; the last may be partial.
        num_batches: or the number of batches.
        seed: the same seed gives the same plan.
        views: the places in `lengths` of each row's views; each time a row is drawn, its next view is taken. Rows
            begin at different views, so that every epoch holds all kinds. By default a row is its only view.
    """
    turns = [
        itertools.cycle([*places[row % len(places) :], *places[: row % len(places)]])
        for row, places in enumerate(views or [[place] for place in range(len(lengths))])
    ]
    batches: list[list[int]] = []
    epoch = 0
    while len(batches) < num_batches or epoch < epochs:
        rng = random.Random(f"{seed}/{epoch}")
        new = _epoch(lengths, weights, turns, tokens_per_batch, rows_per_batch, rng)
        share = min(1.0, epochs - epoch) if epochs else 1.0
        batches += new[: math.ceil(len(new) * share)]
        epoch += 1
    return BatchPlan(batches[:num_batches] if num_batches else batches)


def _epoch(
    lengths: Sequence[int],
    weights: Sequence[float],
    turns: Sequence[Iterator[int]],
    tokens: int,
    rows: int,
    rng: random.Random,
) -> list[list[int]]:
    """The batches of one epoch in random order. Rows of the same length meet in random company."""
    drawn = [i for i, weight in enumerate(weights) for _ in range(int(weight) + (rng.random() < weight % 1))]
    if not drawn:
        drawn = [rng.randrange(len(weights))]
    drawn = [next(turns[row]) for row in drawn]
    rng.shuffle(drawn)
    drawn.sort(key=lambda i: lengths[i])  # stable: the shuffle decides among equals
    batches: list[list[int]] = [[]]
    for i in drawn:
        size = len(batches[-1]) + 1
        full = size > rows if rows else size * lengths[i] > tokens  # sorted: row i is the longest so far
        if full and batches[-1]:
            batches.append([])
        batches[-1].append(i)
    rng.shuffle(batches)
    return batches
