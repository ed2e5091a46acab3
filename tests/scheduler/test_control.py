"""Lives of executors, as a scheduler hears of them: words out of order, ranks, draining, a scheduler that follows."""

from __future__ import annotations

from pathlib import Path

import msgspec

from ipc.config import RING_SLOTS
from ipc.control import Drain, Drained, ExecutorHello, ExecutorLost, ExecutorStuck, SchedulerReady
from ipc.ring import RingReader
from ipc.schema import PROTOCOL_VERSION, Draining, FinishReason, Hello, Rejected, Welcome, decode_scheduler, pack_tokens
from tests.scheduler.bench import Bench, Peer, admit, receive_rows


def test_requests_outlive_an_executor(bench: Bench) -> None:
    peer = bench.frontend_peer()
    bench.answering = False
    peer.send(admit(1, max_tokens=4))
    assert peer.stats().inflight == 2
    bench.launcher.send(ExecutorLost(1))
    stats = peer.stats()
    assert (stats.inflight, stats.running, stats.waiting) == (0, 0, 1)
    bench.plans = RingReader(bench.plan_ring)
    bench.answering = True
    bench.attach(epoch=2)
    assert peer.receive(Welcome).epoch == 2
    assert receive_rows(peer, 4)[-1] == (1, 5, FinishReason.LENGTH)


def test_a_late_hello_of_a_dead_executor_changes_nothing(bench: Bench) -> None:
    bench.replace_scheduler()
    bench.attach(epoch=2)
    peer = bench.frontend_peer()
    bench.launcher.send(ExecutorHello(PROTOCOL_VERSION, 1, 2, 17))
    assert peer.stats().epoch == 2
    peer.send(admit(1))
    assert receive_rows(peer, 3)[-1] == (1, 5, FinishReason.LENGTH)


def test_an_executor_that_says_hello_before_the_end_of_the_last_one_is_told_is_taken(bench: Bench) -> None:
    """Both ended at once: the next executor's word overtakes what the launcher said for, and then of, the last one."""
    bench.replace_scheduler()
    bench.launcher.send(ExecutorHello(PROTOCOL_VERSION, 3, 2, 9), ExecutorHello(PROTOCOL_VERSION, 2, 2, 17))
    assert bench.launcher.receive(SchedulerReady) == SchedulerReady(2, 64, 64)
    bench.launcher.send(ExecutorLost(2))
    assert bench.launcher.receive(SchedulerReady) == SchedulerReady(3, 32, 32)
    peer = bench.frontend_peer()
    peer.send(admit(1))
    assert receive_rows(peer, 3)[-1] == (1, 5, FinishReason.LENGTH)
    assert peer.stats().epoch == 3


def test_executors_that_came_and_died_while_the_scheduler_slept_are_not_believed_once_told(
    bench: Bench,
) -> None:
    """What they said may be read after what the launcher said of their ends, or after the word of the next one."""
    peer = bench.frontend_peer()
    hellos = [ExecutorHello(PROTOCOL_VERSION, epoch, 2, 17) for epoch in range(4)]
    bench.launcher.send(hellos[3], hellos[2], ExecutorLost(1), ExecutorLost(2), ExecutorLost(3), *hellos)
    bench.attach(epoch=4)
    peer.send(admit(1))
    assert receive_rows(peer, 3)[-1] == (1, 5, FinishReason.LENGTH)
    assert [message.epoch for message in peer.inbox if isinstance(message, Welcome)] == [2, 3, 4]


def test_a_new_scheduler_knows_which_executors_have_ended(bench: Bench) -> None:
    bench.replace_scheduler()
    peer = Peer(bench, bench.frontend, decode_scheduler)
    peer.send(Hello(PROTOCOL_VERSION, "frontend", "test", 3))
    assert not peer.receive(Welcome).ready
    bench.launcher.send(ExecutorHello(PROTOCOL_VERSION, 1, 2, 17))
    bench.attach(epoch=2)
    assert peer.receive(Welcome).epoch == 2


def test_plans_wait_until_every_rank_is_ready_and_none_is_a_lap_behind(tmp_path: Path) -> None:
    """The second rank has fewer blocks than the first, and does not give its plans back at first."""
    bench = Bench(tmp_path, ranks=2)
    second = RingReader(bench.plan_ring, 1)
    bench.launcher.send(ExecutorHello(PROTOCOL_VERSION, 1, 2, 17, 0), ExecutorHello(PROTOCOL_VERSION, 1, 3, 9, 2))
    early = Peer(bench, bench.frontend, decode_scheduler)
    early.send(Hello(PROTOCOL_VERSION, "frontend", "test", 3))
    assert not early.receive(Welcome).ready
    bench.launcher.send(ExecutorHello(PROTOCOL_VERSION, 1, 3, 9, 1))
    assert bench.launcher.receive(SchedulerReady).kv_tokens == 8 * bench.config.block_size
    assert early.receive(Welcome).num_blocks == 9
    assert early.stats().dropped_messages == 1, "the hello of a third rank"
    early.send(admit(1, max_tokens=RING_SLOTS + 2))
    receive_rows(early, RING_SLOTS)
    assert early.stats().steps == RING_SLOTS, "planned past a rank that lags"
    assert bench.loop._step_age_ns() > 0, "a rank that hangs must be noticed"
    for seq in range(1, RING_SLOTS + 1):
        second.ack(seq)
    receive_rows(early, 2)
    bench.close()


def test_a_stuck_executor_is_reported(bench: Bench) -> None:
    bench.answering = False
    peer = bench.frontend_peer()
    peer.send(admit(1))
    assert peer.stats().inflight > 0
    bench.loop.wire.quiet_since_ns -= 61 * 10**9
    bench.loop.next_check_ns = 0
    stuck = bench.launcher.receive(ExecutorStuck)
    assert stuck.epoch == 1
    assert stuck.age_s > 60


def test_draining_finishes_what_is_open(bench: Bench) -> None:
    bench.answering = False
    peer = bench.frontend_peer()
    peer.send(admit(1))
    assert peer.stats().running == 1
    bench.launcher.send(Drain())
    bench.answering = True
    assert receive_rows(peer, 3)[-1] == (1, 5, FinishReason.LENGTH)
    bench.launcher.receive(Drained)
    peer.send(admit(2))
    assert peer.receive(Rejected).code == "unavailable"


def test_a_new_scheduler_waits_for_the_plans_of_the_dead_one_and_drops_their_results(bench: Bench) -> None:
    peer = bench.frontend_peer()
    bench.answering = False
    peer.send(admit(1, max_tokens=4))
    assert peer.stats().inflight == 2
    bench.replace_scheduler()
    bench.attach(epoch=2)
    back = bench.frontend_peer()
    replay = msgspec.structs.replace(admit(1, max_tokens=4), output=pack_tokens([9]), replay=True)
    back.send(replay)
    stats = back.stats()
    assert (stats.waiting, stats.inflight, stats.epoch) == (1, 0, 2), "the executor still holds two plans"
    assert stats.step_age_ns > 0, "if it never gives them back it is stuck"
    bench.answering = True
    assert receive_rows(back, 3) == [(1, 5, FinishReason.RUNNING)] * 2 + [(1, 5, FinishReason.LENGTH)]
    assert bench.loop.wire.plans.acked == bench.loop.wire.plans.head == bench.loop.state.seq


def test_an_executor_that_died_with_the_scheduler_owes_nothing(bench: Bench) -> None:
    peer = bench.frontend_peer()
    bench.answering = False
    peer.send(admit(1, max_tokens=4))
    assert peer.stats().inflight == 2
    bench.replace_scheduler()
    bench.plans = RingReader(bench.plan_ring)
    bench.attach(epoch=2)
    back = bench.frontend_peer()
    bench.answering = True
    back.send(admit(1))
    assert receive_rows(back, 3)[-1] == (1, 5, FinishReason.LENGTH)


def test_a_new_scheduler_is_not_drained_before_frontends_could_come_back(bench: Bench) -> None:
    bench.replace_scheduler()
    bench.attach(epoch=2)
    bench.launcher.send(Drain())
    back = bench.frontend_peer()
    back.receive(Draining)
    back.send(msgspec.structs.replace(admit(1), replay=True))
    assert receive_rows(back, 3)[-1] == (1, 5, FinishReason.LENGTH)
    bench.turn()
    assert not any(isinstance(message, Drained) for message in bench.launcher.inbox)
    bench.loop.rejoined_ns = 0
    bench.launcher.receive(Drained)
