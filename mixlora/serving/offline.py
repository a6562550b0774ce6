"""Rows of a data set in, answers out: what Ray Data, or whatever else hands out batches, calls for each of them."""

from pathlib import Path
from typing import Any

from mixlora.chat import ChatSession
from mixlora.rows import Row, question

CHECKED = ("prompt", "images", "audio")


class Answerer:
    """A checkpoint that answers batches of rows; one object a process holds it.

    Ray itself is not needed here: its `map_batches` makes an object in each of its workers, and calls it.

    Args:
        model: a checkpoint folder, which every worker can read.
        folder: what relative media paths count from; every worker reads the files itself.
        max_new_tokens: the longest answer.
    """

    def __init__(self, model: str | Path, folder: str | Path = ".", max_new_tokens: int = 64) -> None:
        self.session = ChatSession.from_pretrained(model, max_new_tokens)
        self.folder = Path(folder)

    def __call__(self, batch: Any) -> Any:
        """A table of rows as `mixlora eval` reads them, with the columns `answer`, `modality` and `adapter` added.

        Args:
            batch: a `pyarrow.Table` with any of the columns `prompt`, `images` and `audio`; others stay as they are.

        Raises:
            RowError: a row asks nothing, or a file can't be read; the message names it.
        """
        rows = [self._question(row, number) for number, row in enumerate(batch.to_pylist())]
        answers = self.session.answer_batch(rows) if rows else []
        for name, values in (
            ("answer", [one.text for one in answers]),
            ("modality", [one.modality for one in answers]),
            ("adapter", [one.adapter or "none" for one in answers]),
        ):
            batch = batch.append_column(name, [values])
        return batch

    def _question(self, row: dict[str, Any], number: int) -> Row:
        asked = {name: row[name] for name in CHECKED if row.get(name) is not None}
        return question(asked, self.folder, f"row {number} of a batch ({asked})", text_field="prompt")
