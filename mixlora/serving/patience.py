"""Connections that say nothing, or only the beginning of a request, do not stay."""

from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

SECONDS = 30.0


class Impatient(H11Protocol):
    """uvicorn's protocol for a connection; without a whole request head for `SECONDS` to twice that, it is closed.

    uvicorn has a limit for what comes between two requests only. Bodies have their own limit, see [`Guard`].
    """

    def connection_made(self, transport: Any) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._was_idle = False
        self._timer = self.loop.call_later(SECONDS, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        super().connection_lost(exc)

    def _look(self) -> None:
        is_idle = self.cycle is None or self.cycle.response_complete
        if is_idle and self._was_idle:
            self.transport.close()
            return
        self._was_idle = is_idle
        self._timer = self.loop.call_later(SECONDS, self._look)
