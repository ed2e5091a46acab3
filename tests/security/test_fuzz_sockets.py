"""Whatever arrives on a ZMQ socket or stands in a ring: no process ends, and the next good request is served."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import numpy as np
import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from frontend.client import AsyncClient
from ipc.errors import ProtocolError, TandemError
from ipc.frames import ResultLayout, read_plan, read_result
from ipc.ring import Ring, RingReader, create_ring
from ipc.schema import MAX_MESSAGE_BYTES, PROTOCOL_VERSION, FinishReason, Hello, Tokens, Welcome, encode
from ipc.sockets import connect_dealer, new_identity
from tests.frontend.scripted_scheduler import ScriptedScheduler, whole_answer
from tests.scheduler.test_loop import LIMIT_MS, Bench, admit, receive_rows
from tests.security.strategies import NESTED, QUIET, frames, mutated, payloads

LENGTH = FinishReason.LENGTH


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    made = Bench(tmp_path_factory.mktemp("bench"), num_blocks=17)
    made.attach()
    yield made
    made.close()


def is_unharmed(bench: Bench) -> None:
    """A new frontend is served, and nothing of the others stays behind."""
    peer = bench.frontend_peer()
    peer.send(admit(1))
    assert receive_rows(peer, 3)[-1] == (1, 5, LENGTH)
    for other in bench.loop.peers:
        if other.identity != peer.socket.getsockopt(zmq.IDENTITY):
            bench.loop._remove(other, "the test is over")
    stats = peer.stats()
    assert (stats.running, stats.waiting, stats.blocks_free) == (0, 0, stats.blocks_total)
    bench.loop.state.check()
    bench.loop._remove(next(iter(bench.loop.peers)), "the test is over")
    peer.socket.close()


@settings(max_examples=60, **QUIET)
@given(messages=st.lists(frames, min_size=3, max_size=8))
def test_a_stranger_at_the_frontend_socket(bench: Bench, messages: list[list[bytes]]) -> None:
    socket = connect_dealer(bench.context, bench.frontend, new_identity())
    for parts in filter(None, messages):
        socket.send_multipart(parts)
    for _ in range(3):
        bench.turn()
    is_unharmed(bench)
    socket.close()


@settings(max_examples=120, **QUIET)
@given(messages=st.lists(mutated(), min_size=5, max_size=10))
def test_a_frontend_whose_messages_decode(bench: Bench, messages: list[bytes]) -> None:
    """It is known to the scheduler, and its fields hold whatever their types allow."""
    peer = bench.frontend_peer()
    peer.send(*messages)
    peer.send(encode(Hello(PROTOCOL_VERSION, "frontend", "again", 1)))  # one of them may have been a Goodbye
    peer.receive(Welcome)
    is_unharmed(bench)
    peer.socket.close()


@settings(max_examples=60, **QUIET)
@given(messages=st.lists(payloads, min_size=1, max_size=8))
def test_the_control_socket(bench: Bench, messages: list[bytes]) -> None:
    socket = connect_dealer(bench.context, bench.control, new_identity())
    for payload in messages:
        socket.send(payload)
    for _ in range(3):
        bench.turn()
    is_unharmed(bench)
    socket.close()


def test_a_frame_beyond_the_limit_ends_its_connection_only(bench: Bench) -> None:
    peer = bench.frontend_peer()
    monitor = peer.socket.get_monitor_socket(zmq.Event.DISCONNECTED)
    peer.socket.send(bytes(MAX_MESSAGE_BYTES + 1), copy=False)
    for _ in range(LIMIT_MS):
        bench.turn()
        if monitor.poll(1):
            break
    else:
        raise AssertionError("the connection was kept")
    peer.socket.disable_monitor()
    peer.socket.close()
    is_unharmed(bench)


# --- a client whose scheduler sends garbage


@settings(max_examples=25, **QUIET)
@given(payload=st.one_of(payloads.filter(bool), st.builds(Tokens, *[st.binary(max_size=24)] * 5).map(encode)))
def test_a_client_survives_its_scheduler(payload: bytes) -> None:
    """The request in flight fails with a typed error or goes on; the next one is served on a new connection."""

    async def talk() -> None:
        with ScriptedScheduler(on_admit=lambda admitted: [whole_answer(admitted, [7, 8])]) as scheduler:
            async with AsyncClient(scheduler.endpoint) as client:
                scheduler.send(payload)
                for _ in range(1000):
                    try:
                        found = await client.generate([1, 2], max_tokens=2, timeout_s=10)
                    except TandemError:
                        await asyncio.sleep(0.01)
                        continue
                    assert found.token_ids == (7, 8)
                    return
                raise AssertionError("the client did not recover")

    asyncio.run(talk())


# --- rings


@settings(max_examples=200, **QUIET)
@given(words=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=64, max_size=64))
def test_frames_of_random_words_are_typed_errors_or_frames(words: list[int]) -> None:
    layout = ResultLayout(4, 2)
    payload = np.zeros(4096, np.uint8)
    payload[:512] = np.array(words, np.int64).view(np.uint8)
    for read in (lambda: read_result(payload, layout), lambda: read_plan(payload)):
        try:
            frame = read()
        except ProtocolError:
            continue
        assert frame.seq == words[0]


def test_a_ring_that_is_none_and_a_torn_frame() -> None:
    fd = create_ring(2, 100)
    reader = RingReader(fd)
    reader._head[0] = 1  # published, but its stamp says otherwise
    with pytest.raises(ProtocolError, match="slot 1 holds frame 0, expected 1"):
        reader.poll()
    reader.memory[:8] = 0
    with pytest.raises(ProtocolError, match="not a ring of this version"):
        Ring(fd)


def test_deep_nesting_is_no_stack_overflow(bench: Bench) -> None:
    peer = bench.frontend_peer()
    before = peer.stats().dropped_messages
    peer.send(NESTED)
    assert peer.stats().dropped_messages == before + 1
    peer.socket.close()
    is_unharmed(bench)
