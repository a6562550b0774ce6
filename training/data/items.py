"""What a row's media are, one by one: files, bytes that lay in a table, and views of either."""

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path


@dataclass(frozen=True)
class Blob:
    """An encoded picture or clip that lay in a table, not in a file of its own.

    Attributes:
        data: its bytes (png, jpeg, wav, flac and so on).
        name: how errors call it.
    """

    data: bytes = field(repr=False)
    name: str = field(default="bytes", compare=False)

    @cached_property
    def key(self) -> str:
        """The content's name, see `content_key`."""
        return hashlib.sha256(self.data).hexdigest()[:32]

    def __hash__(self) -> int:
        return hash(self.key)

    def __str__(self) -> str:
        return self.name


Medium = Path | Blob


@dataclass(frozen=True)
class View:
    """A medium as it is drawn the `number`th time, from 1; the medium itself is view 0 and stays what it is.

    Attributes:
        path: the medium.
        number: which view.
        mark: names the settings of the draw; with the medium's content and the number it decides the view.
    """

    path: Medium
    number: int
    mark: str


Item = Medium | View


def content_key(medium: Medium) -> str:
    """The content's name: a hash of its bytes."""
    if isinstance(medium, Blob):
        return medium.key
    return hashlib.sha256(medium.read_bytes()).hexdigest()[:32]


def readable(medium: Medium) -> Path | bytes:
    """What `load_picture` and `load_clip` take."""
    return medium.data if isinstance(medium, Blob) else medium
