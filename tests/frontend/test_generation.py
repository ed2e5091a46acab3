"""A generation's two ways out: chunks for the reader, and what goes past it while it waits."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from frontend.generation import Generation
from frontend.inflight import Flight, Turns
from frontend.request import Chunk, GenerateParams
from ipc.errors import UnavailableError
from ipc.schema import FinishReason
from tests.frontend.scripted_scheduler import card
from tests.frontend.tokenizers_for_tests import byte_level_tokenizer

TEXT = "the quick brown fox jumps over the lazy dog"
WAIT_S = 30


class Engine:
    """Takes sequences; `say` is what the scheduler would do to one of them."""

    def __init__(self) -> None:
        self.flights: Sequence[Flight] = ()
        self.stopped: list[Flight] = []
        self.turns = Turns()

    def submit(self, flights: Sequence[Flight]) -> None:
        self.flights = list(flights)

    def abort(self, flights: Sequence[Flight], *, stopped: bool = False) -> None:
        self.stopped += flights if stopped else ()

    def say(self, ids: Sequence[int], finish: FinishReason = FinishReason.RUNNING, choice: int = 0) -> None:
        flight = self.flights[choice]
        flight.tokens.extend(ids)
        if finish is not FinishReason.RUNNING:
            flight.end(finish)
        flight.mailbox.post(flight, self.turns)


class Sink:
    def __init__(self) -> None:
        self.takes_data = True
        self.chunks: list[Chunk] = []
        self.error: Exception | None = None

    def encode(self, chunks: Sequence[Chunk]) -> bytes:
        self.written = chunks
        return b"events"

    def write_part(self, data: bytes) -> None:
        if self.error is not None:
            raise self.error
        assert data == b"events"
        self.chunks += self.written

    @property
    def text(self) -> str:
        return "".join(chunk.text for chunk in self.chunks)


class Scene:
    """A generation with a sink, and a reader that waits."""

    def __init__(self, **params: Any) -> None:
        self.engine, self.sink = Engine(), Sink()
        self.generation = Generation(
            self.engine,
            byte_level_tokenizer(),
            card(),
            [[1, 2]],
            GenerateParams(**params),
            grammar="",
            each_token=True,
            timeout_s=None,
        )
        self.generation.relay_to(self.sink, self.sink.encode)
        self.reader = asyncio.ensure_future(self.generation.chunks())

    async def turn(self) -> None:
        """Let everything that is due run."""
        for _ in range(5):
            await asyncio.sleep(0)


def run(scenario: Any) -> None:
    asyncio.run(asyncio.wait_for(scenario(), WAIT_S))


def test_tokens_go_past_a_waiting_reader_and_only_the_end_wakes_it() -> None:
    async def scenario() -> None:
        scene, ids = Scene(), byte_level_tokenizer().encode(TEXT)
        await scene.turn()
        for token in ids[:-2]:
            scene.engine.say([token])
            await scene.turn()
        assert not scene.reader.done()
        assert [chunk.token_ids for chunk in scene.sink.chunks] == [(token,) for token in ids[:-2]]
        scene.engine.say(ids[-2:], FinishReason.LENGTH)
        (last,) = await scene.reader
        assert last.finish_reason == "length"
        assert scene.sink.text + last.text == TEXT
        assert await scene.generation.chunks() == []

    run(scenario)


def test_what_comes_before_the_loop_turns_goes_as_one_chunk() -> None:
    async def scenario() -> None:
        scene, ids = Scene(n=2), byte_level_tokenizer().encode(TEXT)
        await scene.turn()
        for token in ids:
            scene.engine.say([token], choice=0)
        scene.engine.say(ids[:1], choice=1)
        await scene.turn()
        assert [(chunk.index, chunk.token_ids) for chunk in scene.sink.chunks] == [(0, tuple(ids)), (1, (ids[0],))]
        scene.reader.cancel()

    run(scenario)


def test_a_sink_that_is_not_open_leaves_all_to_the_reader() -> None:
    async def scenario() -> None:
        scene, ids = Scene(), byte_level_tokenizer().encode(TEXT)
        await scene.turn()
        scene.engine.say(ids[:2])
        await scene.turn()
        scene.sink.takes_data = False
        scene.engine.say(ids[2:4])
        (chunk,) = await scene.reader
        assert [c.token_ids for c in scene.sink.chunks] == [tuple(ids[:2])]
        assert chunk.token_ids == tuple(ids[2:4])

    run(scenario)


def test_a_stop_string_ends_it_on_this_way_too() -> None:
    async def scenario() -> None:
        scene, ids = Scene(stop=" jumps over"), byte_level_tokenizer().encode(TEXT)
        await scene.turn()
        for token in ids:
            scene.engine.say([token])
            await scene.turn()
        chunks = await scene.reader
        assert chunks[-1].finish_reason == "stop" and chunks[-1].stop_reason == " jumps over"
        assert scene.sink.text + "".join(chunk.text for chunk in chunks) == "the quick brown fox"
        assert scene.engine.stopped == scene.engine.flights
        assert await scene.generation.chunks() == []

    run(scenario)


def test_the_reader_gets_the_faults_of_the_engine_and_of_the_sink() -> None:
    async def scenario() -> None:
        scene, ids = Scene(), byte_level_tokenizer().encode(TEXT)
        await scene.turn()
        scene.engine.say(ids[:1])
        await scene.turn()
        scene.engine.say([], FinishReason.ABORTED)
        with pytest.raises(UnavailableError):
            await scene.reader
        scene = Scene()
        await scene.turn()
        scene.sink.error = ZeroDivisionError("in the sink")
        scene.engine.say(ids[:1])
        with pytest.raises(ZeroDivisionError):
            await scene.reader

    run(scenario)
