"""The loop with real sockets and rings, turned by hand: peers that misbehave, lag, die, or are not who they say."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from ipc.config import RING_SLOTS, SchedulerChannels
from ipc.doorbell import Doorbell
from ipc.frames import Bytes, PlanFlag, read_plan
from ipc.results import write_result_header
from ipc.ring import RingReader, RingWriter, create_ring
from ipc.schema import (
    PROTOCOL_VERSION,
    Abort,
    Admit,
    Drain,
    Drained,
    Draining,
    ExecutorHello,
    ExecutorLost,
    ExecutorStuck,
    FinishReason,
    FrontendStuck,
    GetInvariants,
    GetStats,
    Goodbye,
    Heartbeat,
    Hello,
    Invariants,
    Message,
    ModelCard,
    Paused,
    Rejected,
    SamplingParams,
    SchedulerReady,
    Stats,
    Tokens,
    Welcome,
    decode_launcher,
    decode_scheduler,
    encode,
    pack_tokens,
)
from ipc.sockets import connect_dealer, new_identity
from scheduler import mail as mail_module
from scheduler.loop import Loop
from tests.scheduler.pipeline import tiny_config

LIMIT_MS = 20_000


class Peer:
    """One end of a real DEALER; `turn` lets the loop work until something arrives."""

    def __init__(self, bench: Bench, endpoint: str, decode: Any, identity: bytes | None = None) -> None:
        self.bench, self.decode = bench, decode
        self.inbox: list[Any] = []
        self.socket = connect_dealer(bench.context, endpoint, identity or new_identity())

    def send(self, *messages: Message | bytes) -> None:
        for message in messages:
            self.socket.send(message if isinstance(message, bytes) else encode(message))

    def receive(self, kind: type[Any]) -> Any:
        """The next message of this type; those of other types stay for later."""
        for _ in range(LIMIT_MS):
            for i, message in enumerate(self.inbox):
                if isinstance(message, kind):
                    return self.inbox.pop(i)
            self.bench.turn()
            if self.socket.poll(1):
                self.inbox.append(self.decode(self.socket.recv()))
        raise AssertionError(f"no {kind.__name__} arrived, but {self.inbox}")

    def stats(self) -> Stats:
        """What the scheduler counts once it has planned for everything sent before."""
        for _ in range(2):
            self.send(GetStats())
            stats: Stats = self.receive(Stats)
        return stats


class Bench:
    """A Loop, and in place of the executor one that answers each plan with token 5."""

    def __init__(self, folder: Path, **changes: object) -> None:
        self.config = tiny_config(**changes)
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self.plan_ring = plan_ring = create_ring(RING_SLOTS, self.config.limits.plan_bytes, self.config.ranks)
        self.result_ring = result_ring = create_ring(RING_SLOTS, self.config.result_layout.nbytes)
        self.frontend, self.control = (f"ipc://{folder}/{name}" for name in ("frontend", "control"))
        channels = SchedulerChannels(
            plan_ring=plan_ring,
            plan_bells=tuple(Doorbell.create().fd for _ in range(self.config.ranks)),
            result_ring=result_ring,
            result_bell=Doorbell.create().fd,
            frontend=self.frontend,
            control=self.control,
            parent_pipe=-1,
            epoch=1,
        )
        self.channels = channels
        self.loop = Loop(self.config, channels)
        self.plans, self.results = RingReader(plan_ring), RingWriter(result_ring)
        self.answering = True
        self.times: dict[str, int] = {}  # of every result's header
        self.damage: Callable[[RingWriter, int, Bytes], None] | None = None  # done once, to a result about to be shown
        self.greet()

    def greet(self) -> None:
        self.launcher = Peer(self, self.control, decode_launcher)
        self.launcher.send(Hello(PROTOCOL_VERSION, "launcher", "launcher", 1))

    def replace_scheduler(self) -> None:
        """The scheduler dies between two steps, and the launcher starts another one on the same rings."""
        self.close()
        epoch = self.loop.state.epoch + 1
        self.loop = Loop(self.config, msgspec.structs.replace(self.channels, life=self.channels.life + 1, epoch=epoch))
        self.greet()

    def attach(self, epoch: int = 1) -> None:
        self.launcher.send(ExecutorHello(PROTOCOL_VERSION, epoch, 2, 17))
        while self.launcher.receive(SchedulerReady).epoch != epoch:
            pass  # a new launcher is told of the last one first

    def replace_executor(self, epoch: int) -> None:
        """The launcher has ended it and started another one on the same rings."""
        self.plans, self.results = RingReader(self.plan_ring), RingWriter(self.result_ring)
        self.launcher.send(ExecutorLost(epoch - 1))
        self.attach(epoch)

    def frontend_peer(self) -> Peer:
        peer = Peer(self, self.frontend, decode_scheduler)
        peer.send(Hello(PROTOCOL_VERSION, "frontend", "test", 3))
        assert peer.receive(Welcome).ready
        return peer

    def turn(self) -> None:
        """One round of the loop, with the executor's answers in between."""
        loop = self.loop
        loop.take_results()
        loop.exchange_masks()
        loop.plan_ahead()
        loop.deliver()
        loop.take_messages()
        loop.exchange_masks()
        loop.plan_ahead()
        loop.keep_house()
        while self.answering and (payload := self.plans.poll()) is not None:
            plan = read_plan(payload)
            self.plans.advance()
            seq = self.results.head + 1
            result = self.results.begin(seq)
            result[:] = 0
            layout = self.config.result_layout
            rows, has_logprobs = plan.num_rows + len(plan.score_token), bool(plan.flags & PlanFlag.LOGPROBS)
            result[layout.token : layout.token + 4 * rows].view("i4")[:] = 5
            numbers = {"seq": plan.seq, "epoch": plan.epoch, "num_rows": rows, **self.times}
            write_result_header(result, **numbers, has_logprobs=has_logprobs)
            self.plans.ack(plan.seq)
            self.results.publish(seq)
            if self.damage is not None:
                self.damage(self.results, seq, result)
                self.damage = None

    def close(self) -> None:
        self.loop.mail.socket.close()
        self.loop.control.socket.close()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    made.attach()
    yield made
    made.close()


def admit(request_id: int, max_tokens: int = 3) -> Admit:
    return Admit(request_id, pack_tokens([1, 2]), SamplingParams(max_tokens=max_tokens, temperature=0.0))


def rows(frames: list[Tokens]) -> list[tuple[int, int, int]]:
    import numpy as np

    def column(name: str, dtype: str) -> list[int]:
        return [int(x) for f in frames for x in np.frombuffer(getattr(f, name), dtype)]

    return list(zip(column("request_id", "i8"), column("token", "i4"), column("finish", "u1"), strict=True))


def receive_rows(peer: Peer, count: int) -> list[tuple[int, int, int]]:
    frames: list[Tokens] = []
    while len(rows(frames)) < count:
        frames.append(peer.receive(Tokens))
    return rows(frames)


def test_bubbles_count_only_while_there_was_work_and_the_longest_begins_anew(bench: Bench) -> None:
    peer = bench.frontend_peer()
    bench.times = {"gap_ns": 50_000, "device_ns": 7_000, "compilations": 1}
    peer.send(admit(1))
    receive_rows(peer, 3)
    peer.send(GetStats(restart_longest=True))
    stats = peer.receive(Stats)
    # The engine was idle before the first of the three steps: that gap is no bubble.
    assert (stats.steps, stats.bubbles, stats.bubble_ns) == (3, 2, 100_000)
    assert (stats.longest_bubble_ns, stats.longest_step_ns, stats.compilations) == (50_000, 7_000, 3)
    bench.times = {"gap_ns": 3_000, "device_ns": 5_000}
    peer.send(admit(2))
    receive_rows(peer, 3)
    stats = peer.stats()
    assert (stats.longest_bubble_ns, stats.longest_step_ns, stats.compilations) == (3_000, 5_000, 3)
    assert (stats.bubbles, stats.bubble_ns) == (2, 106_000), "a short gap adds time, but is no bubble"


def test_tokens_reach_the_one_who_asked(bench: Bench) -> None:
    one, two = bench.frontend_peer(), bench.frontend_peer()
    one.send(admit(7))
    two.send(admit(7, max_tokens=2))
    assert receive_rows(one, 3) == [(7, 5, FinishReason.RUNNING)] * 2 + [(7, 5, FinishReason.LENGTH)]
    assert receive_rows(two, 2) == [(7, 5, FinishReason.RUNNING), (7, 5, FinishReason.LENGTH)]


def test_no_one_aborts_another_ones_request(bench: Bench) -> None:
    bench.answering = False
    victim, other = bench.frontend_peer(), bench.frontend_peer()
    victim.send(admit(7))
    other.send(Abort([7]))
    assert (victim.stats().running, other.stats().running) == (1, 1)
    bench.answering = True
    assert receive_rows(victim, 3)[-1] == (7, 5, FinishReason.LENGTH)


def test_an_abort_is_answered_once_and_frees_everything(bench: Bench) -> None:
    bench.answering = False
    peer = bench.frontend_peer()
    peer.send(admit(7), Abort([7]), Abort([7, 8]))
    assert receive_rows(peer, 1) == [(7, -1, FinishReason.ABORTED)]
    stats = peer.stats()
    assert (stats.running, stats.waiting, stats.blocks_free) == (0, 0, stats.blocks_total)
    assert stats.requests_finished["aborted"] == 1


def test_garbage_is_counted_and_the_next_request_is_served(bench: Bench) -> None:
    peer = bench.frontend_peer()
    peer.send(b"", b"\x80\x04\x95pickle", b"\xc1" * 10_000, encode(Drained()))
    peer.socket.send_multipart([b"two", b"parts"])
    peer.send(admit(1))
    assert receive_rows(peer, 3)[-1][2] == FinishReason.LENGTH
    assert peer.stats().dropped_messages == 5


def test_a_request_at_fault_is_refused_with_its_reason(bench: Bench) -> None:
    peer = bench.frontend_peer()
    peer.send(admit(1, max_tokens=100))
    refused = peer.receive(Rejected)
    assert (refused.request_id, refused.code, refused.param) == (1, "context_length_exceeded", "max_tokens")
    assert "64 tokens; you requested 102" in refused.message


def test_another_version_and_a_stranger_are_told_so(bench: Bench) -> None:
    old = Peer(bench, bench.frontend, decode_scheduler)
    old.send(Hello(PROTOCOL_VERSION + 1, "frontend", "old", 1))
    refused = old.receive(Rejected)
    assert (refused.request_id, refused.code) == (-1, "protocol_error")
    old.send(admit(1))
    assert old.receive(Rejected).code == "unavailable"


def test_a_frontend_that_leaves_or_falls_silent_takes_its_requests_along(bench: Bench) -> None:
    bench.answering = False
    leaving, silent, staying = (bench.frontend_peer() for _ in range(3))
    for peer in (leaving, silent, staying):
        peer.send(admit(1))
        assert peer.stats().dropped_messages == 0  # what it sent before has arrived
    assert sum((staying.stats().running, staying.stats().waiting)) == 3
    leaving.send(Goodbye())
    bench.loop.mail.peers.find(silent.socket.getsockopt(zmq.IDENTITY)).last_heard_ns -= 11 * 10**9  # type: ignore
    bench.loop.next_check_ns = 0
    for _ in range(LIMIT_MS):
        if (stats := staying.stats()).frontends == 1:
            break
    assert (stats.running + stats.waiting, stats.frontends) == (1, 1)
    bench.answering = True
    assert receive_rows(staying, 3)[-1][2] == FinishReason.LENGTH


def test_a_slow_consumer_fails_alone(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mail_module, "MAX_BACKLOG_ROWS", 20)
    slow, quick = bench.frontend_peer(), bench.frontend_peer()
    monkeypatch.setattr(bench.loop.mail, "send_to", _full_for(bench, slow.socket.getsockopt(zmq.IDENTITY)))
    slow.send(admit(1, max_tokens=40))
    quick.send(admit(1, max_tokens=40))
    assert receive_rows(quick, 40)[-1][2] == FinishReason.LENGTH
    assert quick.stats().requests_finished["slow_consumer"] == 1
    monkeypatch.undo()
    assert receive_rows(slow, 1) == [(1, -1, FinishReason.SLOW_CONSUMER)]


def _full_for(bench: Bench, identity: bytes) -> Any:
    send = bench.loop.mail.send_to
    return lambda to, message: False if to == identity and isinstance(message, Tokens) else send(to, message)


def test_a_lagging_frontend_gets_its_rows_in_one_frame(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    lagging, other = bench.frontend_peer(), bench.frontend_peer()
    monkeypatch.setattr(bench.loop.mail, "send_to", _full_for(bench, lagging.socket.getsockopt(zmq.IDENTITY)))
    lagging.send(admit(1, max_tokens=10))
    other.send(admit(1, max_tokens=30))
    receive_rows(other, 30)
    monkeypatch.undo()
    frame = lagging.receive(Tokens)
    assert rows([frame]) == [(1, 5, FinishReason.RUNNING)] * 9 + [(1, 5, FinishReason.LENGTH)]
    assert len(frame.started_id) == 8


def _full_for_all(bench: Bench, full: bytes) -> Any:
    send = bench.loop.mail.send_to
    return lambda to, message: False if to == full else send(to, message)


def test_a_frontend_that_lags_misses_no_notice(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal that is lost would be a request that waits for ever."""
    lagging, other = bench.frontend_peer(), bench.frontend_peer()
    monkeypatch.setattr(bench.loop.mail, "send_to", _full_for_all(bench, lagging.socket.getsockopt(zmq.IDENTITY)))
    lagging.send(admit(1, max_tokens=100), admit(2))
    bench.replace_executor(epoch=2)
    other.send(admit(1))
    receive_rows(other, 3)
    monkeypatch.undo()
    assert lagging.receive(Rejected).request_id == 1
    assert receive_rows(lagging, 3)[-1] == (2, 5, FinishReason.LENGTH)
    lagging.receive(Paused)
    assert lagging.receive(Welcome).epoch == 2
    assert other.stats().dropped_messages == 0


def test_a_frontend_that_sends_and_does_not_read_is_bounded(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mail_module, "MAX_NOTICES", 5)
    flooding, other = bench.frontend_peer(), bench.frontend_peer()
    monkeypatch.setattr(bench.loop.mail, "send_to", _full_for_all(bench, flooding.socket.getsockopt(zmq.IDENTITY)))
    flooding.send(*(admit(i, max_tokens=100) for i in range(6)))
    for _ in range(LIMIT_MS):
        if other.stats().frontends == 1:
            break
    assert other.stats().frontends == 1
    monkeypatch.undo()
    flooding.send(Heartbeat(1))
    refused = flooding.receive(Rejected)
    assert (refused.request_id, refused.code) == (-1, "unavailable"), "so it connects anew, with what is open"


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


def test_a_dead_frontend_gives_its_blocks_back_within_two_steps(bench: Bench) -> None:
    dead, other = bench.frontend_peer(), bench.frontend_peer()
    dead.send(admit(1, max_tokens=60))
    other.send(admit(1, max_tokens=60))
    while len(bench.loop.state.slots.running) < 2:
        bench.turn()
    identity = dead.socket.getsockopt(zmq.IDENTITY)
    dead.socket.close(0)
    while bench.loop.mail.send_to(identity, Draining()) is not None:  # ZMQ's own thread takes note of it
        time.sleep(0.001)
    steps = bench.loop.state.counters.steps
    while len(bench.loop.state.slots.running) == 2:
        bench.turn()
    assert bench.loop.state.counters.steps - steps <= 2
    assert len(bench.loop.mail.peers) == 1


def test_a_silent_frontend_is_reported_to_the_launcher(bench: Bench) -> None:
    silent = bench.frontend_peer()
    bench.loop.mail.peers.find(silent.socket.getsockopt(zmq.IDENTITY)).last_heard_ns -= 11 * 10**9  # type: ignore
    bench.loop.next_check_ns = 0
    assert bench.launcher.receive(FrontendStuck).pid == 3


def test_invariants_are_told_only_with_debug_endpoints(tmp_path: Path) -> None:
    bench = Bench(tmp_path, debug_endpoints=True)
    bench.attach()
    bench.answering = False
    peer = bench.frontend_peer()
    peer.send(admit(1))
    peer.stats()
    peer.send(GetInvariants())
    found = peer.receive(Invariants)
    assert found.violations == []
    assert (found.requests, found.running, found.plans_in_flight) == (1, 1, 2)
    assert found.plan_published - found.plan_acked == 2
    assert found.blocks_free + found.blocks_owned == found.blocks_total == 16
    bench.loop.state.pool.num_free -= 1
    peer.send(GetInvariants())
    assert len(peer.receive(Invariants).violations) == 2
    bench.close()


def test_grammars_hold_back_their_own_rows_only_and_end_them_when_they_cannot_go_on(tmp_path: Path) -> None:
    llguidance = pytest.importorskip("llguidance")
    demo = Path(__file__).resolve().parents[2] / "models" / "demo"
    bench = Bench(tmp_path, card=ModelCard("demo", str(demo), 64, 2048, (0, 2), 4))
    bench.attach()
    peer = bench.frontend_peer()

    def with_grammar(request_id: int, lark: str) -> Admit:
        grammar = llguidance.LLMatcher.grammar_from_lark(lark)
        return msgspec.structs.replace(admit(request_id, 9), grammar=grammar)

    peer.send(with_grammar(1, "start: undefined"), with_grammar(2, "start: <[5]> <[5]> <[7]>"), admit(3, 20))
    rejected = peer.receive(Rejected)
    assert (rejected.request_id, rejected.code) == (1, "invalid_grammar")
    found = receive_rows(peer, 24)
    assert [row for row in found if row[0] == 3] == [(3, 5, 0)] * 19 + [(3, 5, int(FinishReason.LENGTH))]
    # The executor answers 5 to everything, and so breaks the grammar with the third token.
    assert [row for row in found if row[0] == 2] == [(2, 5, 0)] * 3 + [(2, -1, int(FinishReason.INVALID_GRAMMAR))]
    stats = peer.stats()
    assert (stats.running, stats.waiting, stats.requests_rejected) == (0, 0, 1)
    assert stats.requests_finished["invalid_grammar"] == 1
    bench.close()


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
