"""What is wrong with a file of training rows, all of it at once."""

from collections.abc import Iterator
from pathlib import Path

from mixlora.modeling.audio_processing_mixlora import load_clip
from mixlora.modeling.image_processing_mixlora import load_picture
from mixlora.training.data.rows import Row, RowError, scan_rows


def check_file(path: Path, media: bool = False) -> Iterator[str | None]:
    """For each row what is wrong with it, or None.

    Args:
        path: JSON lines.
        media: open the row's pictures and clips too; the file alone is looked for otherwise.

    Raises:
        FileNotFoundError: no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    for found in scan_rows(path):
        yield str(found) if isinstance(found, RowError) else (_media_fault(found) if media else None)


def _media_fault(row: Row) -> str | None:
    """The first picture or clip of a row that can't be read."""
    for kind, paths, load in (("picture", row.images, load_picture), ("clip", row.audio, load_clip)):
        for path in paths:
            try:
                load(path)
            except (ValueError, OSError) as error:
                return f"{row.source}: {kind} {path} can't be read: {error}"
    return None
