"""HTTP connections with a time limit for headers, which uvicorn does not have."""

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 10.0  # time for a client to send a request's header


class TimedConnection(H11Protocol):
    """A connection that is closed if a header does not arrive in time, so that no client keeps it without a request."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._end: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Starts the time of the first header."""
        super().connection_made(transport)
        self._check_time()

    def data_received(self, data: bytes) -> None:
        """Starts the time of a next header with its first bytes, and stops it with its last ones."""
        super().data_received(data)
        self._check_time()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops the time."""
        super().connection_lost(exc)
        self._stop()

    def _check_time(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._stop()
        elif self._end is None:
            self._end = self.loop.call_later(HEADER_SECONDS, self.transport.close)

    def _stop(self) -> None:
        if self._end is not None:
            self._end.cancel()
            self._end = None
