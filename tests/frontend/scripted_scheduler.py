"""A scheduler played by a test: a real ROUTER in a thread. It answers what every scheduler answers by itself, keeps
what came for the test to read, and sends what the test, or its `on_admit` script, says.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, TypeVar

import numpy as np
import zmq

from frontend import AsyncClient, Chunk
from ipc.schema import (
    PROTOCOL_VERSION,
    Admit,
    FinishReason,
    GetStats,
    Heartbeat,
    Hello,
    Logprobs,
    Message,
    ModelCard,
    Stats,
    Tokens,
    Welcome,
    decode_frontend,
    encode,
)
from ipc.sockets import EndpointDirectory, bind_router
from tests.frontend.tokenizers_for_tests import byte_level_tokenizer

WAIT_S = 10.0
RUNNING, STOP, LENGTH = FinishReason.RUNNING, FinishReason.STOP, FinishReason.LENGTH
MessageT = TypeVar("MessageT", bound=Message)
Script = Callable[[Admit], Iterable[Message]]


def card(path: str = "", **changes: Any) -> ModelCard:
    fields = {"max_model_len": 512, "vocab_size": 500, "eos_token_ids": (0,), "max_logprobs": 20}
    return ModelCard(name="test", path=path, **{**fields, **changes})


def stats(**changes: Any) -> Stats:
    fields: dict[str, Any] = dict.fromkeys(Stats.__struct_fields__, 0)
    return Stats(**{**fields, "requests_finished": {}, "draining": False, "peers": [], "histograms": b"", **changes})


def tokens(rows: Iterable[tuple[int, int, int]], cached: dict[int, int] | None = None, logprobs: Any = None) -> Tokens:
    """A frame of (request id, token, finish) rows."""
    ids, values, finishes = zip(*rows, strict=True)
    cached = cached or {}
    return Tokens(
        np.array(ids, np.int64).tobytes(),
        np.array(values, np.int32).tobytes(),
        np.array(finishes, np.uint8).tobytes(),
        np.array(list(cached), np.int64).tobytes(),
        np.array(list(cached.values()), np.int32).tobytes(),
        logprobs,
    )


def logprob_columns(rows: dict[int, tuple[float, int, list[int], list[float]]]) -> Logprobs:
    values = list(rows.values())
    return Logprobs(
        row=np.array(list(rows), np.int32).tobytes(),
        logprob=np.array([v[0] for v in values], np.float32).tobytes(),
        rank=np.array([v[1] for v in values], np.int32).tobytes(),
        width=len(values[0][2]),
        top_token=np.array([v[2] for v in values], np.int32).tobytes(),
        top_logprob=np.array([v[3] for v in values], np.float32).tobytes(),
    )


def whole_answer(admit: Admit, ids: Iterable[int], finish: FinishReason = LENGTH) -> Tokens:
    """All of `ids` for one request, in one frame."""
    ids = list(ids)
    return tokens([(admit.request_id, token, finish if i == len(ids) - 1 else RUNNING) for i, token in enumerate(ids)])


class ScriptedScheduler:
    """Context manager. `welcome` may be None (silence), and `answers` switched off and on, at any time."""

    def __init__(
        self,
        *,
        welcome: Message | None = None,
        model_card: ModelCard | None = None,
        on_admit: Callable[[Admit], Iterable[Message]] | None = None,
        directory: EndpointDirectory | None = None,
    ) -> None:
        """`directory`: take the place of another scheduler, which has hung up."""
        self.card = model_card or card()
        self.welcome = welcome or Welcome(PROTOCOL_VERSION, True, self.card, 1, 100, 16)
        self.on_admit = on_admit
        self.answers = True
        self.stats = stats()
        self.seen: list[Message] = []
        self.identities: set[bytes] = set()
        self._arrived: queue.Queue[Message] = queue.Queue()
        self._owns_directory = directory is None
        self.directory = directory or EndpointDirectory()
        self._context = zmq.Context()
        self._router = bind_router(self._context, self.directory.frontend)
        self._commands = self._context.socket(zmq.PAIR)
        self._commands.bind("inproc://commands")
        self._script = self._context.socket(zmq.PAIR)
        self._script.connect("inproc://commands")
        self._identity = b""
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def endpoint(self) -> str:
        return self.directory.frontend

    def __enter__(self) -> ScriptedScheduler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.hang_up()
        if self._owns_directory:
            self.directory.close()

    def hang_up(self) -> None:
        """Close every connection, as if this process had died; the endpoint directory stays."""
        if self._script.closed:
            return
        self._script.send(b"")
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()
        self._script.close()
        self._context.term()

    def send(self, *messages: Message | bytes) -> None:
        """To the peer that spoke last. From one thread of the test."""
        for message in messages:
            self._script.send(message if isinstance(message, bytes) else encode(message))

    def expect(self, kind: type[MessageT]) -> MessageT:
        """The next message of this kind; others that come before are skipped. Fails after WAIT_S."""
        while True:
            message = self._arrived.get(timeout=WAIT_S)
            if isinstance(message, kind):
                return message

    def count(self, kind: type[Message]) -> int:
        return sum(isinstance(message, kind) for message in self.seen)

    def _run(self) -> None:
        try:
            self._serve()
        finally:
            self._router.close(linger=0)
            self._commands.close()

    def _serve(self) -> None:
        poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
        poller.register(self._commands, zmq.POLLIN)
        while True:
            events = dict(poller.poll())
            if self._router in events:
                self._identity, payload = self._router.recv_multipart()
                self.identities.add(self._identity)
                self._on_message(decode_frontend(payload))
            if self._commands in events:
                payload = self._commands.recv()
                if not payload:
                    return
                self._send(payload)

    def _on_message(self, message: Message) -> None:
        self.seen.append(message)
        self._arrived.put(message)
        if not self.answers:
            return
        if isinstance(message, Hello):
            self._answer(self.welcome)
        elif isinstance(message, (Heartbeat, GetStats)):
            self._answer(self.stats)
        elif isinstance(message, Admit) and self.on_admit is not None:
            for answer in self.on_admit(message):
                self._answer(answer)

    def _answer(self, message: Message) -> None:
        self._send(encode(message))

    def _send(self, payload: bytes) -> None:
        try:
            self._router.send_multipart([self._identity, payload])
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:  # the peer left after it asked
                raise


def run(work: Coroutine[Any, Any, Any]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(3 * WAIT_S):
            await work

    asyncio.run(bounded())


def with_client(
    script: Script | None, body: Callable[[ScriptedScheduler, AsyncClient], Coroutine[Any, Any, Any]]
) -> None:
    """Run `body` with a connected client; afterwards nothing may be left open."""

    async def main() -> None:
        with ScriptedScheduler(on_admit=script) as scheduler:
            async with AsyncClient(scheduler.endpoint, tokenizer=byte_level_tokenizer()) as client:
                await body(scheduler, client)
                assert client._replicas.open_sequences == 0

    run(main())


async def arrived(scheduler: ScriptedScheduler, kind: type[Any]) -> Any:
    return await asyncio.to_thread(scheduler.expect, kind)


async def until(condition: Any) -> None:
    """The condition must come true by itself; the test's own limit bounds the wait."""
    while not condition():
        await asyncio.sleep(0.005)


def answer(text: str, finish: FinishReason = LENGTH, one_frame: bool = False) -> Script:
    ids = byte_level_tokenizer().encode(text)

    def script(admit: Admit) -> Iterable[Message]:
        if one_frame:
            return [whole_answer(admit, ids, finish)]
        last = len(ids) - 1
        return [tokens([(admit.request_id, t, finish if i == last else RUNNING)]) for i, t in enumerate(ids)]

    return script


async def collect(chunks: Any) -> list[Chunk]:
    return [chunk async for chunk in chunks]
