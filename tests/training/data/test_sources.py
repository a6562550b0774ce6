"""Rows of JSONL, Parquet, folders and data sets: the same rows, wherever they lie."""

import json
from pathlib import Path
from typing import Any

import pytest

from mixlora.training.data.items import Blob
from mixlora.training.data.rows import Row, RowError, read_rows, scan_rows
from mixlora.training.data.tables import raw_rows
from mixlora.training.settings import RecipeError
from tests.training.training_fixtures import write_rows

datasets = pytest.importorskip("datasets")


def content(row: Row) -> tuple[Any, ...]:
    """What is learnt of a row, with the bytes of its media."""
    media = [item.data if isinstance(item, Blob) else item.read_bytes() for item in (*row.images, *row.audio)]
    return row.messages, row.text, row.rejected, media


def tabular(line: dict[str, Any]) -> dict[str, Any]:
    """A row whose messages have the same types in all rows, as a table needs."""
    messages = [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message["content"], str)
        else message
        for message in line.get("messages", [])
    ]
    return {"messages": messages or None, "text": line.get("text"), "task": "some"}


@pytest.fixture
def lines(tmp_path: Path) -> list[dict[str, Any]]:
    return [tabular(json.loads(line)) for line in write_rows(tmp_path).read_text().splitlines()]


@pytest.fixture
def expected(tmp_path: Path, lines: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    path = tmp_path / "table.jsonl"
    path.write_text("\n".join(json.dumps({k: v for k, v in line.items() if v is not None}) for line in lines))
    return [content(row) for row in read_rows(path)]


def test_parquet(tmp_path: Path, lines: list[dict[str, Any]], expected: list[tuple[Any, ...]]) -> None:
    datasets.Dataset.from_list(lines).to_parquet(tmp_path / "rows.parquet")
    rows = read_rows(tmp_path / "rows.parquet")
    assert [content(row) for row in rows] == expected
    assert rows[3].source == f"{tmp_path / 'rows.parquet'}:4" and rows[3].task == "some"


def test_media_may_lie_in_columns_as_bytes(
    tmp_path: Path, lines: list[dict[str, Any]], expected: list[tuple[Any, ...]]
) -> None:
    """As `datasets` stores them: parts name no media, the columns hold them in order."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    table = []
    for line in lines:
        columns: dict[str, list[Any]] = {"image": [], "audio": []}
        messages = [
            {
                **message,
                "content": [
                    {"type": part["type"], "text": part.get("text")} for part in message["content"] if "type" in part
                ],
            }
            for message in line["messages"] or []
        ]
        for message in line["messages"] or []:
            for part in message["content"]:
                if part["type"] in columns:
                    columns[part["type"]].append({"path": None, "bytes": (tmp_path / part["path"]).read_bytes()})
        table.append(
            {
                "messages": messages or None,
                "text": line["text"],
                "images": columns["image"],
                "audios": columns["audio"],
            }
        )
    features = datasets.Dataset.from_list(table).features
    features["images"] = datasets.List(datasets.Image())
    features["audios"] = datasets.List(datasets.Audio(decode=False))
    saved = datasets.Dataset.from_list(table, features=features)
    saved.save_to_disk(folder / "saved")
    saved.to_parquet(folder / "rows.parquet")
    for path in (folder / "saved", folder / "rows.parquet"):
        assert [content(row) for row in read_rows(path)] == expected, path


def test_folders_and_names(tmp_path: Path, lines: list[dict[str, Any]], expected: list[tuple[Any, ...]]) -> None:
    folder = tmp_path / "folder"
    (folder / "more").mkdir(parents=True)
    for name in ("a.png", "1.png"):
        (folder / name).touch()
    texts = [{"text": f"number {number}"} for number in range(7)]
    (folder / "b.jsonl").write_text("\n".join(map(json.dumps, texts[3:])))
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, texts[:3])))
    assert [row.text for row in read_rows(folder)] == [line["text"] for line in texts]
    assert [raw.source.rpartition("/")[2] for raw in raw_rows(str(folder), skip=2)][:2] == ["a.jsonl:3", "b.jsonl:1"]
    parts = datasets.DatasetDict({"train": datasets.Dataset.from_list(texts[:4])})
    parts["held"] = datasets.Dataset.from_list(texts[4:])
    parts.save_to_disk(tmp_path / "split")
    held = [row for row in scan_rows(tmp_path / "split", split="held") if isinstance(row, Row)]
    assert [row.text for row in held] == ["number 4", "number 5", "number 6"]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_name_is_loaded_by_datasets(monkeypatch: pytest.MonkeyPatch, streaming: bool) -> None:
    asked: list[Any] = []

    def load(name: str, split: str, streaming: bool) -> Any:
        asked.append((name, split, streaming))
        table = datasets.Dataset.from_list([{"text": f"number {number}"} for number in range(200)])
        return table.to_iterable_dataset(num_shards=2) if streaming else table

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = list(raw_rows("someone/texts", "validation", skip=150, streaming=streaming))
    assert asked == [("someone/texts", "validation", streaming)]
    assert [raw.content for raw in rows] == [{"text": f"number {number}"} for number in range(150, 200)]
    assert rows[0].source == "someone/texts[validation]:151"


def test_what_is_not_there(tmp_path: Path) -> None:
    for path in ("absent.parquet", "/absent/folder"):
        with pytest.raises(FileNotFoundError, match="no training data at .*absent"):
            list(raw_rows(path))
    with pytest.raises(RecipeError, match="no-one/nothing: neither a file nor a data set"):
        list(raw_rows("no-one/nothing"))
    (tmp_path / "bad.parquet").write_bytes(b"no table")
    with pytest.raises(RecipeError, match="bad.parquet: not a Parquet file"):
        list(raw_rows(str(tmp_path / "bad.parquet")))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"images": ["0.png", "1.png"]}, "1 more of image than the messages have parts for"),
        ({"images": []}, "expected a text part with text, or an image"),
        ({"images": [3]}, "expected a path or bytes of its image"),
        ({"images": [{"bytes": None, "path": "gone.png"}]}, "no image file at"),
    ],
)
def test_columns_that_do_not_fit(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    write_rows(tmp_path, rows=2)
    chat = [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "yes"}]
    path = tmp_path / "columns.jsonl"
    path.write_text(json.dumps({"messages": chat, **row}))
    with pytest.raises(RowError, match=f"columns.jsonl:1.*{message}"):
        read_rows(path)
