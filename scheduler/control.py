"""The control socket: which executor the scheduler has, and what the launcher must know.

Owned by the loop, which hands it what has come. The launcher says which executors have ended, an executor that it is
there. Must never wait: what the launcher does not take now is said again.
"""

from __future__ import annotations

import logging
from typing import Any, Final

import zmq

from ipc.control import (
    Alive,
    Drain,
    Drained,
    ExecutorFaulty,
    ExecutorHello,
    ExecutorLost,
    ExecutorStuck,
    SchedulerReady,
)
from ipc.errors import ProtocolError
from ipc.schema import PROTOCOL_VERSION, Draining, FinishReason, Hello, Message, Paused, Rejected
from ipc.sockets import send_to
from scheduler.mail import Mail
from scheduler.state import SchedulerState
from scheduler.wire import Wire

log = logging.getLogger(__name__)

MAX_BLOCKS: Final = 1 << 24  # of a KV cache: more than any device holds


class Control:
    """The lives of executors, as a scheduler hears of them; they begin and end in `state`, on `wire` and for `mail`."""

    def __init__(
        self,
        state: SchedulerState,
        wire: Wire,
        mail: Mail,
        socket: zmq.Socket[bytes],
        *,
        epoch: int,
        tcp_endpoint: str,
    ) -> None:
        """`epoch`: executors before it have ended. `tcp_endpoint`: where frontends of other hosts connect, if any."""
        self.state, self.wire, self.mail, self.socket = state, wire, mail, socket
        self.launcher: bytes | None = None
        self.epoch = epoch  # the only one that may attach: the launcher has told that those before it have ended
        self.ranks: dict[tuple[int, int], ExecutorHello] = {}  # that are ready, by epoch and number
        self.accusation: ExecutorFaulty | None = None  # until the launcher has replaced that executor
        self.stuck_epoch = -1  # the last one reported
        self.owes_drained = False
        self._tcp_endpoint = tcp_endpoint

    def handle(self, identity: bytes, message: Any) -> None:
        """Take a message of the launcher or of an executor. Raises ProtocolError for one that cannot be."""
        match message:
            case Hello(role="launcher"):
                self.launcher = identity
                if self.state.attached:
                    self._announce()
            case ExecutorHello():
                self._on_rank(message)
            case ExecutorLost() if identity == self.launcher:
                self._on_lost(message.epoch)
            case Drain():
                self._drain(message.abort)

    def accuse(self, reason: str) -> None:
        """The executor broke the protocol: it is believed no more, and the launcher is to replace it."""
        log.error("the executor of epoch %d is at fault: %s", self.state.epoch, reason)
        self.accusation = ExecutorFaulty(self.state.epoch, reason)
        self._detach()

    def report(self, step_age_s: float) -> None:
        """Once a heartbeat: this scheduler lives, and whether the executor is to be replaced."""
        self.tell(Alive())
        if self.accusation is not None:
            self.tell(self.accusation)
        epoch, is_stuck = self.state.epoch, step_age_s > self.state.config.watchdog_timeout_s
        if is_stuck and self.stuck_epoch != epoch and self.tell(ExecutorStuck(epoch, step_age_s)):
            self.stuck_epoch = epoch

    def tell(self, message: Message) -> bool:
        """False if it was not sent: the launcher was stopped for long. Of one that is gone, the pipe tells."""
        return self.launcher is not None and send_to(self.socket, self.launcher, message) is True

    def tell_drained(self) -> None:
        """Nothing is open any more; said once, to who asked for it."""
        if self.owes_drained:
            self.owes_drained = not self.tell(Drained())

    def _on_rank(self, hello: ExecutorHello) -> None:
        """A rank is ready; the executor is when all of them are. Each has room for as many blocks as the least has."""
        if hello.version != PROTOCOL_VERSION:
            raise ProtocolError(f"executor speaks version {hello.version}, expected {PROTOCOL_VERSION}")
        if not (0 <= hello.epoch < 1 << 31 and 1 < hello.num_blocks <= MAX_BLOCKS):
            raise ProtocolError(f"executor of epoch {hello.epoch} with {hello.num_blocks} blocks")
        ranks = self.state.config.ranks
        if not 0 <= hello.rank < ranks:
            raise ProtocolError(f"rank {hello.rank} of an executor of {ranks}")
        self.ranks[hello.epoch, hello.rank] = hello
        self._attach_if_ready()

    def _on_lost(self, epoch: int) -> None:
        if self.state.attached:
            log.warning("executor of epoch %d lost; %d requests wait", epoch, len(self.state.requests))
            self._detach()
        self.epoch, self.accusation = epoch + 1, None
        self.ranks = {key: hello for key, hello in self.ranks.items() if hello.epoch > epoch}
        self._attach_if_ready()

    def _attach_if_ready(self) -> None:
        """Once all ranks of the epoch are there; what others say may overtake what the launcher says of them."""
        blocks = [hello.num_blocks for hello in self.ranks.values() if hello.epoch == self.epoch]
        if len(blocks) < self.state.config.ranks or self.state.attached or self.accusation is not None:
            return
        self.wire.attach()
        for request in self.state.executor_attached(self.epoch, min(blocks)):
            peer = self.mail.peers.get(request.peer)
            self.state.finish(request)
            self.state.counters.requests_rejected += 1
            if peer is not None:
                numbers = f"{request.limit} tokens, the KV cache now holds {self.state.max_seq_len}"
                self.mail.notify(peer, Rejected(request.request_id, "context_length_exceeded", numbers))
        for peer in self.mail.peers:
            self.mail.welcome(peer)
        self._announce()

    def _announce(self) -> None:
        kv_tokens = self.state.pool.capacity * self.state.config.block_size
        self.tell(SchedulerReady(self.state.epoch, self.state.max_seq_len, kv_tokens, self._tcp_endpoint))

    def _detach(self) -> None:
        """The executor is gone with all it was given; requests that crashed it twice in a row end here."""
        crashed = self.state.executor_lost()
        for request in crashed:
            log.warning("a request of %d tokens crashed the executor twice; it is given up", len(request.tokens))
        self.mail.end(crashed, FinishReason.CRASHED)
        self.state.seq = self.wire.plans.restart()
        for peer in self.mail.peers:
            self.mail.notify(peer, Paused())

    def _drain(self, abort: bool) -> None:
        state = self.state
        if not state.draining:
            state.draining = True
            for peer in self.mail.peers:
                self.mail.notify(peer, Draining())
        if abort:
            self.mail.end(list(state.requests.values()), FinishReason.ABORTED)
        self.owes_drained = True
