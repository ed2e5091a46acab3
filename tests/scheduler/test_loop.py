"""The loop and the peers at its sockets: those that misbehave, lag, die, or are not who they say."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from ipc.control import Drain, Drained, ExecutorHello, ExecutorLost, FrontendStuck
from ipc.ring import RingReader, RingWriter
from ipc.schema import (
    PROTOCOL_VERSION,
    Abort,
    Admit,
    Draining,
    FinishReason,
    GetInvariants,
    GetStats,
    Goodbye,
    Heartbeat,
    Hello,
    Invariants,
    ModelCard,
    Paused,
    Rejected,
    SamplingParams,
    Stats,
    Tokens,
    Welcome,
    decode_scheduler,
    encode,
    pack_tokens,
)
from scheduler import mail as mail_module
from scheduler import outbox as outbox_module
from tests.scheduler.bench import LIMIT_MS, Bench, Peer, admit, receive_rows, rows


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
    fall_silent(bench, silent)
    for _ in range(LIMIT_MS):
        if (stats := staying.stats()).frontends == 1:
            break
    assert (stats.running + stats.waiting, stats.frontends) == (1, 1)
    bench.answering = True
    assert receive_rows(staying, 3)[-1][2] == FinishReason.LENGTH


def test_a_slow_consumer_fails_alone(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox_module, "MAX_BACKLOG_ROWS", 20)
    slow, quick = bench.frontend_peer(), bench.frontend_peer()
    monkeypatch.setattr(bench.loop.mail, "send_to", _full_for(bench, slow.socket.getsockopt(zmq.IDENTITY)))
    slow.send(admit(1, max_tokens=40), admit(2, max_tokens=5))  # the second comes to its end unheard
    quick.send(admit(1, max_tokens=40))
    assert receive_rows(quick, 40)[-1][2] == FinishReason.LENGTH
    assert quick.stats().requests_finished["slow_consumer"] == 1
    monkeypatch.undo()
    assert sorted(receive_rows(slow, 2)) == [(i, -1, FinishReason.SLOW_CONSUMER) for i in (1, 2)]


def test_a_backlog_of_log_probabilities_is_bounded_in_bytes(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox_module, "MAX_BACKLOG_BYTES", 20 * 40)
    slow, quick = bench.frontend_peer(), bench.frontend_peer()
    monkeypatch.setattr(bench.loop.mail, "send_to", _full_for(bench, slow.socket.getsockopt(zmq.IDENTITY)))
    params = SamplingParams(max_tokens=40, temperature=0.0, logprobs=2)
    slow.send(Admit(1, pack_tokens([1, 2]), params))
    quick.send(Admit(1, pack_tokens([1, 2]), params))
    assert receive_rows(quick, 40)[-1][2] == FinishReason.LENGTH
    assert quick.stats().requests_finished["slow_consumer"] == 1


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


def test_a_frame_that_found_a_socket_full_is_not_put_together_at_every_turn(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    lagging, other = bench.frontend_peer(), bench.frontend_peer()
    monkeypatch.setattr(mail_module, "_REST", 10**9)
    tried: list[bytes] = []
    send, identity = bench.loop.mail.send_to, lagging.socket.getsockopt(zmq.IDENTITY)

    def full(to: bytes, message: Any) -> bool | None:
        if to != identity or not isinstance(message, Tokens):
            return send(to, message)
        tried.append(message.request_id)
        return False

    monkeypatch.setattr(bench.loop.mail, "send_to", full)
    lagging.send(admit(1, max_tokens=10))
    other.send(admit(1, max_tokens=30))
    receive_rows(other, 30)
    assert len(tried) == 1
    monkeypatch.undo()
    peer = bench.loop.mail.peers.find(identity)
    assert peer is not None
    peer.rests_until_ns = 0
    assert receive_rows(lagging, 10)[-1] == (1, 5, FinishReason.LENGTH)


def test_ends_that_nobody_reads_are_bounded(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox_module, "MAX_BACKLOG_ROWS", 20)
    flooding, other = bench.frontend_peer(), bench.frontend_peer()
    monkeypatch.setattr(bench.loop.mail, "send_to", _full_for(bench, flooding.socket.getsockopt(zmq.IDENTITY)))
    for i in range(30):
        flooding.send(admit(i, max_tokens=1))
    for _ in range(100):
        flooding.send(Heartbeat(1))  # it is not silent
        if other.stats().frontends == 1:
            break
    assert other.stats().frontends == 1


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
    fall_silent(bench, silent)
    assert bench.launcher.receive(FrontendStuck).pid == 3


def test_a_frontend_that_came_back_under_another_identity_is_not_reported_for_the_old_one(bench: Bench) -> None:
    old, new = bench.frontend_peer(), bench.frontend_peer()
    fall_silent(bench, old)
    while new.stats().frontends == 2:
        pass
    bench.launcher.send(Drain())
    bench.launcher.receive(Drained)
    assert not any(isinstance(message, FrontendStuck) for message in bench.launcher.inbox)


def test_a_scheduler_that_stood_still_takes_nobody_for_silent(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    peers = [bench.frontend_peer() for _ in range(8)]
    for peer in peers:
        peer.send(Heartbeat(1))  # which nobody has read when the clock jumps
    now = time.monotonic_ns() + 100 * 10**9
    monkeypatch.setattr("scheduler.loop.now_ns", lambda: now)
    bench.loop.keep_house()
    monkeypatch.undo()
    assert peers[0].stats().frontends == len(peers)


def fall_silent(bench: Bench, peer: Peer) -> None:
    found = bench.loop.mail.peers.find(peer.socket.getsockopt(zmq.IDENTITY))
    assert found is not None
    found.silent_beats = 10
    bench.loop.next_check_ns = 0


def leave(bench: Bench, peer: Peer) -> None:
    """As one that is killed: the scheduler hears of it when it sends."""
    identity = peer.socket.getsockopt(zmq.IDENTITY)
    peer.socket.close(0)
    for _ in range(LIMIT_MS):
        if bench.loop.mail.send_to(identity, Draining()) is None:
            return
        time.sleep(0.001)
    raise AssertionError("its connection stays")


def test_a_frontend_may_die_with_notices_and_rows_unsent(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    dying, living = bench.frontend_peer(), bench.frontend_peer()
    monkeypatch.setattr(bench.loop.mail, "send_to", _full_for_all(bench, dying.socket.getsockopt(zmq.IDENTITY)))
    dying.send(admit(1, max_tokens=1000), admit(2, max_tokens=1001), admit(3, max_tokens=10))
    while bench.loop.state.counters.generation_tokens < 5:
        bench.turn()
    found = bench.loop.mail.peers.find(dying.socket.getsockopt(zmq.IDENTITY))
    assert found is not None and len(found.notices) == 2 and found.outbox
    monkeypatch.undo()
    leave(bench, dying)
    assert living.stats().frontends == 1
    bench.loop.state.check()


def test_a_smaller_cache_ends_the_requests_of_a_frontend_that_is_gone_once(bench: Bench) -> None:
    bench.answering = False
    peer, living = bench.frontend_peer(), bench.frontend_peer()
    peer.send(admit(1, max_tokens=50), admit(2, max_tokens=50))
    living.send(admit(1, max_tokens=50))
    assert peer.stats().running + living.stats().running >= 2
    bench.launcher.send(ExecutorLost(1))
    living.receive(Paused)
    leave(bench, peer)
    bench.plans, bench.results, bench.answering = RingReader(bench.plan_ring), RingWriter(bench.result_ring), True
    bench.launcher.send(ExecutorHello(PROTOCOL_VERSION, 2, 2, 5))
    assert living.receive(Rejected).code == "context_length_exceeded"
    stats = living.stats()
    assert (stats.frontends, stats.requests_rejected, stats.running + stats.waiting) == (1, 2, 0)


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
