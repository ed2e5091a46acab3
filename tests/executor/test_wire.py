"""A rank's end of the plan ring: each plan that it takes wakes the ranks that it has to wake."""

from __future__ import annotations

import select

import numpy as np

from executor.warmup import synthetic_plan
from executor.wire import Wire
from ipc.config import ExecutorChannels
from ipc.doorbell import Doorbell
from ipc.frames import FrameLimits, PlanFlag, write_plan
from ipc.ring import RingWriter, create_ring

LIMITS = FrameLimits(4, 16, 64, 16, 0)


def test_a_plan_that_is_taken_wakes_the_next_ranks() -> None:
    ring = create_ring(2, LIMITS.plan_bytes, 3)
    bells = [Doorbell.create() for _ in range(3)]
    writer = RingWriter(ring)
    wires = [
        Wire(
            ExecutorChannels(
                epoch=2,
                rank=place,
                place=place,
                plan_ring=ring,
                plan_bell=bells[place].fd,
                next_bells=tuple(bell.fd for bell in bells[2 * place + 1 : 2 * place + 3]),
                result_ring=create_ring(2, 256),
                result_bell=Doorbell.create().fd,
                control="ipc:///nowhere",
                parent_pipe=-1,
            )
        )
        for place in range(3)
    ]
    for epoch in (1, 2):  # that of a life before is given back unread
        plan = synthetic_plan([1], 1, PlanFlag.NONE)
        plan.seq, plan.epoch = epoch, epoch
        write_plan(writer.begin(epoch), plan)
        writer.publish(epoch)
    bells[0].ring()
    assert not select.select(bells[1:], [], [], 0)[0]
    for wire in wires:
        payload = wire.next_plan()
        assert payload is not None and np.array_equal(payload[:16].view(np.int64), [2, 2])
        assert wire.plans.head == 2
        if wire is wires[0]:
            assert select.select(bells[1:], [], [], 0)[0] == bells[1:]
