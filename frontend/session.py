"""One connection to a scheduler: the handshake, heartbeats, and what becomes of open sequences when it is lost.

Owned by a client's Replicas and used from its event loop only. Must never decode text, and never block: a send that
would is an UnavailableError. The other end may turn out to be a directory, which sends Members and takes no sequence.

A socket that loses its peer, or hears nothing for a while, is thrown away with all that is queued in it. The new one
says Hello under a new identity, and once it is welcome every open sequence is admitted again with the tokens it has: a
scheduler that was restarted continues it, and one that was only away has nothing left of the old connection. Sequences
fail if that takes too long. Until then their owner may have them continued elsewhere: `release` here, `adopt` there.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

import zmq

from frontend.flights import Flights
from frontend.inflight import Flight
from frontend.link import Link
from frontend.questions import AnswerT, Questions
from ipc.auth import ClientKeys, check_endpoint
from ipc.clock import now_ns
from ipc.errors import (
    CancelledError,
    ProtocolError,
    TandemError,
    UnavailableError,
    from_code,
)
from ipc.schema import (
    HEARTBEAT_LIMIT_S,
    HEARTBEAT_S,
    PROTOCOL_VERSION,
    RECONNECT_LIMIT_S,
    Abort,
    Draining,
    FrontendMessage,
    GetInvariants,
    GetStats,
    Goodbye,
    Heartbeat,
    Hello,
    Invariants,
    Member,
    Members,
    Paused,
    Rejected,
    Stats,
    Tokens,
    Welcome,
    decode_scheduler,
    encode,
)

_log: Final = logging.getLogger(__name__)

_GOODBYE_MS: Final = 200  # how long closing waits for the last message to leave
_RETRY_S: Final = 0.01  # until a full socket is tried again
_PEER: Final = -1  # the request_id of a Rejected that is about this peer itself


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How often to be heard of, and how long to wait for the other end."""

    heartbeat_s: float = HEARTBEAT_S
    heartbeat_limit_s: float = HEARTBEAT_LIMIT_S  # of silence; then the connection is made anew
    reconnect_limit_s: float = RECONNECT_LIMIT_S  # without a connection; then open sequences fail


PATIENCE: Final = Patience()


class Session:
    """The connection. `open` or `start` first; `close` last.

    After that `connected` tells whether the scheduler answers, `ready` whether it serves, and both change by
    themselves. The callbacks: `on_frame` with the number of each Tokens frame, counted from 1; `on_change` after
    anything that decides whether requests are taken; `on_load` with what the scheduler says of its load; `on_refused`
    with a sequence that the scheduler takes no more: True if it was taken elsewhere.
    """

    def __init__(
        self,
        endpoint: str,
        name: str,
        patience: Patience = PATIENCE,
        keys: ClientKeys | None = None,
        on_frame: Callable[[int], object] | None = None,
        context: zmq.Context[zmq.Socket[bytes]] | None = None,
    ) -> None:
        """`context`: shared with others and ended by its owner; None: one of its own."""
        check_endpoint(endpoint, keys)
        self.endpoint: Final = endpoint
        self.name: Final = name
        self.welcome: Welcome | None = None  # the last one
        self.last_stats: Stats | None = None
        self.connected = False
        self.draining = False
        self.paused = False  # its executor is being replaced
        self.members: list[Member] | None = None  # the last ones, if the other end is a directory
        self.on_change: Callable[[], None] | None = None
        self.on_load: Callable[[int, int, int], None] | None = None
        self.on_refused: Callable[[Flight], bool] | None = None
        self.count_left: Callable[[], int] | None = None  # what heartbeats say is left, if the other end is a directory
        self._shared_context = context
        self._heartbeat_s = patience.heartbeat_s
        self._max_silent_beats = math.ceil(patience.heartbeat_limit_s / patience.heartbeat_s)
        self._max_lost_beats = math.ceil(patience.reconnect_limit_s / patience.heartbeat_s)
        self._silent_beats = 0  # since this socket last heard anything
        self._lost_beats = 0  # since the connection was lost
        self._on_frame = on_frame
        self._frames = 0
        self._refusal: TandemError | None = None  # why the last Hello was not welcome
        self._flights = Flights()
        self._aborts: list[int] = []  # ids the scheduler has still to be told of
        self._stops: list[int] = []  # the same, of those that ended well
        self._unsent: deque[tuple[Flight, bool]] = deque()  # it has still to be told of, and whether as replayed
        self._questions = Questions()
        self.on_fan_out: Callable[[int, int], None] | None = None  # (start, rows), once readers have had their turn
        self._changed = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._link = Link(endpoint, keys, self._receive, lambda: self._reconnect("closed the connection"))
        self._flush_due = False
        self._beats: asyncio.Task[None] | None = None

    @property
    def ready(self) -> bool:
        return self.connected and self.welcome is not None and self.welcome.ready

    @property
    def takes_requests(self) -> bool:
        """New requests would run now."""
        return self.ready and not self.draining and not self.paused

    @property
    def refusal(self) -> TandemError | None:
        """Why the other end wants nothing to do with this client."""
        return self._refusal

    @property
    def open_sequences(self) -> int:
        return len(self._flights)

    async def open(self, timeout_s: float, wait_ready: bool) -> Welcome:
        """Connect and shake hands. Raises UnavailableError after `timeout_s`, ProtocolError for another version."""
        self.start()
        try:
            async with asyncio.timeout(timeout_s):
                while not (self.ready if wait_ready else self.connected):
                    if self._refusal is not None:
                        raise self._refusal
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError as error:
            what = "was not ready" if self.connected else "did not answer"
            await self.close()
            raise UnavailableError(f"the scheduler at {self.endpoint} {what} within {timeout_s} s") from error
        except BaseException:
            await self.close()
            raise
        assert self.welcome is not None, "connected without a Welcome"
        return self.welcome

    def start(self) -> None:
        """Connect, without waiting for an answer."""
        self._loop = asyncio.get_running_loop()
        self._context = self._shared_context or zmq.Context()
        self._connect()
        self._beats = self._loop.create_task(self._beat(), name=f"heartbeat {self.name}")

    async def close(self, error: TandemError | None = None) -> None:
        """Say Goodbye, fail what is still open with `error`, release the socket. May be called twice."""
        if self._context is None:
            return
        context, self._context = self._context, None
        if self._beats is not None:
            self._beats.cancel()
        error = error or CancelledError("the client was closed")
        self._flights.fail_all(error)
        self._questions.fail(error)
        self._offer(Goodbye())
        self._link.close(_GOODBYE_MS)
        self.connected = False
        if context is not self._shared_context:
            # Waits until the Goodbye has left, at most _GOODBYE_MS.
            await asyncio.to_thread(context.term)

    def submit(self, flights: Iterable[Flight]) -> None:
        """Send new sequences. Raises UnavailableError if the engine is starting, draining, gone or swamped."""
        if self._context is None:
            raise UnavailableError("the client is closed")
        if not self.connected:
            raise UnavailableError(f"the scheduler at {self.endpoint} does not answer")
        if self.draining:
            raise UnavailableError("the engine is shutting down")
        if not self.ready:
            raise UnavailableError("the engine is still starting")
        flights = list(flights)
        for flight in flights:
            self._flights.add(flight, home=self)
        for sent, flight in enumerate(flights):
            if self._unsent or not self._offer(flight.admit()):
                if not sent:
                    self.abort(flights)
                    raise UnavailableError("the scheduler takes no more messages just now")
                self._unsent.extend((rest, False) for rest in flights[sent:])  # one request may exceed its socket
                self._flush()
                break

    def release(self) -> list[Flight]:
        """Give up all that is open here, to be adopted elsewhere."""
        flights = list(self._flights)
        self._unsent.clear()
        self.abort(flights)
        return flights

    def adopt(self, flights: Iterable[Flight]) -> None:
        """Continue sequences that another session released; if this one is away they wait for it."""
        for flight in flights:
            self._flights.add(flight, home=self)
            self._unsent.append((flight, True))
        self._flush()

    def abort(self, flights: Iterable[Flight], *, stopped: bool = False) -> None:
        """End sequences early; those that ended already are left alone. `stopped`: a stop string was found."""
        for flight in flights:
            if self._flights.pop(flight.request_id) is not None:
                (self._stops if stopped else self._aborts).append(flight.request_id)
        if (self._aborts or self._stops) and not self._flush_due and self._link.is_open:
            self._flush_due = True
            self._loop.call_soon(self._flush)

    async def stats(self, timeout_s: float, restart_longest: bool = False) -> Stats:
        """Ask the scheduler. What it answers is newer than every token received before the call."""
        return await self._ask(GetStats(restart_longest), Stats, timeout_s)

    async def invariants(self, timeout_s: float) -> Invariants:
        """Ask the scheduler, which answers only if the engine has debug endpoints."""
        return await self._ask(GetInvariants(), Invariants, timeout_s)

    async def _ask(self, question: FrontendMessage, kind: type[AnswerT], timeout_s: float) -> AnswerT:
        if not self.connected or not self._offer(question):
            raise UnavailableError(f"the scheduler at {self.endpoint} does not answer")
        return await self._questions.answer_to(kind, timeout_s)

    def _connect(self) -> None:
        assert self._context is not None, "connected after close"
        self._link.open(self._context)
        self._silent_beats = 0
        self._refusal = None
        self._offer(Hello(PROTOCOL_VERSION, "frontend", self.name, os.getpid()))

    def _offer(self, message: FrontendMessage) -> bool:
        """Send without blocking; False if the queue is full."""
        return self._link.offer(encode(message))

    def _receive(self, payload: bytes) -> None:
        self._silent_beats = 0
        try:
            message = decode_scheduler(payload)
            self._HANDLERS[type(message)](self, message)
        except Exception as error:  # tokens may be lost, so no stream may go on as if none were
            _log.exception("lost step with the scheduler at %s", self.endpoint)
            self._flights.fail_all(error if isinstance(error, TandemError) else TandemError("internal error"))
            self._reconnect("sent what cannot be used")

    def _on_tokens(self, frame: Tokens) -> None:
        self._frames += 1
        if self._on_frame is not None:
            self._on_frame(self._frames)
        if self.on_load is not None and frame.running >= 0:
            self.on_load(frame.running, frame.waiting, frame.queued_tokens)
        start_ns = 0 if self.on_fan_out is None else now_ns()
        rows = self._flights.take(frame)
        if self.on_fan_out is not None:
            self._loop.call_soon(self.on_fan_out, start_ns, rows)

    def _on_rejected(self, message: Rejected) -> None:
        error = from_code(message.code, message.message, message.param)
        if message.request_id != _PEER:
            flight = self._flights.pop(message.request_id)
            if flight is None:
                return
            if isinstance(error, UnavailableError) and self.on_refused is not None and self.on_refused(flight):
                return
            self._flights.fail(flight, error)
        elif self.connected and isinstance(error, UnavailableError):
            self._reconnect("does not know this client any more")
        elif self.connected:
            self._flights.fail_all(error)
            self._reconnect("refused this client")
        else:
            self._refusal = error
            self._notify()

    def _notify(self) -> None:
        self._changed.set()
        if self.on_change is not None:
            self.on_change()

    def _on_welcome(self, message: Welcome) -> None:
        if message.version != PROTOCOL_VERSION:
            self._refusal = ProtocolError(
                f"the scheduler speaks protocol {message.version}, this client {PROTOCOL_VERSION}"
            )
        else:
            self.welcome = message
            self.paused = False
            if not self.connected:
                self.connected = True
                self.draining = False
                self._aborts, self._stops = [], []
                self._unsent = deque((flight, True) for flight in self._flights)
                self._flush()
        self._notify()

    def _on_members(self, message: Members) -> None:
        self.connected = True
        if message.members != self.members:
            self.members = message.members
            self._notify()

    def _on_stats(self, message: Stats) -> None:
        self.last_stats = message
        self._set_draining(message.draining)
        if self.on_load is not None:
            self.on_load(message.running, message.waiting, message.queued_tokens)
        self._questions.answered(message)

    def _on_invariants(self, message: Invariants) -> None:
        self._questions.answered(message)

    def _on_draining(self, message: Draining) -> None:
        self._set_draining(True)

    def _set_draining(self, draining: bool) -> None:
        if draining != self.draining:
            self.draining = draining
            self._notify()

    def _on_paused(self, message: Paused) -> None:
        self.paused = True
        self._notify()

    _HANDLERS: Final[dict[type, Callable[[Any, Any], None]]] = {
        Tokens: _on_tokens,
        Rejected: _on_rejected,
        Welcome: _on_welcome,
        Stats: _on_stats,
        Invariants: _on_invariants,
        Draining: _on_draining,
        Paused: _on_paused,
        Members: _on_members,
    }

    def _flush(self) -> None:
        """Tell the scheduler of sequences to take up and to abort, as much as its socket takes now."""
        self._flush_due = False
        if not self.connected:
            return
        while self._unsent:
            flight, replay = self._unsent[0]
            if flight in self._flights and not self._offer(flight.admit(replay=replay)):
                self._flush_due = True
                self._loop.call_later(_RETRY_S, self._flush)
                return
            self._unsent.popleft()
        if (self._aborts or self._stops) and self._offer(Abort(self._aborts, self._stops)):
            self._aborts, self._stops = [], []

    async def _beat(self) -> None:
        """Counts beats without an answer, not time: a process that was stopped finds its peer alive."""
        while True:
            await asyncio.sleep(self._heartbeat_s)
            self._silent_beats += 1
            self._lost_beats += 1
            if self.connected:
                self._lost_beats = 0
                self._flush()
                self._offer(Heartbeat(now_ns(), -1 if self.count_left is None else self.count_left()))
            if self._lost_beats > self._max_lost_beats:
                self._lost_beats = 0
                self._flights.fail_all(UnavailableError(f"the scheduler at {self.endpoint} does not answer"))
            if self._silent_beats > self._max_silent_beats:
                self._reconnect("does not answer")

    def _reconnect(self, why: str) -> None:
        """Start over on a new socket; what is open is admitted again when that is welcome."""
        if self.connected:
            _log.warning("the scheduler at %s %s; %d open requests wait", self.endpoint, why, len(self._flights))
        self.connected = False
        self._aborts, self._stops = [], []
        self._unsent.clear()
        self._questions.fail(UnavailableError(f"the scheduler at {self.endpoint} {why}"))
        self._link.close()
        self._connect()
        self._notify()
