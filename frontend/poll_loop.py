"""The launcher's loop: one poll over descriptors and ZMQ sockets, and timers. It sleeps while nothing happens."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable

import zmq

from ipc.clock import now_s

Handler = Callable[[], None]


class PollLoop:
    """Handlers by what they wait for, and actions by when they are due; `turn` calls those whose time has come."""

    def __init__(self) -> None:
        self._poller = zmq.Poller()
        self._handlers: dict[object, Handler] = {}
        self._timers: list[tuple[float, int, Handler]] = []
        self._timer_ids = itertools.count()

    def watch(self, source: int | zmq.Socket[bytes], handler: Handler) -> None:
        self._handlers[source] = handler
        self._poller.register(source, zmq.POLLIN)

    def unwatch(self, source: int | zmq.Socket[bytes]) -> None:
        if self._handlers.pop(source, None) is not None:
            self._poller.unregister(source)

    def after(self, delay_s: float, action: Handler) -> None:
        heapq.heappush(self._timers, (now_s() + delay_s, next(self._timer_ids), action))

    def turn(self) -> None:
        """Sleep until something happens or is due, and deal with it."""
        timeout_ms = None
        if self._timers:
            timeout_ms = int(max(0.0, self._timers[0][0] - now_s()) * 1e3) + 1
        ready = [(source, self._handlers[source]) for source, _ in self._poller.poll(timeout_ms)]
        for source, handler in ready:
            # An earlier handler of this turn may have closed it, and what it opened may have the same number.
            if self._handlers.get(source) is handler:
                handler()
        while self._timers and self._timers[0][0] <= now_s():
            heapq.heappop(self._timers)[2]()
