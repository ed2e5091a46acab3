"""An executor's end of the wire: plan ring in, result ring out, their bells, and the scheduler's control socket.

Used by the executor and by its fake; imports no torch. The launch thread takes plans and begins results; whichever
thread retires steps publishes them, in the same order. A plan slot is given back only when its result is published,
because the slot is the host buffer that the device copies from.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Final

import numpy as np
import zmq

from ipc.config import ExecutorChannels
from ipc.control import ExecutorHello
from ipc.doorbell import Doorbell
from ipc.frames import Bytes, PlanWord, plan_words
from ipc.results import RESULT_HEADER_BYTES
from ipc.ring import RingReader, RingWriter
from ipc.schema import PROTOCOL_VERSION, encode
from ipc.sockets import connect_dealer, new_identity

_NAP_S: Final = 30e-6  # and what the kernel adds, 50 us: while steps are under way a tenth of a core


class Wire:
    """Plans of one epoch in order, results in the same order. Rank 0 publishes, the other ranks only acknowledge."""

    def __init__(self, channels: ExecutorChannels) -> None:
        self._channels = channels
        self.plans = RingReader(channels.plan_ring, channels.place)
        self.results = RingWriter(channels.result_ring)
        self._plan_bell, self._result_bell = Doorbell(channels.plan_bell), Doorbell(channels.result_bell)
        self._next_bells = [Doorbell(fd) for fd in channels.next_bells]
        self._published = self.results.head  # the last one
        self._next_result = self._published + 1
        self.publishes = channels.rank == 0  # the ring has one writer: what other ranks compute goes nowhere
        self._is_elsewhere = channels.rank != channels.place  # on another node than the scheduler
        self._scratch = np.zeros(self.results.slot_bytes, np.uint8)
        self._stop_read, self._stop_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._control: zmq.Socket[bytes] | None = None
        self._stopping = False
        self.waited = False  # the last plan was not there when it was asked for
        self.corrupt_next = False  # a fault on demand: the next result is shown with garbage as its header

    def stop_on_sigterm(self) -> None:
        """From now on SIGTERM makes `next_plan` return None. Call from the main thread."""
        # A signal that comes just before poll() sleeps would be noticed at the next wake-up only, but for this pipe.
        signal.set_wakeup_fd(self._stop_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, self._on_sigterm)

    @property
    def result_slots(self) -> list[Bytes]:
        """All that `begin_result` may give."""
        return [*self.results.payloads, self._scratch]

    @property
    def is_stopping(self) -> bool:
        """SIGTERM came, or `stop` was called."""
        return self._stopping

    def stop(self) -> None:
        """Make `next_plan` return None; from any thread."""
        self._stopping = True
        os.write(self._stop_write, b"\0")

    def _on_sigterm(self, *_: object) -> None:
        self._stopping = True

    def hello(self, num_blocks: int) -> None:
        """Tell the scheduler that this rank takes plans of this epoch."""
        epoch, rank = self._channels.epoch, self._channels.rank
        self._control = connect_dealer(zmq.Context.instance(), self._channels.control, new_identity())
        self._control.send(encode(ExecutorHello(PROTOCOL_VERSION, epoch, os.getpid(), num_blocks, rank)))

    def next_plan(self) -> Bytes | None:
        """Payload of the next plan of this epoch; sleeps until there is one. None when asked to stop.

        Plans of an earlier epoch are given back unread: they belong to an executor that has ended. Those of a later one
        come from a scheduler that was restarted while this executor lived.
        """
        self.waited = False
        while not self._stopping:
            payload = self.plans.poll()
            if payload is None:
                self.waited = True
                self._rest()
                continue
            for bell in self._next_bells:
                bell.ring()
            words = plan_words(payload)
            self.plans.advance()
            if words[PlanWord.EPOCH] >= self._channels.epoch:
                return payload
            self.plans.ack(words[PlanWord.SEQ])
        return None

    def _rest(self) -> None:
        """Give the core away until there may be a plan. While a step is under way that is never for long: a thread that
        sleeps through it wakes with cold caches, and takes twice as long for the next launch."""
        if self._published < self._next_result - 1:
            time.sleep(_NAP_S)
        else:
            self._plan_bell.wait(self._stop_read)

    def begin_result(self) -> tuple[int, Bytes]:
        """(ring sequence number, payload) for the next result; publish them in the same order."""
        seq = self._next_result
        self._next_result += 1
        return seq, self.results.begin(seq) if self.publishes else self._scratch

    def publish(self, result_seq: int, plan_seq: int) -> None:
        """The result is complete: show it, give the plan back, wake the scheduler."""
        if self.publishes:
            if self.corrupt_next:
                self.results.begin(result_seq)[:RESULT_HEADER_BYTES] = 0xAB
                self.corrupt_next = False
            self.results.publish(result_seq)
        self._published = result_seq
        self.plans.ack(plan_seq)
        # A rank that lags fills the ring while results go on: then the scheduler waits for this slot. One that is not
        # here sees no acks, it must be told of each.
        if self.publishes or self._is_elsewhere or self.plans.head - plan_seq >= self.plans.slots - 1:
            self._result_bell.ring()
