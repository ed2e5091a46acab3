"""The connection: handshake, heartbeats, loss and return, aborts, frames that are none. A real ROUTER answers."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import pytest

from frontend.inflight import Flight, Mailbox
from frontend.session import Patience, Session
from ipc.errors import (
    CancelledError,
    CrashedExecutorError,
    InvalidLogitsError,
    OverloadedError,
    ProtocolError,
    SlowConsumerError,
    TandemError,
    UnavailableError,
)
from ipc.schema import (
    PROTOCOL_VERSION,
    Abort,
    Admit,
    Draining,
    FinishReason,
    Goodbye,
    Heartbeat,
    Hello,
    Rejected,
    SamplingParams,
    Tokens,
    Welcome,
    pack_tokens,
    unpack_tokens,
)
from tests.frontend.scripted_scheduler import (
    LENGTH,
    RUNNING,
    STOP,
    WAIT_S,
    ScriptedScheduler,
    arrived,
    card,
    run,
    stats,
    tokens,
    until,
)


async def opened(scheduler: ScriptedScheduler, **patience: float) -> Session:
    session = Session(scheduler.endpoint, "test", Patience(**patience))
    await session.open(WAIT_S, wait_ready=True)
    return session


def with_session(body: Callable[[ScriptedScheduler, Session], Coroutine[Any, Any, None]], **patience: float) -> None:
    """Run `body` with a scheduler and a session that is open to it."""

    async def main() -> None:
        with ScriptedScheduler() as scheduler:
            session = await opened(scheduler, **patience)
            await body(scheduler, session)
            await session.close()

    run(main())


def flight(mailbox: Mailbox | None = None, **params: Any) -> Flight:
    return Flight(mailbox or Mailbox(True), 0, pack_tokens([1, 2]), SamplingParams(**params), 0, "")


def test_hello_says_who_and_which_version() -> None:
    async def main() -> None:
        with ScriptedScheduler() as scheduler:
            session = await opened(scheduler)
            hello = await arrived(scheduler, Hello)
            assert (hello.version, hello.role, hello.name, hello.pid) == (
                PROTOCOL_VERSION,
                "frontend",
                "test",
                os.getpid(),
            )
            assert session.connected
            assert session.ready
            assert session.welcome is not None
            assert session.welcome.card == scheduler.card
            await session.close()
            await arrived(scheduler, Goodbye)

    run(main())


@pytest.mark.parametrize(
    "answer",
    [
        Welcome(PROTOCOL_VERSION + 1, True, card(), 1, 1, 16),
        Rejected(-1, "protocol_error", f"protocol {PROTOCOL_VERSION} is not spoken here, {PROTOCOL_VERSION + 1} is"),
    ],
)
def test_another_version_is_refused_with_both_numbers(answer: Any) -> None:
    async def main() -> None:
        numbers = rf"{PROTOCOL_VERSION + 1}.*{PROTOCOL_VERSION}|{PROTOCOL_VERSION}.*{PROTOCOL_VERSION + 1}"
        with ScriptedScheduler(welcome=answer) as scheduler, pytest.raises(ProtocolError, match=numbers):
            await opened(scheduler)

    run(main())


def test_no_scheduler_is_unavailable_in_time() -> None:
    async def main() -> None:
        session = Session("ipc:///tmp/tandem-test-nobody.sock", "test")
        with pytest.raises(UnavailableError, match="did not answer within"):
            await session.open(0.05, wait_ready=False)

    run(main())


def test_ready_comes_with_the_second_welcome() -> None:
    async def main() -> None:
        starting = Welcome(PROTOCOL_VERSION, False, card(), 0, 0, 16)
        with ScriptedScheduler(welcome=starting) as scheduler:
            session = Session(scheduler.endpoint, "test")
            await session.open(WAIT_S, wait_ready=False)
            assert session.connected
            assert not session.ready
            with pytest.raises(UnavailableError, match="starting"):
                session.submit([flight()])
            scheduler.send(Welcome(PROTOCOL_VERSION, True, card(max_model_len=99), 1, 7, 16))
            await until(lambda: session.ready)
            assert session.welcome is not None
            assert session.welcome.card.max_model_len == 99
            session.submit([flight()])
            await arrived(scheduler, Admit)
            await session.close()

    run(main())


def test_heartbeats_are_sent_and_their_answers_kept() -> None:
    async def main() -> None:
        with ScriptedScheduler() as scheduler:
            scheduler.stats = stats(running=3)
            session = await opened(scheduler, heartbeat_s=0.01)
            await until(lambda: scheduler.count(Heartbeat) >= 3)
            await until(lambda: session.last_stats is not None)
            assert session.last_stats == scheduler.stats
            assert (await session.stats(WAIT_S)).running == 3
            await session.close()

    run(main())


def test_silence_is_answered_by_a_new_connection_that_replays_what_is_open() -> None:
    async def body(scheduler: ScriptedScheduler, session: Session) -> None:
        mailbox = Mailbox(True)
        open_ones = [flight(mailbox) for _ in range(3)]
        session.submit(open_ones)
        scheduler.send(tokens([(open_ones[1].request_id, 7, RUNNING)], cached={open_ones[1].request_id: 16}))
        assert await mailbox.wait() == [open_ones[1]]
        scheduler.answers = False
        await until(lambda: not session.connected)
        assert not session.ready
        with pytest.raises(UnavailableError, match="does not answer"):
            session.submit([flight()])
        session.abort(open_ones[2:])
        scheduler.answers = True
        await until(lambda: session.ready and scheduler.count(Admit) >= 5)
        assert len(scheduler.identities) >= 2, "what was queued for the old connection may not come through the new"
        replays = [m for m in scheduler.seen if isinstance(m, Admit)][-2:]
        assert [(m.request_id, unpack_tokens(m.output).tolist(), m.replay) for m in replays] == [
            (open_ones[0].request_id, [], True),
            (open_ones[1].request_id, [7], True),
        ]
        ids = [m.request_id for m in replays]
        scheduler.send(tokens([(i, 5, LENGTH) for i in ids], cached=dict.fromkeys(ids, 32)))
        await until(lambda: session.open_sequences == 0)
        assert [list(each.tokens) for each in open_ones[:2]] == [[5], [7, 5]]
        assert [each.cached_tokens for each in open_ones[:2]] == [32, 16], "the prompt was computed the first time"
        assert not any(each.error for each in open_ones)

    with_session(body, heartbeat_s=0.02, heartbeat_limit_s=1.0)


def test_open_requests_fail_when_the_scheduler_does_not_come_back_in_time() -> None:
    async def body(scheduler: ScriptedScheduler, session: Session) -> None:
        mailbox = Mailbox(True)
        lost = flight(mailbox)
        session.submit([lost])
        scheduler.answers = False
        assert await mailbox.wait() == [lost]
        assert isinstance(lost.error, UnavailableError)
        assert session.open_sequences == 0
        scheduler.answers = True
        await until(lambda: session.ready)
        admits = scheduler.count(Admit)
        again = flight(mailbox)
        session.submit([again])
        await until(lambda: scheduler.count(Admit) == admits + 1)

    with_session(body, heartbeat_s=0.02, heartbeat_limit_s=0.2, reconnect_limit_s=0.6)


def test_a_scheduler_that_forgot_this_peer_is_greeted_again_and_told_what_is_open() -> None:
    async def body(scheduler: ScriptedScheduler, session: Session) -> None:
        mailbox = Mailbox(True)
        only = flight(mailbox)
        session.submit([only])
        await arrived(scheduler, Admit)
        scheduler.send(Rejected(-1, "unavailable", "say hello first"))
        assert (await arrived(scheduler, Admit)).replay
        scheduler.send(tokens([(only.request_id, 5, LENGTH)]))
        assert await mailbox.wait() == [only]
        assert only.error is None

    with_session(body)


def test_a_scheduler_in_the_place_of_a_dead_one_is_told_what_is_open() -> None:
    """More sequences than the socket takes at once; the connection itself says that the first scheduler is gone."""

    async def main() -> None:
        first = ScriptedScheduler()
        with first:
            session = await opened(first, heartbeat_s=600)
            mailbox = Mailbox(True)
            flights = [flight(mailbox, logit_bias=dict.fromkeys(range(300), 1.0)) for _ in range(1500)]
            for each in flights:
                while True:
                    try:
                        session.submit([each])
                        break
                    except UnavailableError:
                        await asyncio.sleep(0.001)
            await until(lambda: first.count(Admit) == len(flights))
            assert session.connected
            first.hang_up()
            with ScriptedScheduler(directory=first.directory) as second:
                await until(lambda: second.count(Admit) == len(flights))
                admits = [m for m in second.seen if isinstance(m, Admit)]
                assert all(m.replay for m in admits)
                assert [m.request_id for m in admits] == [each.request_id for each in flights]
                assert session.ready
                await session.close()

    run(main())


def test_tokens_reach_their_sequences_and_wake_a_reader_once() -> None:
    async def main() -> None:
        with ScriptedScheduler() as scheduler:
            session = await opened(scheduler)
            mailbox = Mailbox(True)
            one, two = flight(mailbox), flight(mailbox)
            session.submit([one, two])
            await arrived(scheduler, Admit)
            a, b = one.request_id, two.request_id
            frame = [(a, 5, RUNNING), (b, 6, RUNNING), (a, 7, RUNNING), (999, 8, RUNNING), (b, 0, STOP)]
            scheduler.send(tokens(frame, cached={b: 16, 999: 1}))
            assert await mailbox.wait() == [one, two]
            assert (list(one.tokens), one.finish) == ([5, 7], FinishReason.RUNNING)
            assert (list(two.tokens), two.finish, two.cached_tokens) == ([6, 0], FinishReason.STOP, 16)
            assert session.open_sequences == 1
            await session.close()
            assert isinstance(one.error, CancelledError)
            assert two.error is None

    run(main())


def test_a_reader_of_the_end_is_not_woken_before() -> None:
    async def body(scheduler: ScriptedScheduler, session: Session) -> None:
        mailbox = Mailbox(each_token=False)
        only = flight(mailbox)
        session.submit([only])
        await arrived(scheduler, Admit)
        waiting = asyncio.create_task(mailbox.wait())
        scheduler.send(tokens([(only.request_id, 5, RUNNING)]))
        await until(lambda: len(only.tokens) == 1)
        assert not waiting.done()
        scheduler.send(tokens([(only.request_id, 6, LENGTH)]))
        assert await waiting == [only]

    with_session(body)


@pytest.mark.parametrize(
    ("finish", "error"),
    [
        (FinishReason.ABORTED, UnavailableError),
        (FinishReason.INVALID_LOGITS, InvalidLogitsError),
        (FinishReason.SLOW_CONSUMER, SlowConsumerError),
        (FinishReason.CRASHED, CrashedExecutorError),
    ],
)
def test_bad_ends_are_typed_and_carry_no_token(finish: FinishReason, error: type[TandemError]) -> None:
    async def body(scheduler: ScriptedScheduler, session: Session) -> None:
        mailbox = Mailbox(True)
        only = flight(mailbox)
        session.submit([only])
        await arrived(scheduler, Admit)
        scheduler.send(tokens([(only.request_id, 5, RUNNING), (only.request_id, -1, finish)]))
        await mailbox.wait()
        assert type(only.error) is error
        assert list(only.tokens) == [5]

    with_session(body)


def test_rejection_is_typed() -> None:
    async def main() -> None:
        with ScriptedScheduler(on_admit=lambda a: [Rejected(a.request_id, "queue_full", "9 of 9")]) as scheduler:
            session = await opened(scheduler)
            mailbox = Mailbox(True)
            only = flight(mailbox)
            session.submit([only])
            await mailbox.wait()
            assert isinstance(only.error, OverloadedError)
            assert session.open_sequences == 0
            await session.close()

    run(main())


def test_aborts_of_one_turn_go_out_together_and_only_for_open_sequences() -> None:
    async def body(scheduler: ScriptedScheduler, session: Session) -> None:
        flights = [flight() for _ in range(5)]
        session.submit(flights)
        for _ in flights:
            await arrived(scheduler, Admit)
        scheduler.send(tokens([(flights[0].request_id, 5, LENGTH)]))
        await until(lambda: flights[0].finish == LENGTH)
        session.abort(flights[:2])
        session.abort(flights[1:4])
        assert (await arrived(scheduler, Abort)).request_ids == [f.request_id for f in flights[1:4]]
        scheduler.send(tokens([(flights[1].request_id, 5, RUNNING), (flights[4].request_id, 5, RUNNING)]))
        await until(lambda: len(flights[4].tokens) == 1)
        assert not flights[1].tokens

    with_session(body)


def test_a_draining_engine_takes_no_new_request_and_finishes_open_ones() -> None:
    async def body(scheduler: ScriptedScheduler, session: Session) -> None:
        mailbox = Mailbox(True)
        only = flight(mailbox)
        session.submit([only])
        await arrived(scheduler, Admit)
        scheduler.send(Draining())
        await until(lambda: session.draining)
        with pytest.raises(UnavailableError, match="shutting down"):
            session.submit([flight()])
        scheduler.send(tokens([(only.request_id, 5, LENGTH)]))
        await mailbox.wait()
        assert only.error is None

    with_session(body)


def test_a_scheduler_that_does_not_read_is_unavailable_and_loses_no_abort() -> None:
    async def body(scheduler: ScriptedScheduler, session: Session) -> None:
        reading = threading.Event()
        scheduler.on_admit = lambda _: [] if reading.wait(WAIT_S) else [Draining()]
        flights: list[Flight] = []
        with pytest.raises(UnavailableError, match="takes no more messages"):
            for _ in range(1_000_000):
                flights.append(flight(logit_bias=dict.fromkeys(range(300), 1.0)))
                session.submit(flights[-1:])
        assert session.open_sequences == len(flights) - 1
        session.abort(flights)
        assert session.open_sequences == 0
        reading.set()
        ids = [each.request_id for each in flights]
        await until(lambda: sorted(i for m in scheduler.seen if isinstance(m, Abort) for i in m.request_ids) == ids)
        assert scheduler.count(Admit) == len(flights) - 1

    with_session(body, heartbeat_s=0.02, heartbeat_limit_s=600)


def test_a_request_of_more_sequences_than_its_socket_takes_is_sent_bit_by_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(scheduler: ScriptedScheduler, session: Session) -> None:
        offer, room = session._link.offer, [3]

        def narrow(payload: bytes) -> bool:
            """Takes three messages, and more in the loop's next turn."""
            if not room[0]:
                asyncio.get_running_loop().call_soon(room.__setitem__, 0, 3)
                return False
            room[0] -= 1
            return offer(payload)

        monkeypatch.setattr(session._link, "offer", narrow)
        flights = [flight() for _ in range(20)]
        session.submit(flights)
        session.abort(flights[10:11])
        with pytest.raises(UnavailableError, match="takes no more messages"):
            session.submit([flight()])  # whoever comes later waits for nobody
        sent = [each for each in flights if each is not flights[10]]
        await until(lambda: scheduler.count(Admit) == len(sent))
        admits = [message for message in scheduler.seen if isinstance(message, Admit)]
        assert [admit.request_id for admit in admits] == [each.request_id for each in sent]
        assert not any(admit.replay for admit in admits), "the limits of the queue are for them too"
        assert session.open_sequences == len(sent)

    with_session(body, heartbeat_s=0.02, heartbeat_limit_s=600)


@pytest.mark.parametrize(
    "payload",
    [
        b"\x80\x04\x95",
        b"\x00",
        Tokens(bytes(8), bytes(8), bytes(1)),
        Tokens(bytes(7), bytes(4), bytes(1)),
        Tokens(np.array([1], np.int64).tobytes(), bytes(4), bytes([200])),
    ],
)
def test_a_frame_that_is_none_fails_what_is_open_and_the_next_request_works(payload: Any) -> None:
    async def body(scheduler: ScriptedScheduler, session: Session) -> None:
        mailbox = Mailbox(True)
        only = flight(mailbox)
        session.submit([only])
        await arrived(scheduler, Admit)
        scheduler.send(payload)
        await mailbox.wait()
        assert isinstance(only.error, ProtocolError)
        await arrived(scheduler, Hello)
        await until(lambda: session.ready)
        again = flight(mailbox)
        session.submit([again])
        await arrived(scheduler, Admit)
        scheduler.send(tokens([(again.request_id, 5, LENGTH)]))
        await mailbox.wait()
        assert again.error is None

    with_session(body)


def test_an_open_sequence_holds_all_that_a_replay_needs() -> None:
    params = SamplingParams(max_tokens=9, seed=7)
    open_sequence = Flight(Mailbox(True), 0, pack_tokens([1, 2, 3]), params, 5, "salt")
    open_sequence.request_id = 4
    open_sequence.tokens.extend([8, 9])
    admit = open_sequence.admit()
    assert unpack_tokens(admit.output).tolist() == [8, 9]
    assert (admit.request_id, admit.prompt, admit.params, admit.priority, admit.cache_salt) == (
        4,
        pack_tokens([1, 2, 3]),
        params,
        5,
        "salt",
    )


def test_a_closed_session_says_so() -> None:
    async def main() -> None:
        with ScriptedScheduler() as scheduler:
            session = await opened(scheduler)
            await session.close()
            await session.close()
            with pytest.raises(UnavailableError, match="closed"):
                session.submit([flight()])
            with pytest.raises(UnavailableError):
                await session.stats(WAIT_S)

    run(main())
