"""Text that one thread writes and any thread or event loop reads while it comes."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from threading import Condition


class TextStream:
    """Pieces of text and, at the end, a reason or an error.

    One writer, any number of readers: each reader gets every piece, also those from before it came. Readers in threads
    wait on a condition, readers in event loops are woken by their own loop, so neither blocks the other.
    """

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._error: BaseException | None = None
        self._ended = False
        self._changed = Condition()
        self._loops: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    @property
    def text(self) -> str:
        """What was written so far."""
        with self._changed:
            return "".join(self._pieces)

    @property
    def ended(self) -> bool:
        """Whether the last piece was written."""
        return self._ended

    def write(self, piece: str) -> None:
        """Adds a piece; an empty one is dropped."""
        if piece:
            with self._changed:
                self._pieces.append(piece)
                self._wake()

    def end(self, error: BaseException | None = None) -> None:
        """Ends the stream; readers get `error` raised after the last piece. Later calls change nothing."""
        with self._changed:
            if not self._ended:
                self._error, self._ended = error, True
                self._wake()

    def wait(self, timeout: float | None = None) -> None:
        """Waits for the end.

        Raises:
            TimeoutError: it did not come within `timeout` seconds.
            Exception: what the writer ended with.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._ended, timeout):
                raise TimeoutError(f"no end of the answer within {timeout} seconds")
            if self._error is not None:
                raise self._error

    def __iter__(self) -> Iterator[str]:
        read = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._ended or len(self._pieces) > read)  # noqa: B023 (used at once)
                fresh, over = self._pieces[read:], self._ended
            yield from fresh
            read += len(fresh)
            if over:
                break
        self.wait()

    async def __aiter__(self) -> AsyncIterator[str]:
        changed = asyncio.Event()
        listener = (asyncio.get_running_loop(), changed)
        read = 0
        with self._changed:
            self._loops.append(listener)
        try:
            while True:
                changed.clear()  # before looking, so that nothing written meanwhile is slept through
                with self._changed:
                    fresh, over = self._pieces[read:], self._ended
                for piece in fresh:
                    yield piece
                read += len(fresh)
                if over:
                    break
                if not fresh:
                    await changed.wait()
        finally:
            with self._changed:
                self._loops.remove(listener)
        self.wait()

    def _wake(self) -> None:
        self._changed.notify_all()
        for loop, changed in self._loops:
            if not loop.is_closed():  # its reader went away with it
                loop.call_soon_threadsafe(changed.set)
