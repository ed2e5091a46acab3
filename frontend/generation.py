"""One user's request while it runs: the sequences of all its prompts and choices, and what is new of them.

Made by a client, read by one task. However many sequences had news, its reader wakes once and gets all of it: that is
what keeps the cost of a token low when many stream. Must never touch a socket.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from frontend.assembler import Assembler, Collected
from frontend.deadlines import Deadlines
from frontend.inflight import Flight, Mailbox
from frontend.request import Chunk, GenerateParams, check_prompt, prepare
from frontend.tokenizer import Tokenizer
from ipc.errors import TandemError
from ipc.schema import ModelCard


class Submitter(Protocol):
    """What a generation needs of a session."""

    def submit(self, flights: Sequence[Flight]) -> None: ...
    def abort(self, flights: Sequence[Flight], *, stopped: bool = False) -> None: ...


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
        self._error: TandemError | None = None
        session.submit(self._flights)

    async def chunks(self) -> list[Chunk]:
        """What is new since the last call, of one or more choices; empty once all have ended.

        Raises the error that a sequence ended with, RequestTimeoutError or QueueTimeoutError if it takes too long.
        """
        found: list[Chunk] = []
        while self._running and not found:
            if self._error is not None:
                raise self._error
            for flight in await self._deadlines.wait(self._mailbox):
                try:
                    chunk = self._assemblers[flight.index].take(flight)
                except TandemError as error:
                    self._error = error  # raised once the reader has had what came before it
                    break
                if chunk is None:
                    continue
                if chunk.finish_reason is not None:
                    self._running -= 1
                    # A stop string ends it here, before the engine knows.
                    self._session.abort((flight,), stopped=True)
                found.append(chunk)
        return found

    def close(self) -> None:
        """Abort what still runs. May be called twice."""
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
