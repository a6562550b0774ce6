"""Batches of rows that are read while a stage trains: mixed, in an order of their own, found again after a kill."""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import IterableDataset

from mixlora.training.data.batches import draws_of, plan_batches, share_of
from mixlora.training.data.check import BrokenRows
from mixlora.training.data.collate import Example, Tokenizer, with_draw, without_labels
from mixlora.training.data.rows import Row, RowError, parsed
from mixlora.training.data.settings import Source
from mixlora.training.data.tables import Raw, raw_rows

KEPT = 64
"""Batches whose examples are remembered."""
EMPTY = 3
"""Windows in a row without any example after which a stream gives up."""


@dataclass(frozen=True)
class Mark:
    """Where a window begins.

    Attributes:
        window: its number.
        batch: number of its first batch.
        places: of each source the round and the row in it that come next.
    """

    window: int
    batch: int
    places: list[list[int]]


class Reading:
    """One source, read round after round."""

    def __init__(self, source: Source, place: Sequence[int]):
        self.source = source
        self.round, self.row = place
        self.rows = self._open(self.row)

    def _open(self, skip: int) -> Iterator[Raw]:
        rows = raw_rows(self.source.path, self.source.split, skip, streaming=True)
        return itertools.islice(rows, max(0, self.source.limit - skip)) if self.source.limit else rows

    def next(self) -> tuple[Raw, int]:
        """The next row, and the number of its view if there are as many as one likes.

        Raises:
            RowError: there are none.
        """
        raw = next(self.rows, None)
        if raw is None:
            self.round, self.row = self.round + 1, 0
            self.rows = self._open(0)
            raw = next(self.rows, None)
        if raw is None:
            raise RowError(f"{self.source.path}: no rows")
        self.row += 1
        return raw, self.round + self.row - 1


class Stream(IterableDataset[Any]):
    """The batches of a stage, or a rank's share of each, drawn window by window.

    A window is so many rows, of which each is drawn from a source by its weight. They are sorted by length, made into
    batches, and these shuffled, by draws that the seed and the window's number decide. So a training that goes on
    needs the places of the sources at the begin of a window, and nothing else.

    Args:
        sources: their weights are shares of the rows.
        tokenizer: makes examples of a window's rows.
        broken: rows that can't be used are reported here.
        fits: raises where a row is of the wrong kind for the stage.
        window: rows.
        num_batches: after so many the stream ends.

    Attributes:
        collate: what becomes of a batch's examples.
        rank, ranks: the share that this process takes.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        tokenizer: Tokenizer,
        broken: BrokenRows,
        fits: Callable[[Row], None],
        *,
        window: int,
        num_batches: int,
        tokens_per_batch: int = 0,
        rows_per_batch: int = 0,
        seed: int = 0,
    ):
        self.sources, self.tokenizer, self.broken, self.fits = sources, tokenizer, broken, fits
        self.window, self.num_batches, self.seed = window, num_batches, seed
        self.tokens_per_batch, self.rows_per_batch = tokens_per_batch, rows_per_batch
        self.collate: Callable[[list[Example]], Any] = list
        self.rank, self.ranks = 0, 1
        self.start, self.begin = Mark(0, 0, [[0, 0] for _ in sources]), 0
        self._marks: list[Mark] = []
        self._recent: dict[int, list[Example]] = {}

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[Any]:
        """A rank's share of each batch, collated; None in place of those before where a training goes on."""
        for _ in range(self.begin):
            yield None
        for number, batch in self.batches():
            self._recent[number] = batch
            self._recent.pop(number - KEPT, None)
            drawn = [
                with_draw(example, draw)
                for example, draw in zip(batch, draws_of(number, len(batch), self.seed), strict=True)
            ]
            yield self.collate(share_of(drawn, self.rank, self.ranks) or [without_labels(drawn[0])])

    def batches(self) -> Iterator[tuple[int, list[Example]]]:
        """Number and examples of each batch that is to come."""
        number, window = self.start.batch, self.start.window
        readings = [Reading(source, place) for source, place in zip(self.sources, self.start.places, strict=True)]
        empty = 0
        while number < self.num_batches:
            self._marks.append(Mark(window, number, [[reading.round, reading.row] for reading in readings]))
            del self._marks[: -2 * KEPT]
            examples = self._examples(readings, random.Random(f"{self.seed}/{window}"))
            empty = 0 if examples else empty + 1
            if empty == EMPTY:
                raise RowError(
                    f"{empty * self.window} rows in a row, and none can be used: is max_length "
                    f"{self.tokenizer.max_length} too short?"
                )
            for batch in self._cut(examples, window):
                if self.begin <= number < self.num_batches:
                    yield number, batch
                number += 1
            window += 1

    def _examples(self, readings: Sequence[Reading], rng: random.Random) -> list[Example]:
        """A window's rows, those that can be used, tokenized."""
        weights = [source.weight for source in self.sources]
        rows: list[Row] = []
        views: list[int] = []
        for reading in rng.choices(readings, weights, k=self.window):
            raw, view = reading.next()
            for row in self.broken.opened(self.broken.parsed([parsed(raw)])):
                self.fits(row)
                rows.append(row)
                views.append(view % self.tokenizer.media.augmenter.count(row))
        return self.tokenizer(rows, views=views)

    def _cut(self, examples: Sequence[Example], window: int) -> list[list[Example]]:
        if not examples:
            return []
        plan = plan_batches(
            [example.size for example in examples],
            [1.0] * len(examples),
            tokens_per_batch=self.tokens_per_batch,
            rows_per_batch=self.rows_per_batch,
            epochs=1,
            seed=self.seed * 1_000_003 + window,
        )
        return [[examples[place] for place in batch] for batch in plan]

    def first(self) -> list[list[Example]]:
        """The batches of the first window, no more than there will be."""
        readings = [Reading(source, [0, 0]) for source in self.sources]
        batches = self._cut(self._examples(readings, random.Random(f"{self.seed}/0")), 0)[: self.num_batches]
        if not batches:
            raise RowError(f"none of the first {self.window} rows can be used")
        return batches

    def recent(self, number: int) -> list[Example]:
        """The examples, of all ranks, of a batch that was drawn not long ago."""
        return self._recent[number]

    def state(self, batch: int) -> dict[str, Any]:
        """What is needed to go on with a batch, as JSON."""
        mark = next((mark for mark in reversed(self._marks) if mark.batch <= batch), self.start)
        return {"begin": batch, "window": mark.window, "batch": mark.batch, "places": mark.places}

    def go_on(self, state: dict[str, Any]) -> None:
        """Begin where `state` was taken."""
        self.begin = state["begin"]
        self.start = Mark(state["window"], state["batch"], state["places"])
