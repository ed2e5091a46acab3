"""The client library: prompts in, text out, over a connection to each replica. Async, and a blocking twin.

This is the frontend's heart: the HTTP server is an AsyncClient plus OpenAI shapes, a Python program uses it directly.
It tokenizes, checks, admits, turns tokens into text, finds stop strings, and aborts whatever its caller gives up.
Must never import torch.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Final, TypeVar

from frontend.generation import Generation, collect
from frontend.replicas import Replicas
from frontend.request import Chunk, Completion, GenerateParams
from frontend.session import PATIENCE, Patience
from frontend.tokenizer import Tokenizer
from ipc.auth import load_client_keys
from ipc.errors import CancelledError, ModelError, TandemError, UnavailableError
from ipc.schema import Invariants, ModelCard, Stats, Welcome

_log: Final = logging.getLogger(__name__)

Prompt = str | Sequence[int]
Messages = Sequence[Mapping[str, Any]]
T = TypeVar("T")

CONNECT_S: Final = 60.0
STATS_S: Final = 10.0


class AsyncClient:
    """Connections to all replicas of one engine, for one event loop.

    `async with AsyncClient(endpoint) as client:` waits until the engine serves. Every method raises a TandemError of
    the class that names the fault; parameters of generation are those of GenerateParams, as an object or by keyword.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        name: str = "client",
        tokenizer: Tokenizer | None = None,
        patience: Patience = PATIENCE,
        auth_keys: str | Path | None = None,
        on_frame: Callable[[int], object] | None = None,
        request_timeout_s: float | None = None,
        queue_timeout_s: float | None = None,
    ) -> None:
        """Requests survive a scheduler that comes back within `patience.reconnect_limit_s`.

        `auth_keys`: the client's key folder, for a tcp endpoint; raises ConfigError if it is not usable. `on_frame`:
        see Replicas. `request_timeout_s`: for requests that bring no `timeout_s`. `queue_timeout_s`: how long any may
        wait to run.
        """
        self._request_timeout_s, self._queue_timeout_s = request_timeout_s, queue_timeout_s
        keys = None if auth_keys is None else load_client_keys(Path(auth_keys))
        self._replicas = Replicas(endpoint, name, patience, keys, on_frame)
        self._tokenizer = tokenizer
        self._no_tokenizer: ModelError | None = None

    async def connect(self, timeout_s: float = CONNECT_S, *, wait_ready: bool = False) -> ModelCard:
        """Shake hands, load the tokenizer. `wait_ready`: also until the engine serves. Raises UnavailableError."""
        card = (await self._replicas.open(timeout_s, wait_ready)).card
        if self._tokenizer is None:
            try:
                self._tokenizer = await asyncio.to_thread(Tokenizer.load, card.path)
            except ModelError as error:
                # A model without a tokenizer still serves token ids; whoever asks for text gets the error.
                _log.warning("%s; only token ids can be served", error)
                self._no_tokenizer = error
        return card

    async def close(self, error: TandemError | None = None) -> None:
        """Open requests end with `error` (CancelledError by default) and are aborted in the engine."""
        await self._replicas.close(error)

    async def __aenter__(self) -> AsyncClient:
        await self.connect(wait_ready=True)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def card(self) -> ModelCard:
        """What the engine serves; raises UnavailableError before `connect`."""
        return self.engine.card

    @property
    def engine(self) -> Welcome:
        """What the engine said of itself; raises UnavailableError before `connect`."""
        if self._replicas.welcome is None:
            raise UnavailableError("the client is not connected")
        return self._replicas.welcome

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises ModelError if the model has none."""
        if self._tokenizer is None:
            raise self._no_tokenizer or UnavailableError("the client is not connected")
        return self._tokenizer

    @property
    def connected(self) -> bool:
        """A replica answers."""
        return self._replicas.connected

    @property
    def ready(self) -> bool:
        """Requests are served."""
        return self._replicas.ready

    @property
    def draining(self) -> bool:
        """The engine finishes what is open and takes nothing new."""
        return self._replicas.draining

    @property
    def last_stats(self) -> dict[int, Stats]:
        """The statistics of each replica that answers, by number; they come with every heartbeat."""
        return self._replicas.last_stats

    @property
    def replicas(self) -> dict[int, Welcome]:
        """What each replica that answers said of itself last, by number."""
        sessions = self._replicas.sessions.items()
        return {number: s.welcome for number, s in sessions if s.connected and s.welcome is not None}

    def watch_fan_out(self, watcher: Callable[[int, int], None]) -> None:
        """After each frame of tokens, once their readers have run: watcher(nanoseconds at its arrival, rows)."""
        self._replicas.on_fan_out = watcher

    async def stats(self, timeout_s: float = STATS_S, *, restart_longest: bool = False) -> Stats:
        """The engine's counters; `restart_longest` has the `longest_*` ones begin anew after this answer."""
        return await self._replicas.stats(timeout_s, restart_longest)

    async def invariants(self, timeout_s: float = STATS_S) -> dict[int, Invariants]:
        """What must add up in each scheduler; only of an engine started with --enable-debug-endpoints."""
        return await self._replicas.invariants(timeout_s)

    async def encode(self, prompt: Prompt) -> Sequence[int]:
        """Token ids of a prompt; those given as ids are returned as they are."""
        return await self.tokenizer.encode_async(prompt) if isinstance(prompt, str) else prompt

    async def encode_chat(
        self,
        messages: Messages,
        *,
        tools: Messages | None = None,
        add_generation_prompt: bool = True,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation, by the model's chat template."""
        return await self.tokenizer.encode_chat(
            messages, tools=tools, add_generation_prompt=add_generation_prompt, template_kwargs=template_kwargs
        )

    def stream(
        self, prompt: Prompt, params: GenerateParams | None = None, *, timeout_s: float | None = None, **changes: Any
    ) -> AsyncGenerator[Chunk, None]:
        """Chunks of all n choices as they come. Closing or cancelling the iterator aborts the request.

        Raises RequestTimeoutError if the request is open for longer than `timeout_s`, RequestError for one at fault,
        OverloadedError or UnavailableError when the engine takes none.
        """
        return self._stream(partial(self.encode, prompt), GenerateParams.of(params, changes), timeout_s)

    def chat_stream(
        self,
        messages: Messages,
        params: GenerateParams | None = None,
        *,
        tools: Messages | None = None,
        add_generation_prompt: bool = True,
        template_kwargs: Mapping[str, Any] | None = None,
        timeout_s: float | None = None,
        **changes: Any,
    ) -> AsyncGenerator[Chunk, None]:
        """`stream` of a conversation's next message."""
        params = GenerateParams.of(params, changes)
        prompt = partial(
            self.encode_chat,
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            template_kwargs=template_kwargs,
        )
        return self._stream(prompt, params, timeout_s)

    async def generate(
        self, prompt: Prompt, params: GenerateParams | None = None, *, timeout_s: float | None = None, **changes: Any
    ) -> Completion:
        """The whole answer. Cancelling the call aborts the request; errors as for `stream`."""
        params = GenerateParams.of(params, changes)
        return await self._complete(await self.encode(prompt), params, timeout_s)

    async def chat(
        self,
        messages: Messages,
        params: GenerateParams | None = None,
        *,
        tools: Messages | None = None,
        add_generation_prompt: bool = True,
        template_kwargs: Mapping[str, Any] | None = None,
        timeout_s: float | None = None,
        **changes: Any,
    ) -> Completion:
        """`generate` for a conversation's next message."""
        params = GenerateParams.of(params, changes)
        prompt = await self.encode_chat(
            messages, tools=tools, add_generation_prompt=add_generation_prompt, template_kwargs=template_kwargs
        )
        return await self._complete(prompt, params, timeout_s)

    async def _stream(
        self, prompt: Callable[[], Awaitable[Sequence[int]]], params: GenerateParams, timeout_s: float | None
    ) -> AsyncGenerator[Chunk, None]:
        generation = await self.start([await prompt()], params, timeout_s=timeout_s)
        try:
            while chunks := await generation.chunks():
                for chunk in chunks:
                    yield chunk
        finally:
            generation.close()

    async def _complete(self, prompt: Sequence[int], params: GenerateParams, timeout_s: float | None) -> Completion:
        generation = await self.start([prompt], params, timeout_s=timeout_s, whole=True)
        choices = await collect(generation, params.n)
        return Completion(
            choices=tuple(each.choice(index) for index, each in enumerate(choices)),
            prompt_token_ids=tuple(map(int, prompt)),
            prompt_tokens=len(prompt),
            completion_tokens=sum(len(each.token_ids) for each in choices),
            cached_tokens=choices[0].cached_tokens,
        )

    async def start(
        self,
        prompts: Sequence[Sequence[int]],
        params: GenerateParams,
        *,
        timeout_s: float | None = None,
        whole: bool = False,
    ) -> Generation:
        """Submit prompts of token ids as one request, to be read and closed by the caller; errors as for `stream`.

        `whole`: its reader wants nothing before a sequence has ended.
        """
        if params.stop_strings and self._tokenizer is None:
            raise self._no_tokenizer or UnavailableError("the client is not connected")
        # Stop strings are found here, so somebody has to look at the text as it comes.
        each_token = not whole or bool(params.stop_strings)
        return Generation(
            self._replicas,
            self._tokenizer,
            self.card,
            prompts,
            params,
            grammar="" if params.structured_outputs is None else await params.structured_outputs.compile(),
            each_token=each_token,
            timeout_s=self._request_timeout_s if timeout_s is None else timeout_s,
            queue_timeout_s=self._queue_timeout_s,
        )


class Client:
    """The blocking twin: an AsyncClient on a thread of its own. Methods may be called from several threads."""

    def __init__(
        self,
        endpoint: str,
        *,
        name: str = "client",
        tokenizer: Tokenizer | None = None,
        timeout_s: float = CONNECT_S,
        auth_keys: str | Path | None = None,
    ) -> None:
        """Connects and waits until the engine serves; raises UnavailableError after `timeout_s`.

        `auth_keys` as for AsyncClient.
        """
        client = AsyncClient(endpoint, name=name, tokenizer=tokenizer, auth_keys=auth_keys)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"tandem {name}", daemon=True)
        self._thread.start()
        self._closed = False
        self._lock = threading.RLock()  # of `_closed`: the garbage collector may end an iteration within a call
        self._client = client
        try:
            self._call(self._client.connect(timeout_s, wait_ready=True))
        except BaseException:
            self.close()
            raise

    @property
    def card(self) -> ModelCard:
        return self._client.card

    @property
    def tokenizer(self) -> Tokenizer:
        return self._client.tokenizer

    def generate(
        self, prompt: Prompt, params: GenerateParams | None = None, *, timeout_s: float | None = None, **changes: Any
    ) -> Completion:
        """See AsyncClient.generate."""
        return self._call(self._client.generate(prompt, params, timeout_s=timeout_s, **changes))

    def chat(self, messages: Messages, params: GenerateParams | None = None, **options: Any) -> Completion:
        """See AsyncClient.chat."""
        return self._call(self._client.chat(messages, params, **options))

    def stream(self, prompt: Prompt, params: GenerateParams | None = None, **options: Any) -> Iterator[Chunk]:
        """See AsyncClient.stream. Leaving the loop early aborts the request."""
        return self._iterate(self._client.stream(prompt, params, **options))

    def chat_stream(self, messages: Messages, params: GenerateParams | None = None, **options: Any) -> Iterator[Chunk]:
        """See AsyncClient.chat_stream."""
        return self._iterate(self._client.chat_stream(messages, params, **options))

    def stats(self) -> Stats:
        return self._call(self._client.stats())

    def close(self) -> None:
        """Open requests end with CancelledError. May be called twice."""
        with self._lock:
            if self._closed:
                return
            self._closed = True  # no call is scheduled from now on
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _close(self) -> None:
        await self._client.close()
        rest = asyncio.all_tasks() - {asyncio.current_task()}  # a call that is not ended would wait for ever
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)
        await self._loop.shutdown_asyncgens()
        await self._loop.shutdown_default_executor()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        with self._lock:
            if self._closed:
                work.close()
                raise UnavailableError("the client is closed")
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except concurrent.futures.CancelledError as error:
            raise CancelledError("the client was closed") from error
        except BaseException:
            future.cancel()
            raise

    def _iterate(self, chunks: AsyncGenerator[Chunk, None]) -> Iterator[Chunk]:
        try:
            while (chunk := self._call(_next(chunks))) is not None:
                yield chunk
        finally:
            # Not waited for: the garbage collector may run this on the loop's own thread.
            with self._lock:
                if not self._closed:
                    asyncio.run_coroutine_threadsafe(chunks.aclose(), self._loop)


async def _next(chunks: AsyncIterator[Chunk]) -> Chunk | None:
    return await anext(chunks, None)
