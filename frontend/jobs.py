"""Running one HTTP request on the client: merging prompts, counting, streaming events, aborting when nobody listens.

Called by the server's handlers. Knows no route and no request format: a Shape writes the answer.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from litestar import Response
from litestar.types import Receive, Scope, Send

from frontend.client import AsyncClient
from frontend.openai import DONE, error_event
from frontend.request import Chunk, GenerateParams
from frontend.shapes import Shape, Usage, make_usage
from ipc.errors import CancelledError, TandemError

T = TypeVar("T")
Event = tuple[int, Chunk]  # choice index over all prompts, and its next part

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
    tasks = [asyncio.ensure_future(client.generate(prompt, job.params)) for prompt in job.prompts]
    try:
        found = await asyncio.gather(*tasks)
    finally:
        await _cancel(*tasks)
    choices = [
        dataclasses.replace(choice, index=position * job.params.n + choice.index)
        for position, completion in enumerate(found)
        for choice in completion.choices
    ]
    generated = sum(completion.completion_tokens for completion in found)
    usage = make_usage(job.prompt_tokens, generated, sum(completion.cached_tokens for completion in found))
    return job.shape.whole(choices, usage)


async def run_stream(client: AsyncClient, job: Job) -> AsyncGenerator[Event, None]:
    """The parts of all choices as they come. Closing it aborts what still runs."""
    async with aclosing(_merged(client, job) if len(job.prompts) > 1 else _single(client, job)) as events:
        async for event in events:
            yield event


async def _single(client: AsyncClient, job: Job) -> AsyncGenerator[Event, None]:
    async with aclosing(client.stream(job.prompts[0], job.params)) as chunks:
        async for chunk in chunks:
            yield chunk.index, chunk


async def _merged(client: AsyncClient, job: Job) -> AsyncGenerator[Event, None]:
    # One place: a reader that lags holds back the streams, which coalesce by themselves.
    queue: asyncio.Queue[Event | Exception | None] = asyncio.Queue(maxsize=1)

    async def pump(position: int, prompt: Sequence[int]) -> None:
        try:
            async with aclosing(client.stream(prompt, job.params)) as chunks:
                async for chunk in chunks:
                    await queue.put((position * job.params.n + chunk.index, chunk))
        except Exception as error:  # raised again by the reader
            await queue.put(error)
        else:
            await queue.put(None)

    pumps = [asyncio.ensure_future(pump(position, prompt)) for position, prompt in enumerate(job.prompts)]
    running = len(pumps)
    try:
        while running:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        await _cancel(*pumps)


class Tally:
    """Counts the tokens of a stream for its usage."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._cached_tokens = [0] * len(job.prompts)
        self._completion_tokens = 0

    def add(self, index: int, chunk: Chunk) -> None:
        self._completion_tokens += len(chunk.token_ids)
        prompt, choice = divmod(index, self._job.params.n)
        if choice == 0:
            self._cached_tokens[prompt] = chunk.cached_tokens

    def usage(self) -> Usage:
        return make_usage(self._job.prompt_tokens, self._completion_tokens, sum(self._cached_tokens))


class EventStream(Response[None]):
    """Server-sent events of one job. Made once its first part is here, so that earlier failures have a status."""

    def __init__(self, job: Job, first: Event, rest: AsyncGenerator[Event, None]) -> None:
        super().__init__(content=None)
        self._job, self._first, self._rest = job, first, rest

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
            await self._rest.aclose()

    async def _send_events(self, send: Send) -> None:
        shape, tally = self._job.shape, Tally(self._job)
        index, chunk = self._first
        tally.add(index, chunk)
        try:
            await _send_part(send, shape.opening() + shape.event(index, chunk))
            async for index, chunk in self._rest:
                tally.add(index, chunk)
                await _send_part(send, shape.event(index, chunk))
        except TandemError as error:
            ending = error_event(error)
        except Exception:
            _log.exception("a stream failed")
            ending = error_event(TandemError("internal error"))
        else:
            ending = shape.closing(tally.usage()) + DONE
        await send({"type": "http.response.body", "body": ending, "more_body": False})


async def _send_part(send: Send, data: bytes) -> None:
    if data:
        await send({"type": "http.response.body", "body": data, "more_body": True})
