"""Several replicas as one engine: who gets what, and what becomes of open sequences when one goes. Real ROUTERs."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import msgspec
import pytest

from frontend.inflight import Flight, Mailbox
from frontend.replicas import Replicas
from ipc.errors import UnavailableError
from ipc.schema import (
    PROTOCOL_VERSION,
    Abort,
    Admit,
    Draining,
    Goodbye,
    Member,
    Members,
    Paused,
    Rejected,
    SamplingParams,
    Welcome,
    pack_tokens,
    unpack_tokens,
)
from tests.frontend.scripted_scheduler import (
    LENGTH,
    RUNNING,
    WAIT_S,
    ScriptedScheduler,
    arrived,
    card,
    run,
    stats,
    tokens,
    until,
)


def listed(*schedulers: ScriptedScheduler, first: int = 0) -> Members:
    members = [Member(first + i, each.endpoint) for i, each in enumerate(schedulers)]
    return Members(PROTOCOL_VERSION, members)


class Cluster:
    """A directory, played by a ScriptedScheduler that answers Members, two schedulers, and a client of them."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self.a = stack.enter_context(ScriptedScheduler())
        self.b = stack.enter_context(ScriptedScheduler())
        self.directory = stack.enter_context(ScriptedScheduler(welcome=listed(self.a, self.b)))
        self.client = Replicas(self.directory.endpoint, "test")
        self.mailbox = Mailbox(True)

    def flight(self, length: int = 2, first: int = 1) -> Flight:
        return Flight(self.mailbox, 0, pack_tokens([first] * length), SamplingParams(max_tokens=9), 0, "")

    def submit(self, count: int) -> tuple[list[Flight], list[Flight]]:
        """Sequences that landed on a and on b."""
        flights = [self.flight(first=i) for i in range(count)]
        self.client.submit(flights)
        return self.of(self.a, flights), self.of(self.b, flights)

    def of(self, scheduler: ScriptedScheduler, flights: list[Flight]) -> list[Flight]:
        return [each for each in flights if each.home is not None and each.home.endpoint == scheduler.endpoint]


@contextlib.asynccontextmanager
async def cluster() -> AsyncIterator[Cluster]:
    with contextlib.ExitStack() as stack:
        made = Cluster(stack)
        await made.client.open(WAIT_S, wait_ready=True)
        try:
            yield made
        finally:
            await made.client.close()


async def admitted(scheduler: ScriptedScheduler, count: int) -> list[Admit]:
    await until(lambda: scheduler.count(Admit) >= count)
    return [message for message in scheduler.seen if isinstance(message, Admit)]


def test_sequences_are_spread_and_answered_by_both() -> None:
    async def main() -> None:
        async with cluster() as made:
            assert sorted(made.client.sessions) == [0, 1]
            on_a, on_b = made.submit(20)
            assert abs(len(on_a) - len(on_b)) <= 2
            for scheduler, flights in ((made.a, on_a), (made.b, on_b)):
                assert len(await admitted(scheduler, len(flights))) == len(flights)
                scheduler.send(tokens([(each.request_id, 5, LENGTH) for each in flights]))
            await until(lambda: made.client.open_sequences == 0)
            assert not any(each.error for each in on_a + on_b)
            assert all(list(each.tokens) == [5] for each in on_a + on_b)

    run(main())


def test_a_replica_that_dies_has_its_sequences_continued_by_the_other() -> None:
    async def main() -> None:
        async with cluster() as made:
            on_a, on_b = made.submit(10)
            await admitted(made.a, len(on_a))
            made.a.send(tokens([(each.request_id, 7, RUNNING) for each in on_a]))
            await until(lambda: all(len(each.tokens) == 1 for each in on_a))
            made.a.hang_up()
            replays = (await admitted(made.b, 10))[len(on_b) :]
            assert all(admit.replay and unpack_tokens(admit.output).tolist() == [7] for admit in replays)
            assert [admit.request_id for admit in replays] == [each.request_id for each in on_a]
            made.b.send(tokens([(each.request_id, 8, LENGTH) for each in on_a + on_b]))
            await until(lambda: made.client.open_sequences == 0)
            assert all(list(each.tokens) == [7, 8] and each.error is None for each in on_a)
            # Meanwhile the other takes everything, and the dead one its share once it is back.
            made.client.submit([made.flight() for _ in range(4)])
            await admitted(made.b, 14)
            with ScriptedScheduler(directory=made.a.directory) as again:
                await until(
                    lambda: (
                        len(made.client.sessions) == 2
                        and all(session.ready for session in made.client.sessions.values())
                    )
                )
                made.submit(10)
                await admitted(again, 4)

    run(main())


def test_with_nobody_left_sequences_wait_for_whoever_comes_back_first() -> None:
    async def main() -> None:
        async with cluster() as made:
            on_a, on_b = made.submit(6)
            made.a.hang_up()
            await until(lambda: not made.client.sessions[0].connected)
            made.b.hang_up()
            await until(lambda: not made.client.connected)
            with pytest.raises(UnavailableError):
                made.client.submit([made.flight()])
            assert made.client.open_sequences == 6
            with ScriptedScheduler(directory=made.b.directory) as again:
                replays = await admitted(again, 6)
                assert len({admit.request_id for admit in replays}) == 6
                again.send(tokens([(admit.request_id, 8, LENGTH) for admit in replays]))
                await until(lambda: made.client.open_sequences == 0)
                assert all(list(each.tokens) == [8] and each.error is None for each in on_a + on_b)

    run(main())


def test_one_that_joins_is_used_and_one_that_leaves_is_emptied_and_forgotten() -> None:
    async def main() -> None:
        async with cluster() as made:
            with ScriptedScheduler() as c:
                on_a, _ = made.submit(9)
                await admitted(made.a, len(on_a))
                changed = Members(PROTOCOL_VERSION, [Member(1, made.b.endpoint), Member(2, c.endpoint)])
                made.directory.send(changed)
                assert set((await arrived(made.a, Abort)).request_ids) <= set(range(1, 10))
                await arrived(made.a, Goodbye)
                assert sorted(made.client.sessions) == [1, 2]
                await until(lambda: all(session.ready for session in made.client.sessions.values()))
                made.submit(9)
                await admitted(c, 1)
                assert made.client.open_sequences == 18
                assert not any(each.error for each in on_a)

    run(main())


def test_the_last_one_keeps_its_sequences_although_it_leaves() -> None:
    async def main() -> None:
        async with cluster() as made:
            on_a, on_b = made.submit(4)
            await admitted(made.a, len(on_a))
            await admitted(made.b, len(on_b))
            made.directory.send(Members(PROTOCOL_VERSION, []))
            await until(lambda: not made.client.sessions)
            made.a.send(tokens([(each.request_id, 5, LENGTH) for each in on_a]))
            await arrived(made.a, Goodbye)
            assert all(list(each.tokens) == [5] for each in on_a)
            assert made.client.open_sequences == len(on_b)

    run(main())


def test_draining_and_pausing_replicas_get_nothing_new_and_keep_what_they_have() -> None:
    async def main() -> None:
        async with cluster() as made:
            for message in (Draining(), Paused()):
                on_a, _ = made.submit(4)
                before = len(await admitted(made.a, len(on_a)))
                made.a.send(message)
                await until(lambda: not made.client.sessions[0].takes_requests)
                assert made.submit(10)[0] == []
                assert len(made.of(made.a, on_a)) == len(on_a)
                made.a.send(Welcome(PROTOCOL_VERSION, True, made.a.card, 2, 100, 16))
                if isinstance(message, Draining):
                    assert not made.client.draining
                    made.client.sessions[0].draining = False
                await until(lambda: made.client.sessions[0].takes_requests)
                assert made.a.count(Admit) == before

    run(main())


def test_a_request_that_a_draining_replica_refuses_goes_elsewhere() -> None:
    async def main() -> None:
        async with cluster() as made:
            on_a, _ = made.submit(4)
            await admitted(made.a, len(on_a))
            made.a.send(Draining(), Rejected(on_a[0].request_id, "unavailable", "shutting down"))
            await until(lambda: made.of(made.b, on_a[:1]))
            assert on_a[0].error is None
            made.b.send(tokens([(on_a[0].request_id, 5, LENGTH)]))
            await until(lambda: on_a[0].finish == LENGTH)

    run(main())


def test_an_aborted_sequence_is_aborted_where_it_is_now() -> None:
    async def main() -> None:
        async with cluster() as made:
            on_a, on_b = made.submit(6)
            made.a.hang_up()
            await admitted(made.b, 6)
            made.client.abort(on_a)
            assert (await arrived(made.b, Abort)).request_ids == [each.request_id for each in on_a]
            assert made.client.open_sequences == len(on_b)

    run(main())


def test_a_replica_of_another_model_is_not_used() -> None:
    async def main() -> None:
        async with cluster() as made:
            with ScriptedScheduler(model_card=card(vocab_size=7)) as other:
                made.directory.send(listed(made.a, made.b, other))
                await until(lambda: 2 in made.client.sessions and made.client.sessions[2].ready)
                made.submit(20)
                await asyncio.sleep(0)
                assert other.count(Admit) == 0
                assert made.client.welcome is not None
                assert made.client.welcome.card.vocab_size == card().vocab_size

    run(main())


def test_loads_that_replicas_report_decide() -> None:
    async def main() -> None:
        async with cluster() as made:
            made.a.stats, made.b.stats = stats(running=50), stats(running=1)
            await made.client.stats(WAIT_S)
            on_a, on_b = made.submit(20)
            assert (len(on_a), len(on_b)) == (0, 20)
            frame = tokens([(on_b[0].request_id, 5, RUNNING)])
            await admitted(made.b, 20)
            made.b.send(msgspec.structs.replace(frame, running=90, waiting=1))
            await until(lambda: len(on_b[0].tokens) == 1)
            assert len(made.submit(20)[0]) == 20

    run(main())


def test_statistics_add_up() -> None:
    async def main() -> None:
        async with cluster() as made:
            made.a.stats = stats(running=3, requests_finished={"stop": 1}, longest_step_ns=7, epoch=2)
            made.b.stats = stats(running=4, requests_finished={"stop": 2, "length": 1}, longest_step_ns=5)
            total = await made.client.stats(WAIT_S)
            assert (total.running, total.longest_step_ns, total.epoch) == (7, 7, 2)
            assert total.requests_finished == {"stop": 3, "length": 1}
            assert {number: each.running for number, each in made.client.last_stats.items()} == {0: 3, 1: 4}
            made.a.answers = False
            assert (await made.client.stats(0.5)).running == 4

    run(main())
