"""A rank's end of the plan ring: each plan that it takes wakes the ranks that it has to wake."""

from __future__ import annotations

import select

import numpy as np
import pytest

from executor.warmup import synthetic_plan
from executor.wire import Wire
from ipc.config import ExecutorChannels
from ipc.doorbell import Doorbell
from ipc.frames import FrameLimits, PlanFlag, write_plan
from ipc.ring import RingWriter, create_ring

LIMITS = FrameLimits(4, 16, 64, 16, 0)


def make_wire(ring: int, bells: list[Doorbell], place: int = 0) -> Wire:
    """A rank of epoch 2, which wakes two others by the bells after its own."""
    channels = ExecutorChannels(
        epoch=2,
        rank=place,
        place=place,
        plan_ring=ring,
        plan_bell=bells[place].fd,
        next_bells=tuple(bell.fd for bell in bells[2 * place + 1 : 2 * place + 3]),
        result_ring=create_ring(4, 256),
        result_bell=Doorbell.create().fd,
        control="ipc:///nowhere",
        parent_pipe=-1,
    )
    return Wire(channels)


def publish_plan(writer: RingWriter, seq: int, epoch: int) -> None:
    plan = synthetic_plan([1], 1, PlanFlag.NONE)
    plan.seq, plan.epoch = seq, epoch
    write_plan(writer.begin(seq), plan)
    writer.publish(seq)


def test_a_plan_that_is_taken_wakes_the_next_ranks() -> None:
    ring = create_ring(2, LIMITS.plan_bytes, 3)
    bells = [Doorbell.create() for _ in range(3)]
    writer = RingWriter(ring)
    wires = [make_wire(ring, bells, place) for place in range(3)]
    for epoch in (1, 2):  # that of a life before is given back unread
        publish_plan(writer, epoch, epoch)
    bells[0].ring()
    assert not select.select(bells[1:], [], [], 0)[0]
    for wire in wires:
        payload = wire.next_plan()
        assert payload is not None and np.array_equal(payload[:16].view(np.int64), [2, 2])
        assert wire.plans.head == 2
        if wire is wires[0]:
            assert select.select(bells[1:], [], [], 0)[0] == bells[1:]


def test_only_a_rank_without_a_step_under_way_sleeps_until_its_bell_rings(monkeypatch: pytest.MonkeyPatch) -> None:
    ring, bell = create_ring(4, LIMITS.plan_bytes), Doorbell.create()
    writer, wire = RingWriter(ring), make_wire(ring, [bell])
    rests: list[str] = []

    def rest(how: str, seq: int) -> None:
        rests.append(how)
        publish_plan(writer, seq, 2)

    monkeypatch.setattr(wire._plan_bell, "wait", lambda *_: rest("asleep", writer.head + 1))
    monkeypatch.setattr("executor.wire.time.sleep", lambda _: rest("a nap", writer.head + 1))
    for seq, published, how in ((1, 0, "asleep"), (2, 0, "a nap"), (3, 1, "a nap"), (4, 3, "asleep")):
        while wire._published < published:
            wire.publish(wire._published + 1, wire._published + 1)
        assert wire.next_plan() is not None
        assert wire.waited
        assert rests[seq - 1 :] == [how]
        assert wire.begin_result()[0] == seq
