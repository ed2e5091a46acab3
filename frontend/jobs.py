"""Running one HTTP request on the client: counting, streaming events, aborting when nobody listens.

Called by the server's handlers. Knows no route and no request format: a Shape writes the answer.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar

from litestar import Response
from litestar.types import Receive, Scope, Send

from frontend.client import AsyncClient
from frontend.generation import collect
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


class Tally:
    """Counts the tokens of a stream for its usage."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._cached_tokens = [0] * len(job.prompts)
        self._completion_tokens = 0

    def add(self, chunk: Chunk) -> None:
        self._completion_tokens += len(chunk.token_ids)
        prompt, choice = divmod(chunk.index, self._job.params.n)
        if choice == 0:
            self._cached_tokens[prompt] = chunk.cached_tokens

    def usage(self) -> Usage:
        return make_usage(self._job.prompt_tokens, self._completion_tokens, sum(self._cached_tokens))


class Source(Protocol):
    """Where an event stream comes from: a Generation."""

    async def chunks(self) -> list[Chunk]: ...
    def close(self) -> None: ...


class EventStream(Response[None]):
    """Server-sent events of one job. Made once its first part is here, so that earlier failures have a status."""

    def __init__(self, job: Job, first: list[Chunk], source: Source) -> None:
        super().__init__(content=None)
        self._job, self._first, self._source = job, first, source

    def to_asgi_response(self, app: Any, request: Any, **_: Any) -> Any:
        """Litestar's way to the ASGI application that answers: this object."""
        return self

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        try:
            await while_connected(receive, self._send_events(send))
        except CancelledError:
            _log.debug("client left a stream")
        finally:
            self._source.close()

    async def _send_events(self, send: Send) -> None:
        shape, tally = self._job.shape, Tally(self._job)
        data, chunks = shape.opening(), self._first
        try:
            while chunks:
                for chunk in chunks:
                    tally.add(chunk)
                    data += shape.event(chunk.index, chunk)
                if data:
                    await send({"type": "http.response.body", "body": data, "more_body": True})
                    data = b""
                chunks = await self._source.chunks()
        except TandemError as error:
            ending = error_event(error)
        except Exception:
            _log.exception("a stream failed")
            ending = error_event(TandemError("internal error"))
        else:
            ending = shape.closing(tally.usage()) + DONE
        await send({"type": "http.response.body", "body": ending, "more_body": False})
