"""Where rows lie: JSONL and Parquet files, folders of them, and what the library `datasets` loads."""

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixlora.training.settings import RecipeError, nearest

LINES, PARQUET = (".jsonl", ".json"), (".parquet",)
CHUNK = 64
"""Rows that are decoded at once."""


@dataclass(frozen=True)
class Raw:
    """A row as it lies there.

    Attributes:
        source: `file:line`, or a table and the number of the row in it, from 1.
        folder: what paths in it count from.
        content: bytes of a JSON line, or the columns of a table by name.
    """

    source: str
    folder: Path
    content: bytes | dict[str, Any]


def raw_rows(path: str, split: str = "train", skip: int = 0, streaming: bool = False) -> Iterator[Raw]:
    """The rows of a file, a folder or a data set, in order.

    Args:
        path: a JSONL or Parquet file; a folder that holds such files, at any depth, or that `save_to_disk` of
            `datasets` wrote; or, where nothing lies at that path, the name of a data set for `datasets.load_dataset`.
        split: of a data set.
        skip: pass over so many rows first.
        streaming: have `datasets` fetch a named data set while it is read.

    Raises:
        FileNotFoundError: nothing is there, and it looks like a file.
        RecipeError: `datasets` is missing, or can't load it.
    """
    place = Path(path)
    if place.is_file():
        return _skipped(_of_file(place), skip)
    if place.is_dir() and not _is_saved(place) and (files := _files(place)):
        return _skipped(itertools.chain.from_iterable(map(_of_file, files)), skip)
    if not place.exists() and (place.suffix in (*LINES, *PARQUET) or path.startswith((".", "/", "~"))):
        raise FileNotFoundError(f"no training data at {path}; prepare it first, or change the recipe's path")
    return _of_dataset(path, split, skip, streaming)


def _skipped(rows: Iterator[Raw], skip: int) -> Iterator[Raw]:
    return itertools.islice(rows, skip, None)


def _files(folder: Path) -> list[Path]:
    """The files of rows in a folder, by name."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix in (".jsonl", *PARQUET))


def _of_file(path: Path) -> Iterator[Raw]:
    if path.suffix in PARQUET:
        return _of_parquet(path)
    return _of_lines(path)


def _of_lines(path: Path) -> Iterator[Raw]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield Raw(f"{path}:{number}", path.parent, line)


def _of_parquet(path: Path) -> Iterator[Raw]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise _missing(path) from error
    try:
        batches = parquet.ParquetFile(path).iter_batches(batch_size=CHUNK)
    except (ValueError, OSError) as error:
        raise RecipeError(f"{path}: not a Parquet file: {error}") from error
    rows = (row for batch in batches for row in batch.to_pylist())
    for number, row in enumerate(rows, start=1):
        yield Raw(f"{path}:{number}", path.parent, row)


def _is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote it."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _of_dataset(name: str, split: str, skip: int, streaming: bool) -> Iterator[Raw]:
    """Rows as `datasets` stores them: pictures and clips are not decoded."""
    try:
        import datasets
    except ImportError as error:
        raise _missing(name) from error
    try:
        if _is_saved(Path(name)):
            table = _split_of(datasets.load_from_disk(name), split, name)
        else:
            table = datasets.load_dataset(name, split=split, streaming=streaming)
    except RecipeError:
        raise
    except Exception as error:  # of many kinds: no such name, no such split, no network
        raise RecipeError(f"{name}: neither a file nor a data set that `datasets` loads ({error})") from error
    folder = Path(name) if Path(name).is_dir() else Path()
    number = itertools.count(skip + 1)
    for chunk in table.skip(skip).with_format("arrow").iter(batch_size=CHUNK):
        for row in chunk.to_pylist():
            yield Raw(f"{name}[{split}]:{next(number)}", folder, row)


def _split_of(found: Any, split: str, name: str) -> Any:
    """The table of a split, where what was saved has several."""
    if not isinstance(found, dict):
        return found
    if split not in found:
        raise RecipeError(f"{name}: no split {split!r}{nearest(split, found)}")
    return found[split]


def _missing(what: Any) -> RecipeError:
    return RecipeError(f"{what}: this needs `datasets`, pip install 'mixlora-multimodal[train]'")


def content_of(raw: Raw) -> Any:
    """The columns of a row by name, without those that are null.

    Raises:
        ValueError: a line that is not JSON, or not UTF-8.
    """
    if isinstance(raw.content, bytes):
        return json.loads(raw.content)
    return _without_nulls(raw.content)


def _without_nulls(value: Any) -> Any:
    """A table gives every key that any row has; this one's own are those that are not null."""
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    if isinstance(value, list):
        return [_without_nulls(each) for each in value]
    return value
