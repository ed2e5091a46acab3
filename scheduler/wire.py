"""The scheduler's end of the wire: plans out, results in, and their bells; the other end is executor/wire.py.

Owned by the loop. It knows frames and their order, and must never touch a request. What it reads was written by another
process: a frame that cannot be one is a ProtocolError, which the loop answers by replacing the executor.
"""

from __future__ import annotations

from ipc.clock import now_ns
from ipc.config import EngineConfig, SchedulerChannels
from ipc.doorbell import Doorbell
from ipc.frames import Plan, write_plan
from ipc.results import Result, read_result
from ipc.ring import RingReader, RingWriter


class Wire:
    """Plans in order to all ranks of an executor, results in order from its first one.

    A scheduler that replaces a dead one counts on where the plan ring stands.
    """

    def __init__(self, config: EngineConfig, channels: SchedulerChannels) -> None:
        self.plans = RingWriter(channels.plan_ring)
        self.results = RingReader(channels.result_ring)
        self.result_bell = Doorbell(channels.result_bell)
        self._plan_bell = Doorbell(channels.plan_bell)
        self._layout = config.result_layout
        self.quiet_since_ns = 0  # the last result, or the first plan after a rest: the age of a step counts from then
        self._inherited_seq = self.plans.head  # the last plan of the scheduler before this one

    def attach(self) -> None:
        """An executor begins."""
        self.results.skip()  # what was published before is not for this epoch
        self._plan_bell.ring()  # a scheduler that died may have published a plan without doing so
        self.quiet_since_ns = now_ns()

    @property
    def has_room(self) -> bool:
        """The executor holds no plan of a scheduler before this one, and no rank of it is a whole lap behind."""
        head = self.plans.head
        inherits = head == self._inherited_seq and self.plans.acked < head
        return not inherits and self.plans.has_room(head + 1)

    def send(self, plan: Plan) -> None:
        """Show a plan to all ranks; there must be room."""
        seq = self.plans.head + 1
        write_plan(self.plans.begin(seq), plan)
        self.plans.publish(seq)
        self._plan_bell.ring()

    def next_result(self) -> Result | None:
        """The next result, valid until `give_back`; None if there is none. Raises ProtocolError for a broken frame."""
        payload = self.results.poll()
        return None if payload is None else read_result(payload, self._layout)

    def give_back(self) -> None:
        """Go on to the result after the one just read. Raises TornFrameError if it changed meanwhile."""
        self.results.advance()
        self.results.ack(self.results.next - 1)
