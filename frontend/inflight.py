"""The sequences a client has open: what was asked, what came back, and who waits for it.

Filled by the Session from the scheduler's columnar frames, read by the client. Nothing queues but the tokens
themselves, which the context bounds: a reader that lags finds several at once. Must never decode text.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable, Iterable
from typing import Any, Final, Protocol

import numpy as np

from ipc.errors import (
    CrashedExecutorError,
    GrammarError,
    InvalidLogitsError,
    ProtocolError,
    SlowConsumerError,
    TandemError,
    UnavailableError,
)
from ipc.schema import Admit, FinishReason, Logprobs, SamplingParams

UNSENT: Final = -1  # request_id before submission

# logprob, rank, top token ids, their logprobs
LogprobRow = tuple[float, int, list[int], list[float]]


class Turns:
    """Relays that are due, all in one callback of the event loop, after whatever else is read in this turn of it."""

    __slots__ = ("_due",)

    def __init__(self) -> None:
        self._due: list[Mailbox] = []

    def add(self, mailbox: Mailbox) -> None:
        if not self._due:
            asyncio.get_running_loop().call_soon(self._take)
        self._due.append(mailbox)

    def _take(self) -> None:
        due, self._due = self._due, []
        for mailbox in due:
            mailbox.turn()


class Mailbox:
    """Where the sequences of one user's request report: one reader, woken once for any number of reports.

    Waking a task costs more than all else about a token, so a reader may leave a `relay`: a function that is given what
    is new while the reader waits. It returns False for what only the reader can deal with.
    """

    __slots__ = ("_ready", "_turn_due", "_waiter", "each_token", "relay")

    def __init__(self, each_token: bool) -> None:
        self.each_token: Final = each_token  # False: only the end of a sequence wakes the reader
        self.relay: Callable[[Iterable[Flight]], bool] | None = None
        self._ready: dict[Flight, None] = {}  # an ordered set
        self._waiter: asyncio.Future[None] | None = None
        self._turn_due = False

    def post(self, flight: Flight, turns: Turns) -> None:
        """There is news of this flight, for the reader at once or for the relay in its turn."""
        self._ready[flight] = None
        waiter = self._waiter
        if waiter is None or self._turn_due or waiter.done():
            return
        if self.relay is None:
            waiter.set_result(None)
        else:
            # Not now: more may come of this flight, or of others, before the loop's other callbacks run.
            self._turn_due = True
            turns.add(self)

    def turn(self) -> None:
        self._turn_due = False
        if self._waiter is None or self._waiter.done():
            return  # the reader is awake, and will look
        if self.relay is not None and self.relay(self._ready):
            self._ready.clear()
        else:
            self._waiter.set_result(None)

    async def wait(self, deadline: float | None = None) -> list[Flight]:
        """The sequences with news since the last call, at least one; a cancelled wait loses none.

        `deadline`: time of the event loop after which it raises TimeoutError.
        """
        if not self._ready:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                if deadline is None:
                    await self._waiter
                else:
                    async with asyncio.timeout_at(deadline):
                        await self._waiter
            finally:
                self._waiter = None
        ready = list(self._ready)
        self._ready.clear()
        return ready


class Home(Protocol):
    """Where sequences are open: a session, or all of a client's."""

    def abort(self, flights: Iterable[Flight], *, stopped: bool = False) -> None: ...


class Flight:
    """One open sequence: what was asked, and every token that came back. It holds all that a replay needs."""

    __slots__ = (
        "cache_salt",
        "cached_tokens",
        "error",
        "finish",
        "grammar",
        "home",
        "index",
        "logprobs",
        "mailbox",
        "params",
        "priority",
        "prompt",
        "prompt_logprobs",
        "request_id",
        "started",
        "taken",
        "tokens",
    )

    def __init__(
        self,
        mailbox: Mailbox,
        index: int,
        prompt: bytes,
        params: SamplingParams,
        priority: int,
        cache_salt: str,
        grammar: str = "",
    ) -> None:
        self.mailbox = mailbox
        self.index = index  # which choice of the user's request
        self.prompt = prompt  # packed int32
        self.params = params
        self.priority = priority
        self.cache_salt = cache_salt
        self.grammar = grammar
        self.request_id = UNSENT  # given at submission, by the session that is its home
        self.home: Home | None = None
        self.tokens = array("i")
        self.logprobs: list[LogprobRow] | None = None if params.logprobs < 0 else []  # as long as tokens
        self.prompt_logprobs: list[LogprobRow] = []  # of prompt[1:], complete with the first token
        self.started = False  # it has left the queue
        self.cached_tokens = 0
        self.taken = 0  # tokens the reader has had
        self.finish = FinishReason.RUNNING
        self.error: TandemError | None = None

    @property
    def waits(self) -> bool:
        """It is in the queue and has not run yet."""
        return not self.started and self.finish is FinishReason.RUNNING and self.error is None

    def admit(self, *, replay: bool = False) -> Admit:
        """What a scheduler must be told to continue this sequence. `replay`: an earlier scheduler was told before."""
        return Admit(
            self.request_id,
            self.prompt,
            self.params,
            self.priority,
            self.cache_salt,
            output=self.tokens.tobytes(),
            replay=replay,
            scored=len(self.prompt_logprobs),
            grammar=self.grammar,
        )

    def start(self, cached_tokens: int) -> None:
        """It left the queue. When it is replayed it does so again, but its prompt was computed the first time."""
        if not self.started:
            self.started, self.cached_tokens = True, cached_tokens

    def end(self, finish: FinishReason) -> None:
        self.finish = finish
        error = _ENDED_BADLY.get(finish)
        if error is not None:
            self.error = error[0](error[1])


_ENDED_BADLY: Final[dict[FinishReason, tuple[type[TandemError], str]]] = {
    FinishReason.ABORTED: (UnavailableError, "the engine gave this request up"),
    FinishReason.INVALID_LOGITS: (InvalidLogitsError, "the model produced NaN for this request"),
    FinishReason.CRASHED: (CrashedExecutorError, "the executor crashed twice in a row in a step of this request"),
    FinishReason.INVALID_GRAMMAR: (GrammarError, "the grammar came to a dead end or became too complex to follow"),
    FinishReason.SLOW_CONSUMER: (SlowConsumerError, "this frontend fell too far behind the engine"),
}


def column(payload: bytes, dtype: Any) -> list[int]:
    """A column of a frame as Python numbers; raises ProtocolError if it is none."""
    try:
        return np.frombuffer(payload, dtype).tolist()  # type: ignore[no-any-return]
    except ValueError as error:
        raise ProtocolError(f"a column of {len(payload)} bytes is not one of {np.dtype(dtype)}") from error


def finish_reason(code: int) -> FinishReason:
    """Raises ProtocolError for a code of another protocol."""
    try:
        return FinishReason(code)
    except ValueError as error:
        raise ProtocolError(f"unknown finish reason {code}") from error


def logprob_rows(frame: Logprobs) -> dict[int, LogprobRow]:
    """Row of the Tokens frame -> its log-probabilities; the tops are as wide as the widest request of the frame."""
    rows = column(frame.row, np.int32)
    try:
        shape = (len(rows), frame.width)
        top_token = np.frombuffer(frame.top_token, np.int32).reshape(shape).tolist()
        top_logprob = np.frombuffer(frame.top_logprob, np.float32).reshape(shape).tolist()
        logprob = np.frombuffer(frame.logprob, np.float32).reshape(len(rows)).tolist()
        rank = np.frombuffer(frame.rank, np.int32).reshape(len(rows)).tolist()
    except ValueError as error:
        raise ProtocolError(f"logprob columns do not fit {len(rows)} rows of width {frame.width}") from error
    return dict(zip(rows, zip(logprob, rank, top_token, top_logprob, strict=True), strict=True))
