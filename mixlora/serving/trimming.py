"""Memory that was freed goes back to the system."""

import ctypes
import time
from collections.abc import Callable

SECONDS = 5.0
"""Between two times."""


class Trimmer:
    """Tells the C library now and then to give back what is free.

    Uploads are decoded in many threads, and glibc keeps the freed memory of each for that thread: a busy server would
    grow for a long time. Elsewhere than on glibc it does nothing.
    """

    def __init__(self) -> None:
        self._trim: Callable[[int], int] | None
        try:
            self._trim = ctypes.CDLL(None).malloc_trim
        except (AttributeError, OSError, TypeError):
            self._trim = None
        self._next = 0.0

    def __call__(self) -> None:
        """Gives it back, unless that was done a moment ago."""
        now = time.monotonic()
        if self._trim is not None and now >= self._next:
            self._trim(0)
            self._next = now + SECONDS
