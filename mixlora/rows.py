"""Rows of JSON lines that hold a question: text, pictures, clips. `mixlora chat --batch` and `mixlora eval` read them.

Reading checks every field and every path, and names the file and the line of what is wrong. Media are loaded later, by
`Row.turn`, and a picture or clip that can't be read names its line too.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MEDIA_FIELDS = ("images", "audio")


class RowError(ValueError):
    """A row that can't be used; the message begins with its file and line."""


@dataclass(frozen=True)
class Row:
    """One question. At least one of its fields is filled."""

    text: str | None = None
    images: tuple[Path, ...] = ()
    audio: tuple[Path, ...] = ()
    where: str = "this question"
    """The file and line that errors name."""

    def turn(self) -> dict[str, Any]:
        """The user's turn for a chat template: pictures, then clips, then text, with the media loaded.

        Raises:
            RowError: a picture or a clip can't be read.
        """
        if not self.images and not self.audio:
            return {"role": "user", "content": self.text}
        content: list[dict[str, Any]] = [{"type": "image", "image": self._picture(path)} for path in self.images]
        content += [{"type": "audio", "audio": self._clip(path)} for path in self.audio]
        if self.text is not None:
            content.append({"type": "text", "text": self.text})
        return {"role": "user", "content": content}

    def _picture(self, path: Path) -> Any:
        from mixlora.modeling.image_processing_mixlora import load_picture

        return self._load(load_picture, path)

    def _clip(self, path: Path) -> Any:
        from mixlora.modeling.audio_processing_mixlora import RATE, load_clip

        return self._load(load_clip, path), RATE

    def _load(self, load: Callable[..., Any], path: Path) -> Any:
        where = f"{self.where}: {path}"
        if not path.is_file():
            raise RowError(f"{where}: no such file")
        try:
            return load(path, where=where)
        except ValueError as error:  # begins with where
            raise RowError(str(error)) from error


def read_objects(path: Path, fields: set[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (file and line, object) of every line that is not blank.

    Raises:
        RowError: a missing or empty file, a line that is no JSON object, or a field that is not among `fields`.
    """
    if not path.is_file():
        raise RowError(f"{path}: no such file")
    found = False
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        where = f"{path}, line {number}"
        try:
            row = json.loads(line.decode("utf-8-sig")) if line.strip() else None
        except ValueError as error:
            raise RowError(f"{where}: not JSON in UTF-8: {error}") from error
        if not line.strip():
            continue
        if not isinstance(row, dict):
            raise RowError(f"{where}: expected a JSON object, got {type(row).__name__}")
        if unknown := sorted(set(row) - fields):
            raise RowError(f"{where}: unknown field {', '.join(unknown)}; known are {', '.join(sorted(fields))}")
        found = True
        yield where, row
    if not found:
        raise RowError(f"{path}: no rows")


def question(row: dict[str, Any], folder: Path, where: str, text_field: str = "text") -> Row:
    """The question of a row; relative media paths count from `folder`.

    Raises:
        RowError: a field of the wrong type, a file that is not there, or nothing asked.
    """
    text = row.get(text_field)
    if text is not None and not isinstance(text, str):
        raise RowError(f"{where}: {text_field} must be a string, got {type(text).__name__}")
    images, audio = (_paths(row, field, folder, where) for field in MEDIA_FIELDS)
    if not (text or "").strip() and not images and not audio:
        raise RowError(f"{where}: nothing is asked: {text_field}, images and audio are all empty")
    return Row(text, images, audio, where)


def _paths(row: dict[str, Any], field: str, folder: Path, where: str) -> tuple[Path, ...]:
    """The media files that a field lists."""
    names = row.get(field)
    names = [] if names is None else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise RowError(f"{where}: {field} must be a list of paths")
    paths = tuple(folder / name for name in names)
    for path in paths:
        if not path.is_file():
            raise RowError(f"{where}: {field}: no such file: {path}")
    return paths


def read_questions(path: Path) -> list[Row]:
    """The rows `{"text"?, "images"?, "audio"?}` of a JSON lines file."""
    return [question(row, path.parent, where) for where, row in read_objects(path, {"text", *MEDIA_FIELDS})]
