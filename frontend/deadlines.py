"""How long a request may wait in the queue, and how long it may take as a whole.

Made by the client for one request. Running out of time is a typed error, never a finish reason: a cut answer must not
look like a whole one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from frontend.inflight import Flight, Mailbox
from ipc.errors import QueueTimeoutError, RequestTimeoutError


class Deadlines:
    """Both limits of one request, in seconds from now; None is no limit. The clock is the event loop's: monotonic."""

    def __init__(self, flights: Sequence[Flight], *, request_s: float | None, queue_s: float | None) -> None:
        self._loop = asyncio.get_running_loop()
        self._flights = flights
        self._request_s, self._queue_s = request_s, queue_s
        self._start = self._loop.time()

    async def wait(self, mailbox: Mailbox) -> list[Flight]:
        """`mailbox.wait`. Raises QueueTimeoutError or RequestTimeoutError when the time is up."""
        if self._request_s is None and self._queue_s is None:
            return await mailbox.wait()
        while True:
            try:
                return await mailbox.wait(self._next())
            except TimeoutError:
                self._raise_if_over(self._loop.time() - self._start)

    def _next(self) -> float | None:
        """When to look again."""
        limits = [self._request_s, self._queue_s if self._is_queued() else None]
        return min((self._start + limit for limit in limits if limit is not None), default=None)

    def _is_queued(self) -> bool:
        """Whether a sequence waits that has not run yet; one that was preempted has."""
        return any(flight.waits for flight in self._flights)

    def _raise_if_over(self, elapsed_s: float) -> None:
        if self._queue_s is not None and elapsed_s >= self._queue_s and self._is_queued():
            raise QueueTimeoutError(f"the request waited in the queue for {self._queue_s:g} s, the limit")
        if self._request_s is not None and elapsed_s >= self._request_s:
            raise RequestTimeoutError(f"the request did not finish within {self._request_s:g} s")
