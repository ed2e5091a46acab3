"""A DEALER on an event loop: what comes is called out, what goes never blocks, and a peer that is gone is noticed.

Owned by a Session. Knows no message: bytes in, bytes out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

import zmq
from zmq.utils.monitor import recv_monitor_message

from ipc.auth import ClientKeys
from ipc.sockets import connect_dealer, new_identity

_MESSAGES_PER_TURN: Final = 64  # then other callbacks of the loop run


class Link:
    """One socket after the other to the same endpoint, each under a new identity. `open` and `close` may alternate."""

    def __init__(
        self,
        endpoint: str,
        keys: ClientKeys | None,
        on_message: Callable[[bytes], None],
        on_gone: Callable[[], None],
    ) -> None:
        """Both are called on the event loop, and may open and close the link. `on_gone`: the peer has hung up; ZMQ
        would connect again, to one that does not know us."""
        self._endpoint, self._keys = endpoint, keys
        self._on_message, self._on_gone = on_message, on_gone
        self._loop: asyncio.AbstractEventLoop
        self._socket: zmq.Socket[bytes] | None = None
        self._monitor: zmq.Socket[bytes] | None = None  # tells when the socket's peer is gone
        self._drain_due = False

    @property
    def is_open(self) -> bool:
        return self._socket is not None

    def open(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        """Connect; call on the event loop. What is sent before there is a peer waits for it."""
        self._loop = asyncio.get_running_loop()
        self._socket = connect_dealer(context, self._endpoint, new_identity(), self._keys)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._loop.add_reader(self._socket.fileno(), self._drain)
        self._loop.add_reader(self._monitor.fileno(), self._watch)
        self._monitor.poll(0)  # ZMQ signals a descriptor only to one who has seen its socket empty

    def close(self, linger_ms: int = 0) -> None:
        """Throw the socket away with all that is queued in it; what it still has to send has `linger_ms` to leave."""
        socket, self._socket = self._socket, None
        if socket is not None:
            assert self._monitor is not None, "every socket has its monitor"
            self._loop.remove_reader(self._monitor.fileno())
            self._loop.remove_reader(socket.fileno())
            socket.disable_monitor()
            self._monitor.close(linger=0)
            socket.close(linger=linger_ms)

    def offer(self, payload: bytes) -> bool:
        """Send without blocking; False if the queue is full or the link closed."""
        if self._socket is None:
            return False
        try:
            self._socket.send(payload, zmq.NOBLOCK)
        except zmq.Again:
            return False
        finally:
            # ZMQ signals its descriptor once per change, and a send may have consumed the signal of a message.
            if not self._drain_due:
                self._drain_due = True
                self._loop.call_soon(self._drain)
        return True

    def _watch(self) -> None:
        while self._monitor is not None and not self._monitor.closed and self._monitor.poll(0):
            recv_monitor_message(self._monitor)
            self._on_gone()

    def _drain(self) -> None:
        self._drain_due = False
        for _ in range(_MESSAGES_PER_TURN):
            if self._socket is None:
                return
            try:
                payload = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._on_message(payload)
        self._drain_due = True
        self._loop.call_soon(self._drain)
