"""Training rows from JSONL: conversations, preferences or plain text; every fault names file and line."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROLES = ("system", "user", "assistant", "tool")
MEDIA = ("image", "audio")
KINDS = ("messages", "prompt", "text")


class RowError(ValueError):
    """A row that can't be used, named by file and line."""


@dataclass(frozen=True)
class Row:
    """One training row.

    Attributes:
        source: `file:line`.
        messages: the conversation as a chat template takes it, media parts without their media; None for plain text.
            Of a preference, the prompt with the chosen answer.
        rejected: of a preference, the prompt with the rejected answer.
        text: plain text for language modelling; None for a conversation.
        images: picture files in order of appearance.
        audio: clip files in order of appearance.
        task: a free label.
    """

    source: str
    messages: list[dict[str, Any]] | None = None
    text: str | None = None
    images: tuple[Path, ...] = ()
    audio: tuple[Path, ...] = ()
    task: str = ""
    rejected: list[dict[str, Any]] | None = None


def read_rows(path: Path, limit: int = 0) -> list[Row]:
    """All rows of a JSONL file, or the first `limit`.

    Raises:
        FileNotFoundError: no such file.
        RowError: a line that is not a row, or names a media file that is missing.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no training data at {path}; prepare it first, or change the recipe's path")
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


def scan_rows(path: Path) -> Iterator[Row | RowError]:
    """Every line of a JSONL file as its row, or as what is wrong with it."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield _parse(line, f"{path}:{number}", path.parent)
                except RowError as error:
                    yield error


def _parse(line: bytes, source: str, folder: Path) -> Row:
    """One line as a `Row`."""
    try:
        raw = json.loads(line)
    except ValueError as error:  # also what is not UTF-8
        raise RowError(f"{source}: not JSON: {error}") from error
    if not isinstance(raw, dict) or sum(kind in raw for kind in KINDS) != 1:
        raise RowError(
            f"{source}: expected an object with one of messages, text, or prompt (with chosen and rejected)"
        )
    task = str(raw.get("task", ""))
    if "text" in raw:
        if not isinstance(raw["text"], str) or not raw["text"].strip():
            raise RowError(f"{source}: text must be a string that is not empty, got {raw['text']!r}")
        return Row(source, text=raw["text"], task=task)
    field = "messages" if "messages" in raw else "prompt"
    media: dict[str, list[Path]] = {kind: [] for kind in MEDIA}
    messages = _messages(raw[field], f"{source}: {field}", folder, media)
    images, audio = tuple(media["image"]), tuple(media["audio"])
    if field == "prompt":
        chosen, rejected = (_answer(raw.get(name), f"{source}: {name}") for name in ("chosen", "rejected"))
        if chosen == rejected:
            raise RowError(f"{source}: chosen and rejected are the same answer")
        return Row(source, [*messages, chosen], None, images, audio, task, [*messages, rejected])
    if not any(message["role"] == "assistant" for message in messages):
        raise RowError(f"{source}: no assistant message to learn from")
    return Row(source, messages, None, images, audio, task)


def _answer(raw: Any, where: str) -> dict[str, Any]:
    """The assistant's message of a preference, given as a string or as that one message in a list."""
    if isinstance(raw, list) and len(raw) == 1 and isinstance(raw[0], dict) and raw[0].get("role") == "assistant":
        raw = raw[0].get("content")
    if not isinstance(raw, str) or not raw.strip():
        raise RowError(
            f"{where}: expected an answer, a string that is not empty or one assistant message, got {raw!r:.80}"
        )
    return {"role": "assistant", "content": raw}


def _messages(raw: Any, where: str, folder: Path, media: dict[str, list[Path]]) -> list[dict[str, Any]]:
    """Messages with their media parts emptied; the media's files are appended to `media`."""
    if not isinstance(raw, list) or not raw:
        raise RowError(f"{where} must be a list that is not empty")
    return [_message(message, f"{where} {i}", folder, media) for i, message in enumerate(raw)]


def _message(raw: Any, where: str, folder: Path, media: dict[str, list[Path]]) -> dict[str, Any]:
    """A message with its media parts emptied; their files are appended to `media`."""
    if not isinstance(raw, dict) or raw.get("role") not in ROLES:
        raise RowError(f"{where}: expected a role of {', '.join(ROLES)}, got {raw!r:.80}")
    content = raw.get("content")
    if isinstance(content, str):
        return dict(raw)
    if not isinstance(content, list):
        raise RowError(f"{where}: content must be a string or a list of parts, got {content!r:.80}")
    parts = [_part(part, f"{where}, part {i}", folder, media) for i, part in enumerate(content)]
    return {**raw, "content": parts}


def _part(raw: Any, where: str, folder: Path, media: dict[str, list[Path]]) -> dict[str, Any]:
    kind = raw.get("type") if isinstance(raw, dict) else None
    if kind == "text" and isinstance(raw.get("text"), str):
        return {"type": "text", "text": raw["text"]}
    if kind not in MEDIA or not isinstance(raw.get("path"), str):
        raise RowError(
            f"{where}: expected a text part with text, or an image or audio part with path, got {raw!r:.80}"
        )
    file = folder / raw["path"]  # an absolute path stays as it is
    if not file.is_file():
        raise RowError(f"{where}: no {kind} file at {file}")
    media[kind].append(file)
    return {"type": kind}
