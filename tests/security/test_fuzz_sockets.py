"""Whatever arrives on a ZMQ socket or stands in a ring: no process ends, and the next good request is served."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from executor.relay import NodeLostError, Relay
from frontend.children import engine_roles
from frontend.client import AsyncClient
from frontend.directory import Directory
from frontend.plumbing import Plumbing
from frontend.replica import Replica
from frontend.supervisor import Supervisor
from ipc.auth import make_server_keys
from ipc.config import RING_SLOTS, RelayChannels
from ipc.control import ExecutorHello, ExecutorLost, NodeHello, SchedulerReady, decode_node
from ipc.errors import ProtocolError, TandemError
from ipc.frames import Bytes, read_plan
from ipc.results import RESULT_HEADER_BYTES, ResultLayout, ResultWord, read_result
from ipc.ring import Ring, RingReader, RingWriter, create_ring
from ipc.schema import (
    MAX_MESSAGE_BYTES,
    PROTOCOL_VERSION,
    FinishReason,
    Goodbye,
    Hello,
    Member,
    Members,
    Tokens,
    Welcome,
    decode_scheduler,
    encode,
)
from ipc.sockets import EndpointDirectory, bind_router, connect_dealer, new_identity
from tests.frontend.scripted_scheduler import ScriptedScheduler, whole_answer
from tests.scheduler.bench import LIMIT_MS, Bench, Peer, admit, receive_rows, rows
from tests.scheduler.pipeline import tiny_config
from tests.security.strategies import (
    CONTROL_MESSAGES,
    DIRECTORY_MESSAGES,
    EDGES,
    LAUNCHER_MESSAGES,
    NESTED,
    NODE_MESSAGES,
    QUIET,
    frames,
    mutated,
    payloads,
)

LENGTH = FinishReason.LENGTH
MEMBER = Member(0, "ipc:///somewhere")
LAST_EPOCH = 5_000_000  # of the executor that a stranger at the control socket announces after all else


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
    for other in bench.loop.mail.peers:
        if other.identity != peer.socket.getsockopt(zmq.IDENTITY):
            bench.loop.mail.remove(other, "the test is over")
    stats = peer.stats()
    assert (stats.running, stats.waiting, stats.blocks_free) == (0, 0, stats.blocks_total)
    bench.loop.state.check()
    bench.loop.mail.remove(next(iter(bench.loop.mail.peers)), "the test is over")
    peer.socket.close()


@settings(max_examples=60, **QUIET)
@given(messages=st.lists(frames, min_size=3, max_size=8))
def test_a_stranger_at_the_frontend_socket(bench: Bench, messages: list[list[bytes]]) -> None:
    stranger = Peer(bench, bench.frontend, decode_scheduler)
    for parts in filter(None, messages):
        stranger.socket.send_multipart(parts)
    stranger.send(encode(Hello(PROTOCOL_VERSION, "frontend", "no stranger any more", 1)))
    stranger.receive(Welcome)  # whatever it sent before has been read
    is_unharmed(bench)
    stranger.socket.close()


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
@given(messages=st.lists(payloads | mutated(CONTROL_MESSAGES), min_size=1, max_size=8))
def test_the_control_socket(bench: Bench, messages: list[bytes]) -> None:
    """One there may say that it is the launcher, or an executor; what is no executor is not believed."""
    socket = connect_dealer(bench.context, bench.control, new_identity())
    last = [
        Hello(PROTOCOL_VERSION, "launcher", "launcher", 1),
        ExecutorLost(LAST_EPOCH - 1),
        ExecutorHello(PROTOCOL_VERSION, LAST_EPOCH, 2, 17),
    ]
    for payload in [*messages, *map(encode, last)]:
        socket.send(payload)
    for _ in range(LIMIT_MS):
        bench.turn()
        if bench.loop.state.epoch == LAST_EPOCH:
            break
        socket.poll(1)
    bench.launcher.socket.close()
    bench.greet()
    bench.replace_executor(epoch=1)
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


# --- the launcher, whose scheduler sends garbage


@pytest.fixture(scope="module")
def launcher() -> Iterator[tuple[Supervisor, Replica, zmq.Socket[bytes], bytes]]:
    """A supervisor without children, its only replica, and the socket of that one's scheduler with its identity."""
    config = tiny_config()
    plumbing = Plumbing(config, None)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
    router = bind_router(context, plumbing.lines[0].control)
    directory = Directory(context, plumbing.endpoints.frontend)
    replica = Replica(0, config, plumbing.lines[0], context, {})
    options: dict[str, Any] = {"shutdown_timeout_s": 1, "max_restarts": 1, "on_ready": lambda: None}
    supervisor = Supervisor(config, plumbing, [replica], directory, engine_roles(0, fake_executor=True), **options)
    supervisor._greet(replica)
    identity, _ = router.recv_multipart()
    yield supervisor, replica, router, identity
    replica.control.close()
    directory.close()
    router.close()
    plumbing.close()


@settings(max_examples=60, **QUIET)
@given(messages=st.lists(payloads | mutated(LAUNCHER_MESSAGES), min_size=1, max_size=8), kv_blocks=st.integers(1, 99))
def test_a_launcher_survives_its_scheduler(
    launcher: tuple[Supervisor, Replica, zmq.Socket[bytes], bytes], messages: list[bytes], kv_blocks: int
) -> None:
    supervisor, replica, router, identity = launcher
    last = SchedulerReady(epoch=0, max_model_len=64, kv_tokens=4 * kv_blocks)
    for message in [*messages, encode(last)]:
        router.send_multipart([identity, message])
    for _ in range(LIMIT_MS):
        supervisor._on_control(replica)
        if replica.ready == last:
            break
        replica.control.poll(1)
    assert replica._num_blocks == kv_blocks + 1


@pytest.fixture(scope="module")
def directory() -> Iterator[tuple[Directory, str]]:
    """One with a member of its own, and its endpoint."""
    sockets = EndpointDirectory()
    with zmq.Context() as context:
        made = Directory(context, sockets.frontend)
        made.put(MEMBER)
        yield made, sockets.frontend
        made.close()
    sockets.close()


@settings(max_examples=60, **QUIET)
@given(messages=st.lists(frames | mutated(DIRECTORY_MESSAGES).map(lambda m: [m]), min_size=1, max_size=8))
def test_strangers_at_the_directory(directory: tuple[Directory, str], messages: list[list[bytes]]) -> None:
    """Whatever they say, a client learns of the members, and what they added leaves with them."""
    made, endpoint = directory
    with zmq.Context() as context:
        stranger, client = (connect_dealer(context, endpoint, new_identity()) for _ in range(2))
        for parts in filter(None, messages):
            stranger.send_multipart(parts)
        stranger.send(encode(Goodbye()))
        client.send(encode(Hello(PROTOCOL_VERSION, "frontend", "client", 1)))
        for _ in range(LIMIT_MS):
            made.serve()
            if client.poll(1):
                break
        answer = decode_scheduler(client.recv())
        assert isinstance(answer, Members)
        assert MEMBER in answer.members
        for _ in range(LIMIT_MS):
            made.serve()
            if made.members == [MEMBER]:
                break
        assert made.members == [MEMBER]
        client.send(encode(Goodbye()))
        stranger.close()
        client.close()


@pytest.fixture(scope="module")
def relay(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Relay, RingWriter]]:
    """One that knows a single further node, and the plan ring, which is empty."""
    folder = tmp_path_factory.mktemp("keys")
    make_server_keys(folder)
    config = tiny_config(ranks=2, nodes=2, nodes_endpoint="tcp://127.0.0.1:0", auth_keys=str(folder))
    listener, sockets = socket.create_server(("127.0.0.1", 0)), EndpointDirectory()
    ring, bell = create_ring(RING_SLOTS, config.limits.plan_bytes, 2), os.eventfd(0)
    channels = RelayChannels(
        epoch=0, place=1, plan_ring=ring, plan_bell=bell, result_bell=bell, control=sockets.replica(0)[1],
        listener=listener.detach(), store="127.0.0.1:1", parent_pipe=-1,
    )  # fmt: skip
    made = Relay(config, channels)
    yield made, RingWriter(ring)
    for each in (made._router, made._control, made._gatekeeper.socket):
        each.close(linger=0)
    sockets.close()


@settings(max_examples=100, **QUIET)
@given(messages=st.lists(payloads | mutated(NODE_MESSAGES), max_size=8), hello=st.booleans())
def test_whatever_a_node_says(relay: tuple[Relay, RingWriter], messages: list[bytes], hello: bool) -> None:
    """Nothing, a dropped message, or the end of all ranks; and no plan is given back that was not sent."""
    one, plans = relay
    for payload in [encode(NodeHello(PROTOCOL_VERSION, 1)), *messages] if hello else messages:
        try:
            one._handle(b"node", decode_node(payload))
        except (ProtocolError, NodeLostError):
            continue
    assert plans.acked == plans.head == 0


# --- rings


class Scribble:
    """Bytes that an executor may have left in a result's slot, and whether the slot's stamp is right."""

    def __init__(self, places: dict[int, bytes], torn: bool) -> None:
        self.places, self.torn = places, torn

    def __call__(self, ring: RingWriter, seq: int, result: Bytes) -> None:
        for at, values in self.places.items():
            values = values[: len(result) - at]
            result[at : at + len(values)] = np.frombuffer(values, np.uint8)
        if self.torn:
            ring.begin(seq)


words = st.sampled_from(EDGES).map(lambda value: (value % 2**64).to_bytes(8, "little"))
headers = st.dictionaries(st.sampled_from(range(0, 8 * len(ResultWord), 8)), words, max_size=3)
scribbles = st.builds(
    lambda header, columns, torn: Scribble(header | columns, torn),
    headers,
    st.dictionaries(st.integers(0, RESULT_HEADER_BYTES + 64), st.binary(min_size=1, max_size=20), max_size=2),
    st.sampled_from([False, False, False, True]),
)


@settings(max_examples=150, **QUIET)
@given(scribble=scribbles, num_requests=st.integers(1, 3))
def test_the_result_ring(bench: Bench, scribble: Scribble, num_requests: int) -> None:
    """What is not believed costs the executor its place, never the scheduler; every stream is complete."""
    peer = bench.frontend_peer()
    bench.launcher.inbox.clear()
    bench.damage = scribble
    peer.send(*(admit(i, max_tokens=4) for i in range(num_requests)))
    found: list[tuple[int, int, int]] = []
    for _ in range(LIMIT_MS):
        bench.turn()
        while peer.socket.poll(0):
            message = decode_scheduler(peer.socket.recv())
            found += rows([message]) if isinstance(message, Tokens) else []
        # One that claims an earlier epoch is dropped in silence; then the watchdog sees a step that never ends.
        is_stuck = bench.loop.state.inflight and bench.results.acked == bench.results.head
        if bench.loop.control.accusation is not None or is_stuck:
            bench.replace_executor(bench.loop.state.epoch + 1)
        if sum(finish != FinishReason.RUNNING for _, _, finish in found) == num_requests:
            break
    for i in range(num_requests):
        tokens, finishes = zip(*((token, finish) for owner, token, finish in found if owner == i), strict=True)
        if finishes[-1] == LENGTH:
            assert len(tokens) == 4
            assert all(0 <= token < bench.config.card.vocab_size for token in tokens)
        else:  # a scribble may say what is possible: end of sequence, or NaN
            assert finishes[-1] in (FinishReason.STOP, FinishReason.INVALID_LOGITS)
    peer.socket.close()
    is_unharmed(bench)


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
