"""A stage's data: its rows read and tokenized, and its batches drawn, beforehand or while it trains."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from mixlora.training.data.augment import Augmenter
from mixlora.training.data.batches import BatchPlan, RankShare, plan_batches
from mixlora.training.data.check import BrokenRows
from mixlora.training.data.collate import Example, Examples, Tokenizer, views_by_row
from mixlora.training.data.media import Media
from mixlora.training.data.rows import Row, RowError, parsed
from mixlora.training.data.settings import Source
from mixlora.training.data.stream import Stream
from mixlora.training.data.tables import raw_rows
from mixlora.training.groups import NAMES, READER
from mixlora.training.stages import Stage

Collate = Callable[[list[Example]], Any]


@dataclass
class Planned:
    """Data whose examples are all known, and whose batches are drawn.

    Attributes:
        examples: of all rows, those that fit.
        plan: all batches, as places in `examples`.
    """

    examples: Sequence[Example]
    plan: BatchPlan
    seed: int

    def loader(self, collate: Collate, rank: int, ranks: int) -> DataLoader:
        """A rank's share of each batch."""
        share = RankShare(self.plan, rank, ranks, self.seed)
        return DataLoader(Examples(self.examples), batch_sampler=share, collate_fn=collate)  # type: ignore[arg-type]

    def batch(self, number: int) -> list[Example]:
        """The examples of a batch, those of all ranks."""
        return [self.examples[place] for place in self.plan.batches[number]]

    def state(self, batch: int) -> dict[str, Any]:
        """Nothing: to go on is to skip what was done."""
        return {}

    def sample(self) -> list[list[Example]]:
        """Every batch."""
        return [self.batch(number) for number in range(len(self))]

    def __len__(self) -> int:
        return len(self.plan)


@dataclass
class Streamed:
    """Data that are read while the stage trains."""

    stream: Stream
    examples: Sequence[Example] = ()

    def loader(self, collate: Collate, rank: int, ranks: int) -> DataLoader:
        """A rank's share of each batch."""
        self.stream.collate, self.stream.rank, self.stream.ranks = collate, rank, ranks
        return DataLoader(self.stream, batch_size=None)

    def batch(self, number: int) -> list[Example]:
        """The examples, of all ranks, of a batch that was drawn not long ago."""
        return self.stream.recent(number)

    def state(self, batch: int) -> dict[str, Any]:
        """What is needed to go on with a batch."""
        return self.stream.state(batch)

    def sample(self) -> list[list[Example]]:
        """The batches of the first rows, by which the others may be judged."""
        return self.stream.first()

    def __len__(self) -> int:
        return len(self.stream)


Data = Planned | Streamed


def stage_data(
    stage: Stage, model: Any, processor: Any, media: Media, cache: Path | None, seed: int, broken: BrokenRows
) -> Data:
    """A stage's data; of those that are known beforehand, the tower features of their media are in `cache` afterwards.

    Args:
        media: gets the stage's views, and its caches.
        cache: folder of tower features; None keeps none.
        broken: counts the rows that can't be used.

    Raises:
        RowError: too many rows that can't be used, one of the wrong kind for the objective, or none that fits.
    """
    tokenizer = Tokenizer(processor, media, stage.max_length, broken)
    if not stage.streaming:
        examples = _examples(stage, model, media, cache, tokenizer, broken)
        return Planned(examples, _plan(stage, examples, seed), seed)
    media.augmenter = Augmenter(stage.augment)
    batches = stage.max_steps * stage.gradient_accumulation
    print(f"  rows are read while training, {stage.window:,} at a time; {batches:,} batches")
    return Streamed(
        Stream(
            stage.data,
            tokenizer,
            broken,
            lambda row: _check_kind(stage, row),
            window=stage.window,
            num_batches=batches,
            tokens_per_batch=stage.tokens_per_batch,
            rows_per_batch=stage.rows_per_batch,
            seed=seed,
        )
    )


def _check_kind(stage: Stage, row: Row) -> None:
    """Raises RowError for a row that the stage's objective can't learn from."""
    pairs = stage.objective == "preference"
    if (row.rejected is not None) != pairs:
        wanted = "prompt, chosen and rejected" if pairs else "messages or text"
        raise RowError(f"{row.source}: objective {stage.objective} takes rows with {wanted}")


def _rows(source: Source, broken: BrokenRows) -> list[Row]:
    """Those rows of a source that can be parsed, as many as it is limited to."""
    rows = broken.parsed(map(parsed, raw_rows(source.path, source.split)))
    return list(itertools.islice(rows, source.limit or None))


def _examples(
    stage: Stage, model: Any, media: Media, cache: Path | None, tokenizer: Tokenizer, broken: BrokenRows
) -> list[Example]:
    """The stage's rows in all their views."""
    rows = [(_rows(source, broken), source.weight) for source in stage.data]
    media.sees_pixels &= NAMES not in stage.train
    by_pixels = stage.ctc_weight == 1 and READER in stage.train  # no tower and no decoder sees the pictures then
    if cache is not None:  # to train, so that all media must be readable; those whose features are kept were
        kinds = [kind for kind in ("images", "audio") if any(getattr(row, kind) for group, _ in rows for row in group)]
        kinds = [kind for kind in kinds if kind != "images" or not by_pixels]
        media.open_caches(model, cache, [kind.removesuffix("s") for kind in kinds])
        rows = [(list(broken.opened(group, media.known)), weight) for group, weight in rows]
    for (group, weight), source in zip(rows, stage.data, strict=True):
        print(f"  {len(group):,} rows of {source.path}, weight {weight:g}")
        if not group:
            raise RowError(f"{source.path}: no rows")
    every = [row for group, _ in rows for row in group]
    for row in every:
        _check_kind(stage, row)
    media.augmenter = augmenter = Augmenter(stage.augment, [clip for row in every for clip in row.audio])
    views = [augmenter.media(row, view) for row in every for view in range(augmenter.count(row))]
    if cache is not None:
        seen = [] if by_pixels else [picture for images, _ in views for picture in images]
        media.cache(model, cache, seen, [clip for _, audio in views for clip in audio])
    for images, audio in views:
        media.count(images, audio)
    examples = [example for group, weight in rows for example in tokenizer(group, weight)]
    if tokenizer.left_out:
        print(f"  {tokenizer.left_out:,} conversations of more than {stage.max_length} tokens are left out")
    if broken.faults:
        print(f"  {len(broken.faults):,} rows can't be used, and are passed over")
    if not examples:
        raise RowError(f"stage {stage.name!r}: no row fits max_length {stage.max_length}")
    return examples


def _plan(stage: Stage, examples: Sequence[Example], seed: int) -> BatchPlan:
    """All batches of the stage."""
    lengths = [example.size for example in examples]
    views = views_by_row(examples)
    plan = plan_batches(
        lengths,
        [examples[places[0]].weight for places in views],
        tokens_per_batch=stage.tokens_per_batch,
        rows_per_batch=stage.rows_per_batch,
        epochs=stage.epochs,
        num_batches=stage.max_steps * stage.gradient_accumulation,
        seed=seed,
        views=views,
    )
    tokens = sum(lengths[places[0]] for places in views)
    extra = f", {len(examples) - len(views):,} further views" if len(examples) > len(views) else ""
    print(f"  {len(views):,} examples, {tokens:,} tokens{extra}, {len(plan):,} batches")
    return plan
