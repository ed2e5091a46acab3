"""Questions to a scheduler that have no answer yet. Owned by a Session, which sends them and brings the answers."""

from __future__ import annotations

import asyncio
from typing import Any, TypeVar

from frontend.flights import copy_of
from ipc.errors import TandemError, UnavailableError
from ipc.schema import Invariants, Stats

AnswerT = TypeVar("AnswerT", Stats, Invariants)


class Questions:
    """Who waits for which kind of answer; one answer is for all who wait for its kind."""

    def __init__(self) -> None:
        self._waiters: dict[type[Stats | Invariants], list[asyncio.Future[Any]]] = {Stats: [], Invariants: []}

    async def answer_to(self, kind: type[AnswerT], timeout_s: float) -> AnswerT:
        """The next answer of this kind. Raises UnavailableError if none comes, or the error that `fail` was given."""
        waiter: asyncio.Future[AnswerT] = asyncio.get_running_loop().create_future()
        waiters = self._waiters[kind]
        waiters.append(waiter)
        try:
            async with asyncio.timeout(timeout_s):
                return await waiter
        except TimeoutError as error:
            raise UnavailableError(f"the scheduler sent no {kind.__name__} within {timeout_s} s") from error
        finally:
            waiters.remove(waiter)

    def answered(self, message: Stats | Invariants) -> None:
        for waiter in self._waiters[type(message)]:
            if not waiter.done():
                waiter.set_result(message)

    def fail(self, error: TandemError) -> None:
        for waiters in self._waiters.values():
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_exception(copy_of(error))
