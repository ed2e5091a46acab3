"""All replicas of an engine, as one: each sequence goes to one of them, and on to another when that one goes.

Owned by an AsyncClient and used from its event loop only. Knows who there is from the directory it connected to, or
from the scheduler it was sent to directly, which is then the only replica. Must never hold a sequence itself: each has
a session as its home, where it waits if nobody can take it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator
from functools import partial
from typing import Final

import msgspec
import zmq

from frontend.inflight import Flight
from frontend.questions import AnswerT
from frontend.router import Router
from frontend.session import PATIENCE, Patience, Session
from frontend.totals import total_stats
from ipc.auth import ClientKeys
from ipc.errors import ConfigError, TandemError, UnavailableError
from ipc.schema import Invariants, Member, Stats, Welcome

_log: Final = logging.getLogger(__name__)

_OTHERS_S: Final = 1.0  # once one replica serves, a new client waits so long for the others
_ONLY: Final = 0  # the number of a replica that was connected to directly


class Replicas:
    """The connections of one client. `open` first, `close` last; in between members come and go by themselves."""

    def __init__(
        self,
        endpoint: str,
        name: str,
        patience: Patience = PATIENCE,
        keys: ClientKeys | None = None,
        on_frame: Callable[[int], object] | None = None,
    ) -> None:
        """`on_frame`: called with the number of each frame of tokens, counted from 1 over all replicas."""
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._make_session = partial(
            Session,
            name=name,
            patience=patience,
            keys=keys,
            on_frame=None if on_frame is None else self._count_frame,
        )
        self._on_frame = on_frame
        self._frames = 0
        self._contact = self._make_session(endpoint)  # the directory, or the only replica
        self._sessions: dict[int, Session] = {}
        self._leaving: list[Session] = []  # no longer members, with open sequences that nobody else takes yet
        self._router = Router()
        self._epochs: dict[int, int] = {}  # executor life that the router believes in
        self._closing: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self.welcome: Welcome | None = None  # what the engine said of itself last; the least context of any replica
        self.on_fan_out: Callable[[int, int], None] | None = None  # as of a session; set before `open`

    # -- what there is

    @property
    def sessions(self) -> dict[int, Session]:
        """The members by number."""
        return self._sessions

    @property
    def connected(self) -> bool:
        """A replica answers."""
        return any(session.connected for session in self._sessions.values())

    @property
    def ready(self) -> bool:
        """A replica serves."""
        return any(session.ready for session in self._sessions.values())

    @property
    def draining(self) -> bool:
        """The engine was told to stop, or every replica that answers drains."""
        if self._told_to_drain:
            return True
        there = [session for session in self._sessions.values() if session.connected]
        return bool(there) and all(session.draining for session in there)

    @property
    def _told_to_drain(self) -> bool:
        """By the directory: replicas that joined the engine would take more."""
        return self._contact.members is not None and self._contact.draining

    @property
    def open_sequences(self) -> int:
        return sum(session.open_sequences for session in self._all())

    @property
    def last_stats(self) -> dict[int, Stats]:
        """The statistics that came last, of each replica that answers."""
        return {
            number: session.last_stats
            for number, session in self._sessions.items()
            if session.connected and session.last_stats is not None
        }

    def _all(self) -> Iterator[Session]:
        yield from self._sessions.values()
        yield from self._leaving
        if self._contact not in self._sessions.values():
            yield self._contact

    # -- life

    async def open(self, timeout_s: float, wait_ready: bool) -> Welcome:
        """Connect and shake hands; may be tried again. Raises UnavailableError after `timeout_s`, or ProtocolError."""
        self._context = zmq.Context()
        self._sessions, self._contact = {}, self._make_session(self._contact.endpoint, context=self._context)
        self._contact.on_change = self._on_contact
        self._contact.count_left = lambda: self.open_sequences if self._told_to_drain else -1
        self._contact.start()
        try:
            async with asyncio.timeout(timeout_s):
                while not (self.ready if wait_ready else self.connected):
                    refusal = next((s.refusal for s in self._all() if s.refusal is not None), None)
                    if refusal is not None:
                        raise refusal
                    await self._change()
        except TimeoutError as error:
            what = "was not ready" if self.connected else "did not answer"
            await self.close()
            raise UnavailableError(f"the engine at {self._contact.endpoint} {what} within {timeout_s} s") from error
        except BaseException:
            await self.close()
            raise
        try:
            async with asyncio.timeout(min(_OTHERS_S, timeout_s)):
                while not all(session.connected for session in self._sessions.values()):
                    await self._change()
        except TimeoutError:
            pass  # they join when they are there
        assert self.welcome is not None, "connected without a Welcome"
        return self.welcome

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    async def close(self, error: TandemError | None = None) -> None:
        """Say Goodbye to all, fail what is still open with `error`, release the sockets. May be called twice."""
        if self._context is None:
            return
        context, self._context = self._context, None
        await asyncio.gather(*(session.close(error) for session in self._all()), *self._closing)
        await asyncio.to_thread(context.term)  # waits until every Goodbye has left

    # -- sequences

    def submit(self, flights: Iterable[Flight]) -> None:
        """Send new sequences. Raises UnavailableError if the engine is starting, draining, gone or swamped."""
        if self._told_to_drain:
            raise UnavailableError("the engine is shutting down")
        flights = list(flights)
        chosen: dict[Session, list[Flight]] = {}
        for flight in flights:
            chosen.setdefault(self._choose(flight), []).append(flight)
        try:
            for session, own in chosen.items():
                session.submit(own)
        except BaseException:
            self.abort(flights)
            raise

    def abort(self, flights: Iterable[Flight], *, stopped: bool = False) -> None:
        """End sequences early; those that ended already are left alone. `stopped`: a stop string was found."""
        for flight in flights:
            if flight.home is not None:
                flight.home.abort((flight,), stopped=stopped)

    def _choose(self, flight: Flight) -> Session:
        if len(self._sessions) == 1:
            return next(iter(self._sessions.values()))
        number = self._router.pick(flight.prompt, flight.cache_salt)
        if number is not None:
            return self._sessions[number]
        # Nobody takes it now: it waits with the one that comes closest, or that one says why not.
        closest = max(self._sessions.values(), key=lambda s: (s.ready and not s.draining, s.connected), default=None)
        return closest or self._contact

    def _refused(self, flight: Flight) -> bool:
        """A replica that begins to drain refuses what was on its way; another one may take it."""
        if not len(self._router):
            return False
        self._choose(flight).adopt([flight])
        return True

    def _count_frame(self, _: int) -> None:
        self._frames += 1
        assert self._on_frame is not None, "counted for nobody"
        self._on_frame(self._frames)

    # -- statistics

    async def stats(self, timeout_s: float, restart_longest: bool = False) -> Stats:
        """Of the engine: the sum over all replicas that answer. Newer than every token received before the call."""
        found = await self._ask(lambda session: session.stats(timeout_s, restart_longest))
        return total_stats(list(found.values()))

    async def invariants(self, timeout_s: float) -> dict[int, Invariants]:
        """Of each replica that answers, which it does only if the engine has debug endpoints."""
        return await self._ask(lambda session: session.invariants(timeout_s))

    async def _ask(self, question: Callable[[Session], Awaitable[AnswerT]]) -> dict[int, AnswerT]:
        asked = {number: session for number, session in self._sessions.items() if session.connected}
        if not asked:
            raise UnavailableError(f"the engine at {self._contact.endpoint} does not answer")
        answers = await asyncio.gather(*map(question, asked.values()), return_exceptions=True)
        found = {}
        for number, answer in zip(asked, answers, strict=True):
            if not isinstance(answer, BaseException):
                found[number] = answer
            elif not isinstance(answer, TandemError) or len(asked) == 1:
                raise answer
        if not found:
            raise UnavailableError(f"none of {len(asked)} replicas answers")
        return found

    # -- members

    def _on_contact(self) -> None:
        contact = self._contact
        if contact.members is not None:
            self._update({member.number: member for member in contact.members})
        elif contact.welcome is not None:
            if not self._sessions:
                self._add(_ONLY, contact)
            self._on_session(_ONLY)
        self._changed.set()

    def _update(self, members: dict[int, Member]) -> None:
        """Be connected to these, and have sequences of others continued here."""
        remote = self._contact.endpoint.startswith("tcp://")
        wanted = {number: member.remote if remote else member.endpoint for number, member in members.items()}
        for number, session in list(self._sessions.items()):
            if wanted.get(number) != session.endpoint:
                del self._sessions[number]
                self._router.leave(number)
                session.on_change = self._settle
                session.on_load = lambda *_: self._settle()  # with each answer to a heartbeat: it may have emptied
                self._leaving.append(session)
        for number, endpoint in wanted.items():
            if number not in self._sessions:
                try:
                    session = self._make_session(endpoint, context=self._context)
                    self._add(number, session)
                    session.start()
                except ConfigError as error:
                    self._sessions.pop(number, None)
                    _log.error("replica %d at %s is not used: %s", number, endpoint, error)
        self._settle()

    def _add(self, number: int, session: Session) -> None:
        self._sessions[number] = session
        self._epochs.pop(number, None)
        session.on_change = self._on_contact if session is self._contact else partial(self._on_session, number)
        session.on_load = partial(self._report, number)
        session.on_refused = self._refused
        session.on_fan_out = self.on_fan_out

    def _report(self, number: int, running: int, waiting: int, queued_tokens: int) -> None:
        self._router.report(number, running, waiting, queued_tokens)

    def _on_session(self, number: int) -> None:
        """Something about this member changed: it may have become ready, lost, or busy with dying."""
        session = self._sessions.get(number)
        if session is None or self._context is None:
            return
        if session.welcome is None or not self._learn(number, session.welcome) or not session.takes_requests:
            self._router.leave(number)
        elif number not in self._router or self._epochs.get(number) != session.welcome.epoch:
            self._epochs[number] = session.welcome.epoch
            self._router.join(number)
        self._settle()

    def _learn(self, number: int, welcome: Welcome) -> bool:
        """What requests are checked against holds for every replica; False if this one serves something else."""
        if self.welcome is None:
            self._router = Router(welcome.block_size)
        elif _served(self.welcome) != _served(welcome):
            _log.error("replica %d serves %s, this engine %s", number, _served(welcome), _served(self.welcome))
            return False
        cards = [s.welcome.card for s in self._sessions.values() if s.welcome is not None]
        card = msgspec.structs.replace(welcome.card, max_model_len=min(card.max_model_len for card in cards))
        self.welcome = msgspec.structs.replace(welcome, card=card)
        return True

    def _settle(self) -> None:
        """Have sequences continued whose replica is away or has left, if somebody takes them."""
        if len(self._router):
            for session in [*self._leaving, *(s for s in self._sessions.values() if not s.connected)]:
                self._move(session)
        for session in [s for s in self._leaving if not s.open_sequences]:
            self._leaving.remove(session)
            session.on_change = None
            task = asyncio.get_running_loop().create_task(session.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
        self._changed.set()

    def _move(self, session: Session) -> None:
        flights = session.release()
        if flights:
            _log.warning("%d open requests of the replica at %s go on elsewhere", len(flights), session.endpoint)
        for flight in flights:
            self._choose(flight).adopt([flight])


def _served(welcome: Welcome) -> tuple[object, ...]:
    """What must be the same in all replicas of an engine."""
    card = welcome.card
    return card.name, card.vocab_size, card.eos_token_ids, card.max_logprobs
