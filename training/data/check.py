"""What is wrong with training rows: all of it at once, or counted while a stage reads them."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from mixlora.modeling.audio_processing_mixlora import load_clip
from mixlora.modeling.image_processing_mixlora import load_picture
from mixlora.training.data.items import Medium, readable
from mixlora.training.data.rows import Row, RowError, scan_rows

Known = Callable[[str, Medium], bool]
"""Kind (image, audio) and medium -> whether it was read before, and need not be opened."""


class BrokenRows:
    """Names each row that can't be used, once, and counts them.

    Args:
        limit: how many are passed over; one more ends the run.

    Attributes:
        faults: what was wrong, by the row's source.
    """

    def __init__(self, limit: int = 0):
        self.limit = limit
        self.faults: dict[str, str] = {}

    def report(self, source: str, fault: str) -> None:
        """Notes a row, known by where it lies.

        Raises:
            RowError: it is one too many.
        """
        if source in self.faults:  # a stream passes a row again in its next round
            return
        self.faults[source] = fault
        if len(self.faults) > self.limit:
            if not self.limit:
                raise RowError(fault)
            raise RowError(f"{fault}; with this, {len(self.faults)} rows are broken, and max_broken is {self.limit}")
        print(f"  broken row {len(self.faults)}: {fault}")

    def parsed(self, rows: Iterable[Row | RowError]) -> Iterator[Row]:
        """Those that are rows."""
        for row in rows:
            if isinstance(row, RowError):
                self.report(row.source, str(row))
            else:
                yield row

    def opened(self, rows: Iterable[Row], known: Known | None = None) -> Iterator[Row]:
        """Those whose media can be read; what is `known` is not opened."""
        for row in rows:
            if fault := media_fault(row, known):
                self.report(row.source, fault)
            else:
                yield row


def check_file(path: Path | str, media: bool = False, split: str = "train") -> Iterator[str | None]:
    """For each row what is wrong with it, or None.

    Args:
        path: rows, as `raw_rows` reads them.
        media: open the row's pictures and clips too; the file alone is looked for otherwise.
        split: of a data set.

    Raises:
        FileNotFoundError: no such file.
    """
    for found in scan_rows(path, split):
        yield str(found) if isinstance(found, RowError) else (media_fault(found) if media else None)


def media_fault(row: Row, known: Known | None = None) -> str | None:
    """The first picture or clip of a row that can't be read."""
    for kind, media, load in (("image", row.images, load_picture), ("audio", row.audio, load_clip)):
        for medium in media:
            if known is not None and known(kind, medium):
                continue
            try:
                load(readable(medium))
            except (ValueError, OSError) as error:
                noun = {"image": "picture", "audio": "clip"}[kind]
                return f"{row.source}: {noun} {medium} can't be read: {error}"
    return None
