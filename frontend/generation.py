"""One user's request while it runs: the sequences of all its prompts and choices, and what is new of them.

Made by a client, read by one task. However many sequences had news, its reader wakes once and gets all of it: that is
what keeps the cost of a token low when many stream. Must never touch a socket.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Final, Protocol

from frontend.assembler import Assembler, Collected
from frontend.deadlines import Deadlines
from frontend.inflight import Flight, Home, Mailbox
from frontend.request import Chunk, GenerateParams, check_prompt, prepare
from frontend.tokenizer import Tokenizer
from ipc.errors import TandemError
from ipc.schema import FinishReason, ModelCard

_RUNNING: Final = FinishReason.RUNNING  # looked up once, not for every token


class Submitter(Home, Protocol):
    """What a generation needs of a client's connections."""

    def submit(self, flights: Sequence[Flight]) -> None: ...


class Sink(Protocol):
    """Where a response may be written to without waiting."""

    @property
    def takes_data(self) -> bool:
        """It has room."""

    def write_part(self, data: bytes) -> None: ...


class Generation:
    """An open request. Choice i of prompt p has the index p * n + i. Read `chunks` until it is empty, then `close`."""

    def __init__(
        self,
        session: Submitter,
        tokenizer: Tokenizer | None,
        card: ModelCard,
        prompts: Sequence[Sequence[int]],
        params: GenerateParams,
        *,
        grammar: str,
        each_token: bool,
        timeout_s: float | None,
        queue_timeout_s: float | None = None,
    ) -> None:
        """Checks every prompt, then submits them all; raises RequestError, OverloadedError or UnavailableError.

        `each_token`: wake the reader for every token, not only for the end of a sequence.
        """
        self._session = session
        self._mailbox = Mailbox(each_token)
        self._flights: list[Flight] = []
        self._assemblers: list[Assembler] = []
        for prompt in prompts:
            packed = check_prompt(prompt, card)
            for sampling in prepare(params, card, len(prompt)):
                self._flights.append(
                    Flight(
                        self._mailbox,
                        len(self._flights),
                        packed,
                        sampling,
                        int(params.priority),
                        params.cache_salt,
                        grammar,
                    )
                )
                self._assemblers.append(Assembler(tokenizer, card, prompt, params))
        self._deadlines = Deadlines(self._flights, request_s=timeout_s, queue_s=queue_timeout_s)
        self._running = len(self._flights)
        self._early: list[Chunk] = []  # ends that the relay came upon
        self._error: Exception | None = None
        session.submit(self._flights)

    async def chunks(self) -> list[Chunk]:
        """What is new since the last call, of one or more choices; empty once all have ended.

        Raises the error that a sequence ended with, RequestTimeoutError or QueueTimeoutError if it takes too long.
        """
        found: list[Chunk] = []
        while self._running and not found:
            if self._error is not None:
                raise self._error
            flights = await self._deadlines.wait(self._mailbox)
            found, self._early = self._early, []
            for flight in flights if self._error is None else ():
                try:
                    chunk = self._take(flight)
                except TandemError as error:
                    self._error = error  # raised once the reader has had what came before it
                    break
                if chunk is not None:
                    found.append(chunk)
        return found

    def relay_to(self, sink: Sink, encode: Callable[[Sequence[Chunk]], bytes]) -> None:
        """While the reader waits in `chunks`, write what is new of sequences that go on to `sink`, if it has room."""
        self._mailbox.relay = partial(self._relay, sink, encode)

    def _relay(self, sink: Sink, encode: Callable[[Sequence[Chunk]], bytes], flights: Iterable[Flight]) -> bool:
        """As of a mailbox. The reader gets every end, every fault, and whatever comes while the sink has no room."""
        if not sink.takes_data:
            return False
        found: list[Chunk] = []
        everything = True
        try:
            for flight in flights:
                if flight.finish is not _RUNNING or flight.error is not None:
                    everything = False
                elif (chunk := self._take(flight)) is not None:
                    (found if chunk.finish_reason is None else self._early).append(chunk)
            if found and (data := encode(found)):
                sink.write_part(data)
        except Exception as error:  # the reader's, not the event loop's
            self._error = error
        return everything and not self._early and self._error is None

    def _take(self, flight: Flight) -> Chunk | None:
        chunk = self._assemblers[flight.index].take(flight)
        if chunk is not None and chunk.finish_reason is not None:
            self._running -= 1
            # A stop string ends it here, before the engine knows.
            self._session.abort((flight,), stopped=True)
        return chunk

    def close(self) -> None:
        """Abort what still runs. May be called twice."""
        self._mailbox.relay = None
        self._session.abort(self._flights)


async def collect(generation: Generation, count: int) -> list[Collected]:
    """All `count` choices of a request from start to end; whatever happens, the request is closed afterwards."""
    choices = [Collected() for _ in range(count)]
    try:
        while chunks := await generation.chunks():
            for chunk in chunks:
                choices[chunk.index].add(chunk)
    finally:
        generation.close()
    return choices
