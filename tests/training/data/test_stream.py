"""Streams: mixtures, order, and going on in the middle of a round."""

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mixlora.modeling.modeling_mixlora import MixLoraForConditionalGeneration
from mixlora.modeling.processing_mixlora import MixLoraProcessor
from mixlora.training.data.check import BrokenRows
from mixlora.training.data.collate import Example, Tokenizer
from mixlora.training.data.media import Media
from mixlora.training.data.rows import RowError
from mixlora.training.data.settings import Source
from mixlora.training.data.stream import Stream


@pytest.fixture
def tokenizer(start: str) -> Tokenizer:
    processor = MixLoraProcessor.from_pretrained(start)
    return Tokenizer(processor, Media(MixLoraForConditionalGeneration.from_pretrained(start), processor), 64)


def texts(folder: Path, name: str, rows: int) -> str:
    """A file of conversations that tell their numbers by their lengths."""
    path = folder / f"{name}.jsonl"
    chats = [[{"role": "user", "content": name}, {"role": "assistant", "content": "x" * (1 + i)}] for i in range(rows)]
    path.write_text("".join(json.dumps({"messages": chat, "task": name}) + "\n" for chat in chats))
    return str(path)


def stream(tokenizer: Tokenizer, sources: list[Source], **changes: Any) -> Stream:
    settings: dict[str, Any] = {"window": 8, "num_batches": 12, "rows_per_batch": 3, "seed": 5}
    return Stream(sources, tokenizer, BrokenRows(), lambda row: None, **(settings | changes))


def numbers(batch: list[Example]) -> list[tuple[str, int]]:
    return [(example.task, int((example.labels != -100).sum())) for example in batch]


def test_each_row_is_read_once_a_round(tmp_path: Path, tokenizer: Tokenizer) -> None:
    found = stream(tokenizer, [Source(texts(tmp_path, "a", 9))], window=9, num_batches=6)
    batches = [numbers(batch) for _, batch in found.batches()]
    first, second = batches[:3], batches[3:]
    assert Counter(itertools.chain(*first)) == Counter(itertools.chain(*second))
    assert len(Counter(itertools.chain(*first))) == 9 and first != second  # the batches come in another order


def test_weights_are_shares_of_the_rows(tmp_path: Path, tokenizer: Tokenizer) -> None:
    sources = [Source(texts(tmp_path, "a", 5), weight=3), Source(texts(tmp_path, "b", 50), weight=1)]
    found = stream(tokenizer, sources, window=100, num_batches=100, rows_per_batch=4)
    counts = Counter(task for _, batch in found.batches() for task, _ in numbers(batch))
    assert 0.7 < counts["a"] / counts.total() < 0.8


def test_a_limit_holds(tmp_path: Path, tokenizer: Tokenizer) -> None:
    found = stream(tokenizer, [Source(texts(tmp_path, "a", 9), limit=2)])
    assert len({number for _, batch in found.batches() for number in numbers(batch)}) == 2


@pytest.mark.parametrize("begin", [1, 5, 7, 11])
def test_it_goes_on_where_it_was(tmp_path: Path, tokenizer: Tokenizer, begin: int) -> None:
    sources = [Source(texts(tmp_path, "a", 5), weight=2), Source(texts(tmp_path, "b", 7), limit=6)]
    whole = stream(tokenizer, sources)
    batches = {}
    for number, batch in whole.batches():
        batches[number] = numbers(batch)
        if number == begin:  # one is drawn ahead of the step that is saved
            state = json.loads(json.dumps(whole.state(begin)))
    again = stream(tokenizer, sources)
    again.go_on(state)
    assert {number: numbers(batch) for number, batch in again.batches()} == {
        number: batch for number, batch in batches.items() if number >= begin
    }
    first: Iterator[Any] = iter(again)
    assert [next(first) for _ in range(begin)] == [None] * begin and len(list(first)) == 12 - begin


def test_ranks_share_each_batch_and_draw_alike(tmp_path: Path, tokenizer: Tokenizer) -> None:
    sources = [Source(texts(tmp_path, "a", 5))]
    whole = list(stream(tokenizer, sources, rows_per_batch=2))
    shares = []
    for rank in range(3):
        share = stream(tokenizer, sources, rows_per_batch=2)
        share.rank, share.ranks = rank, 3
        shares.append(list(share))
    for number, batch in enumerate(whole):
        parts = [share[number] for share in shares]
        real = [example for part in parts for example in part if (example.labels != -100).any()]
        assert sorted((len(each.ids), each.draw) for each in real) == sorted((len(e.ids), e.draw) for e in batch)
        assert all(len(part) == 1 for part in parts)


def test_views_change_from_round_to_round(tmp_path: Path, tokenizer: Tokenizer) -> None:
    from mixlora.training.data.augment import Augmenter
    from mixlora.training.data.settings import Augment
    from tests.training.training_fixtures import write_rows

    lines = [line for line in write_rows(tmp_path).read_text().splitlines() if '"image"' in line]
    (tmp_path / "seen.jsonl").write_text("\n".join(lines))
    tokenizer.media.augmenter = Augmenter(Augment(views=2, rotation=5))
    found = stream(tokenizer, [Source(str(tmp_path / "seen.jsonl"))], window=len(lines), num_batches=4)
    batches = [batch for _, batch in found.batches()]
    assert {example.view for batch in batches[:2] for example in batch} == {0, 1}
    rounds = [sorted((str(e.images), e.view) for b in part for e in b) for part in (batches[:2], batches[2:])]
    assert rounds[0] != rounds[1] and torch.is_tensor(batches[0][0].ids)


def test_rows_that_never_fit_end_it(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tokenizer.max_length = 3
    with pytest.raises(RowError, match="is max_length 3 too short"):
        list(stream(tokenizer, [Source(texts(tmp_path, "a", 9))]).batches())
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(RowError, match="empty.jsonl: no rows"):
        list(stream(tokenizer, [Source(str(tmp_path / "empty.jsonl"))]).batches())
