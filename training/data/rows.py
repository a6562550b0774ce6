"""Training rows: conversations, preferences or plain text; every fault names file and line."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixlora.training.data.items import Blob, Medium
from mixlora.training.data.tables import Raw, content_of, raw_rows

ROLES = ("system", "user", "assistant", "tool")
MEDIA = ("image", "audio")
KINDS = ("messages", "prompt", "text")
COLUMNS = {"image": ("images", "image"), "audio": ("audios", "audio")}
"""Columns of a row that hold media of the parts that name none, in order of appearance."""


class RowError(ValueError):
    """A row that can't be used, named by file and line.

    Attributes:
        source: the same by itself, where it is known.
    """

    source: str = ""


@dataclass(frozen=True)
class Row:
    """One training row.

    Attributes:
        source: `file:line`.
        messages: the conversation as a chat template takes it, media parts without their media; None for plain text.
            Of a preference, the prompt with the chosen answer.
        rejected: of a preference, the prompt with the rejected answer.
        text: plain text for language modelling; None for a conversation.
        images: pictures in order of appearance.
        audio: clips in order of appearance.
        task: a free label.
    """

    source: str
    messages: list[dict[str, Any]] | None = None
    text: str | None = None
    images: tuple[Medium, ...] = ()
    audio: tuple[Medium, ...] = ()
    task: str = ""
    rejected: list[dict[str, Any]] | None = None


def read_rows(path: Path, limit: int = 0) -> list[Row]:
    """All rows of a file or folder, or the first `limit`.

    Raises:
        FileNotFoundError: no such file.
        RowError: a line that is not a row, or names a media file that is missing.
    """
    rows: list[Row] = []
    for found in scan_rows(path):
        if isinstance(found, RowError):
            raise found
        rows.append(found)
        if len(rows) == limit:
            break
    if not rows:
        raise RowError(f"{path}: no rows")
    return rows


def scan_rows(path: Path | str, split: str = "train") -> Iterator[Row | RowError]:
    """Every row of what `raw_rows` reads, or what is wrong with it."""
    return map(parsed, raw_rows(str(path), split))


def parsed(raw: Raw) -> Row | RowError:
    """One row, or what is wrong with it."""
    try:
        return _parse(raw)
    except RowError as error:
        error.source = raw.source
        return error


def _parse(row: Raw) -> Row:
    source = row.source
    try:
        raw = content_of(row)
    except ValueError as error:  # also what is not UTF-8
        raise RowError(f"{source}: not JSON: {error}") from error
    except RecursionError as error:
        raise RowError(f"{source}: not JSON that can be read: it is nested too deeply") from error
    if not isinstance(raw, dict) or sum(kind in raw for kind in KINDS) != 1:
        raise RowError(
            f"{source}: expected an object with one of messages, text, or prompt (with chosen and rejected)"
        )
    task = str(raw.get("task", ""))
    if "text" in raw:
        if not isinstance(raw["text"], str) or not raw["text"].strip():
            raise RowError(f"{source}: text must be a string that is not empty, got {raw['text']!r:.80}")
        return Row(source, text=_written(raw["text"], f"{source}: text"), task=task)
    field = "messages" if "messages" in raw else "prompt"
    media = _Media(raw, source, row.folder)
    messages = _messages(raw[field], f"{source}: {field}", media)
    media.check_all_used()
    images, audio = (tuple(media.found[kind]) for kind in MEDIA)
    if field == "prompt":
        chosen, rejected = (_answer(raw.get(name), f"{source}: {name}") for name in ("chosen", "rejected"))
        if chosen == rejected:
            raise RowError(f"{source}: chosen and rejected are the same answer")
        return Row(source, [*messages, chosen], None, images, audio, task, [*messages, rejected])
    if not any(message["role"] == "assistant" for message in messages):
        raise RowError(f"{source}: no assistant message to learn from")
    return Row(source, messages, None, images, audio, task)


class _Media:
    """Gathers a row's media in order of appearance.

    Attributes:
        found: kind -> media of the parts so far.
    """

    def __init__(self, raw: dict[str, Any], source: str, folder: Path):
        self.source, self.folder = source, folder
        self.found: dict[str, list[Medium]] = {kind: [] for kind in MEDIA}
        self.columns = {kind: self._column(raw, kind) for kind in MEDIA}

    @staticmethod
    def _column(raw: dict[str, Any], kind: str) -> list[Any]:
        given: Any = next((raw[name] for name in COLUMNS[kind] if name in raw), [])
        return list(given) if isinstance(given, list) else [given]

    def take(self, kind: str, part: dict[str, Any], where: str) -> None:
        """The medium of a part: the one that it names, or the next of the row's column."""
        given = [part[key] for key in ("path", "bytes", kind) if part.get(key) is not None]
        if not given and self.columns[kind]:
            given = [self.columns[kind].pop(0)]
        if len(given) != 1:
            raise RowError(
                f"{where}: expected a text part with text, or an image or audio part with path, got {part!r:.80}"
            )
        self.found[kind].append(self._medium(kind, given[0], where))

    def _medium(self, kind: str, given: Any, where: str) -> Medium:
        """A file, or the bytes of one: as `datasets` stores it, both may be there, and bytes count."""
        if isinstance(given, dict):
            given = given.get("bytes") or given.get("path")
        if isinstance(given, bytes):
            return Blob(given, f"{where}: its {kind}")
        if not isinstance(given, str):
            raise RowError(f"{where}: expected a path or bytes of its {kind}, got {given!r:.80}")
        file = self.folder / given  # an absolute path stays as it is
        if "\0" in given or not file.is_file():
            raise RowError(f"{where}: no {kind} file at {file}")
        return file

    def check_all_used(self) -> None:
        """Raises RowError where a column holds more media than the messages have parts for."""
        for kind, left in self.columns.items():
            if left:
                raise RowError(f"{self.source}: {len(left)} more of {kind} than the messages have parts for")


def _answer(raw: Any, where: str) -> dict[str, Any]:
    """The assistant's message of a preference, given as a string or as that one message in a list."""
    if isinstance(raw, list) and len(raw) == 1 and isinstance(raw[0], dict) and raw[0].get("role") == "assistant":
        raw = raw[0].get("content")
    if not isinstance(raw, str) or not raw.strip():
        raise RowError(
            f"{where}: expected an answer, a string that is not empty or one assistant message, got {raw!r:.80}"
        )
    return {"role": "assistant", "content": _written(raw, where)}


def _written(text: str, where: str) -> str:
    """Text that can be encoded.

    Raises:
        RowError: halves of characters, as JSON's escapes can make them.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError(f"{where}: half a character that no encoding has: {error}") from error
    return text


def _messages(raw: Any, where: str, media: _Media) -> list[dict[str, Any]]:
    """Messages with their media parts emptied; the media are added to `media`."""
    if not isinstance(raw, list) or not raw:
        raise RowError(f"{where} must be a list that is not empty")
    return [_message(message, f"{where} {i}", media) for i, message in enumerate(raw)]


def _message(raw: Any, where: str, media: _Media) -> dict[str, Any]:
    if not isinstance(raw, dict) or raw.get("role") not in ROLES:
        raise RowError(f"{where}: expected a role of {', '.join(ROLES)}, got {raw!r:.80}")
    content = raw.get("content")
    if isinstance(content, str):
        return {**raw, "content": _written(content, where)}
    if not isinstance(content, list):
        raise RowError(f"{where}: content must be a string or a list of parts, got {content!r:.80}")
    parts = [_part(part, f"{where}, part {i}", media) for i, part in enumerate(content)]
    return {**raw, "content": parts}


def _part(raw: Any, where: str, media: _Media) -> dict[str, Any]:
    kind = raw.get("type") if isinstance(raw, dict) else None
    if kind == "text" and isinstance(raw.get("text"), str):
        return {"type": "text", "text": _written(raw["text"], where)}
    if kind not in MEDIA:
        raise RowError(
            f"{where}: expected a text part with text, or an image or audio part with path, got {raw!r:.80}"
        )
    media.take(kind, raw, where)
    return {"type": kind}
