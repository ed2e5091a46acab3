"""Results that no executor could make of its plans: it is accused and replaced; scheduler and requests go on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import msgspec
import numpy as np
import pytest

from ipc.config import RING_SLOTS
from ipc.control import ExecutorFaulty, ExecutorHello
from ipc.frames import Bytes
from ipc.results import RESULT_HEADER_BYTES, ResultWord
from ipc.ring import RingWriter
from ipc.schema import PROTOCOL_VERSION, FinishReason
from tests.scheduler.bench import Bench, admit, receive_rows
from tests.scheduler.pipeline import tiny_config
from tests.scheduler.simulated_gpu import VOCAB

Damage = Callable[[RingWriter, int, Bytes], None]
LAYOUT = tiny_config().result_layout


def word(name: ResultWord, value: int, ring: RingWriter, seq: int, result: Bytes) -> None:
    result[:RESULT_HEADER_BYTES].view(np.int64)[name] = value


def first_of(column: int, value: int, ring: RingWriter, seq: int, result: Bytes) -> None:
    result[column : column + 4].view(np.int32)[0] = value


def torn(ring: RingWriter, seq: int, result: Bytes) -> None:
    ring.begin(seq)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (torn, "slot 1 holds frame -1, expected 1"),
        (partial(word, ResultWord.NUM_ROWS, -1), "result of -1 rows and scores, the ring was made for 36"),
        (partial(word, ResultWord.NUM_ROWS, 1 << 40), f"result of {1 << 40} rows and scores, the ring was made for 36"),
        (partial(word, ResultWord.NUM_ROWS, 2), "result of 2 rows and scores, plan 1 has 1"),
        (partial(word, ResultWord.SEQ, 7), "result of plan 7 arrived, expected that of 1"),
        (partial(word, ResultWord.EPOCH, 5), "result of epoch 5, expected 1 or an earlier one"),
        (partial(word, ResultWord.EPOCH, -1), "result of epoch -1, expected 1 or an earlier one"),
        (partial(word, ResultWord.HAS_LOGPROBS, 0), "result without log-probabilities, plan 1 asks for them"),
        (partial(first_of, LAYOUT.token, VOCAB), f"token from {VOCAB} to {VOCAB}, the vocabulary has {VOCAB}"),
        (partial(first_of, LAYOUT.token, -2), f"token from -2 to -2, the vocabulary has {VOCAB}"),
        (partial(first_of, LAYOUT.top_token, VOCAB), f"top_token from 0 to {VOCAB}, the vocabulary has {VOCAB}"),
    ],
)
def test_a_result_that_cannot_be_costs_the_executor_its_place(bench: Bench, damage: Damage, reason: str) -> None:
    peer = bench.frontend_peer()
    bench.damage = damage
    asked = admit(1, max_tokens=5)
    peer.send(msgspec.structs.replace(asked, params=msgspec.structs.replace(asked.params, logprobs=1)))
    assert bench.launcher.receive(ExecutorFaulty) == ExecutorFaulty(1, reason)
    stats = peer.stats()
    assert (stats.running, stats.waiting, stats.inflight) == (0, 1, 0)
    bench.replace_executor(epoch=2)
    running, length = int(FinishReason.RUNNING), int(FinishReason.LENGTH)
    assert receive_rows(peer, 5) == [(1, 5, running)] * 4 + [(1, 5, length)]
    bench.loop.state.check()


def test_it_is_accused_again_until_it_is_replaced(bench: Bench) -> None:
    """The first word may be lost; a launcher that never hears of it would leave every stream waiting."""
    peer = bench.frontend_peer()
    bench.damage = torn
    peer.send(admit(1))
    for _ in range(2):
        assert bench.launcher.receive(ExecutorFaulty).epoch == 1
        bench.loop.next_check_ns = 0
    bench.launcher.send(ExecutorHello(PROTOCOL_VERSION, 2, 2, 17))  # overtakes the word that the first one has ended
    assert bench.launcher.receive(ExecutorFaulty).epoch == 1
    assert peer.stats().waiting == 1, "what is accused is believed no more"
    bench.replace_executor(epoch=2)
    receive_rows(peer, 3)
    bench.launcher.inbox.clear()
    bench.loop.next_check_ns = 0
    peer.stats()
    assert not any(isinstance(message, ExecutorFaulty) for message in bench.launcher.inbox)


def test_an_executor_that_keeps_the_plans_it_has_run_is_stuck(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    peer = bench.frontend_peer()
    monkeypatch.setattr(bench.plans, "ack", lambda seq: None)
    peer.send(admit(1, max_tokens=RING_SLOTS + 4))
    receive_rows(peer, RING_SLOTS)
    assert peer.stats().step_age_ns > 0
    bench.replace_executor(epoch=2)
    assert receive_rows(peer, 4)[-1] == (1, 5, FinishReason.LENGTH)
    assert bench.loop.wire.plans.head == bench.loop.state.seq


def test_a_request_whose_results_are_broken_twice_fails_alone(bench: Bench) -> None:
    peer = bench.frontend_peer()
    bench.damage = torn
    peer.send(admit(1, max_tokens=5))
    bench.launcher.receive(ExecutorFaulty)
    peer.send(admit(2, max_tokens=5))
    bench.damage = torn  # once more, as soon as the suspect runs alone
    bench.replace_executor(epoch=2)
    bench.launcher.receive(ExecutorFaulty)
    bench.replace_executor(epoch=3)
    found = receive_rows(peer, 6)
    assert [row for row in found if row[0] == 1] == [(1, -1, FinishReason.CRASHED)]
    assert [row[1] for row in found if row[0] == 2] == [5] * 5
