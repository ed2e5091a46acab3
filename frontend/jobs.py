"""Running one HTTP request on the client: counting, streaming events, aborting when nobody listens.

Called by the server's handlers. Knows no route and no request format: a Shape writes the answer.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar

from litestar import Response
from litestar.types import Receive, Scope, Send

from frontend.client import AsyncClient
from frontend.generation import Sink, collect
from frontend.openai import DONE, error_event
from frontend.request import Chunk, GenerateParams
from frontend.shapes import Shape, Usage, make_usage
from ipc.errors import CancelledError, TandemError

T = TypeVar("T")

_HEADERS: Final = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)
DIRECT: Final = "direct"  # in a scope's state: the Sink of a server that has one
_log: Final = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Job:
    """One request, ready to run: token ids, how to generate, and how to write the answer.

    Choice i of prompt p has the index p * n + i.
    """

    prompts: Sequence[Sequence[int]]
    params: GenerateParams
    shape: Shape

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The outcome of `work`, which is cancelled when the client closes its connection (then: CancelledError).

    `receive` is the request's ASGI channel; its body must have been read.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise CancelledError("the client closed the connection")
    finally:
        await _cancel(task, gone)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def run_whole(client: AsyncClient, job: Job) -> bytes:
    """The JSON of the whole answer. The first prompt that fails ends the others and raises its error."""
    n = job.params.n
    found = await collect(await client.start(job.prompts, job.params, whole=True), n * len(job.prompts))
    choices = [each.choice(index) for index, each in enumerate(found)]
    generated = sum(len(choice.token_ids) for choice in choices)
    usage = make_usage(job.prompt_tokens, generated, sum(each.cached_tokens for each in found[::n]))
    return job.shape.whole(choices, usage)


class Events:
    """Writes chunks as events and counts their tokens."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._n = job.params.n
        self._event = job.shape.event
        self._cached_tokens = [0] * len(job.prompts)
        self._completion_tokens = 0

    def of(self, chunks: Sequence[Chunk]) -> bytes:
        data = b""
        for chunk in chunks:
            self._completion_tokens += len(chunk.token_ids)
            if chunk.index % self._n == 0:  # other choices find what this one has just computed
                self._cached_tokens[chunk.index // self._n] = chunk.cached_tokens
            data += self._event(chunk.index, chunk)
        return data

    def usage(self) -> Usage:
        return make_usage(self._job.prompt_tokens, self._completion_tokens, sum(self._cached_tokens))


class Source(Protocol):
    """Where an event stream comes from: a Generation."""

    async def chunks(self) -> list[Chunk]: ...
    def relay_to(self, sink: Sink, encode: Callable[[Sequence[Chunk]], bytes]) -> None: ...
    def close(self) -> None: ...


class EventStream(Response[None]):
    """Server-sent events of one job. Made once its first part is here, so that earlier failures have a status.

    Its beginning, end and faults go the way of ASGI. What comes in between is written to the connection as it comes,
    if the server lets us (`DIRECT`), and neither wakes a task nor waits for one.
    """

    def __init__(self, job: Job, first: list[Chunk], source: Source) -> None:
        super().__init__(content=None)
        self._job, self._first, self._source = job, first, source

    def to_asgi_response(self, app: Any, request: Any, **_: Any) -> Any:
        """Litestar's way to the ASGI application that answers: this object."""
        return self

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        try:
            direct = scope.get("state", {}).get(DIRECT)
            await while_connected(receive, self._send_events(send, direct))
        except CancelledError:
            _log.debug("client left a stream")
        finally:
            self._source.close()

    async def _send_events(self, send: Send, direct: Sink | None) -> None:
        events = Events(self._job)
        data, chunks = self._job.shape.opening(), self._first
        try:
            while chunks:
                data += events.of(chunks)
                if data:
                    await send({"type": "http.response.body", "body": data, "more_body": True})
                    data = b""
                if direct is not None and chunks is self._first:
                    self._source.relay_to(direct, events.of)
                chunks = await self._source.chunks()
        except TandemError as error:
            ending = error_event(error)
        except Exception:
            _log.exception("a stream failed")
            ending = error_event(TandemError("internal error"))
        else:
            ending = self._job.shape.closing(events.usage()) + DONE
        await send({"type": "http.response.body", "body": ending, "more_body": False})
