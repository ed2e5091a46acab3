"""What leaves the scheduler for its frontends: tokens, refusals, news; and what becomes of one that does not read.

Owned by the loop. Sends never block. What does not fit a frontend's socket waits, in bounds; beyond them its requests
fail, or it is removed. Must never wait for anyone.
"""

from __future__ import annotations

import logging
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt
import zmq

from ipc.clock import now_ns
from ipc.results import Result
from ipc.schema import PROTOCOL_VERSION, FinishReason, Message, Welcome
from ipc.sockets import send_to
from scheduler.peers import Peer, PeerTable
from scheduler.request import Request
from scheduler.retire import Delivery
from scheduler.state import SchedulerState

log = logging.getLogger(__name__)

MAX_NOTICES: Final = 10_000  # that wait for a frontend which sends and does not read
_REST: Final = 20  # times as long as a frame took that found a socket full passes before the next is put together


class Mail:
    """The frontends and their socket, a ROUTER. A frontend that is found gone takes its requests along."""

    def __init__(self, state: SchedulerState, socket: zmq.Socket[bytes]) -> None:
        self.state, self.socket = state, socket
        self.peers = PeerTable()

    @property
    def waits(self) -> bool:
        """Something was not sent yet."""
        return any(peer.outbox or peer.notices for peer in self.peers)

    def sort_out(self, delivery: Delivery, result: Result) -> None:
        """Put each row of a delivery into its frontend's outbox."""
        for index in _owners(delivery.peer):
            peer = self.peers.get(index)
            assert peer is not None, f"a request of frontend {index} outlived it"
            peer.outbox.add(delivery, result, np.flatnonzero(delivery.peer == index))
        for index in _owners(delivery.score_peer):
            peer = self.peers.get(index)
            assert peer is not None, f"a scored request of frontend {index} outlived it"
            peer.outbox.add_scores(delivery, result, np.flatnonzero(delivery.score_peer == index))

    def deliver(self) -> int:
        """Send each frontend one frame with all it is owed; what does not fit its socket waits and coalesces.

        Returns the rows sent.
        """
        for index, request_id, cached in self.state.started:
            peer = self.peers.get(index)
            if peer is not None:
                peer.outbox.started.append((request_id, cached))
        self.state.started.clear()
        rows = 0
        for peer in self.peers:
            if self._flush(peer) and self._send_outbox(peer):
                rows += peer.outbox.rows
                peer.sent_tokens += peer.outbox.rows
                peer.outbox.clear()
            elif peer.outbox.is_too_long:
                self._give_up(peer)
        return rows

    def welcome(self, peer: Peer) -> None:
        """Tell a frontend what is served here, now that it asks or that it has changed."""
        state = self.state
        message = Welcome(
            version=PROTOCOL_VERSION,
            ready=state.attached,
            card=msgspec.structs.replace(state.config.card, max_model_len=state.max_seq_len),
            epoch=state.epoch,
            num_blocks=state.pool.num_blocks,
            block_size=state.config.block_size,
        )
        self.notify(peer, message)

    def notify(self, peer: Peer, message: Message) -> None:
        """What a frontend must learn, since it will not ask again: if its socket is full, later."""
        peer.notices.append(message)
        if not self._flush(peer) and len(peer.notices) > MAX_NOTICES:
            self.remove(peer, f"it left {MAX_NOTICES} notices unread")  # if it lives, it comes back with what is open

    def reply(self, peer: Peer, message: Message) -> None:
        """Answer a question; who gets no answer asks again."""
        if not self._send(peer, message):
            self.state.counters.dropped_messages += 1

    def end(self, requests: list[Request], reason: FinishReason) -> None:
        """End open requests here and now, and owe their frontends the reason."""
        for request in requests:
            self.state.finish(request)
            peer = self.peers.get(request.peer)
            if peer is not None:
                peer.outbox.add_end([request.request_id], reason)
        self.state.counters.requests_finished[reason.name.lower()] += len(requests)

    def remove(self, peer: Peer, reason: str) -> None:
        """Forget a frontend, and abort its requests; again does nothing."""
        if self.peers.get(peer.index) is None:  # the send before has found it gone already
            return
        requests = self.state.requests_of(peer.index)
        for request in requests:
            self.state.finish(request)
        self.state.counters.requests_finished["aborted"] += len(requests)
        self.peers.remove(peer)
        level = logging.INFO if requests else logging.DEBUG
        log.log(level, "frontend %s left: %s; %d of its requests aborted", peer.name, reason, len(requests))

    def send_to(self, identity: bytes, message: Message) -> bool | None:
        """True if sent, False if the peer's socket is full, None if there is no such peer."""
        return send_to(self.socket, identity, message)

    def _send(self, peer: Peer, message: Message) -> bool:
        """False if the frontend's socket is full. A frontend that is gone loses its requests."""
        sent = self.send_to(peer.identity, message)
        if sent is None:
            self.remove(peer, "its connection is gone")
        return sent is not False

    def _flush(self, peer: Peer) -> bool:
        """Send the notices that wait; False if some still do."""
        while peer.notices and self._send(peer, peer.notices[0]):
            peer.notices.popleft()
        return not peer.notices

    def _send_outbox(self, peer: Peer) -> bool:
        """Whether there was something, and it was sent. A frame grows as its frontend lags, so it is not put together
        again and again: that would cost the others their time."""
        if not peer.outbox or (start_ns := now_ns()) < peer.rests_until_ns:
            return False
        sent = self._send(peer, peer.outbox.message(self.state.load))
        if not sent:
            end_ns = now_ns()
            peer.rests_until_ns = end_ns + _REST * (end_ns - start_ns)
        return sent

    def _give_up(self, peer: Peer) -> None:
        """Fail the requests of a frontend that does not read; its backlog is replaced by their terminal rows, and by
        those of requests whose end was in it. One that left too many of those unread is removed."""
        requests, ended = self.state.requests_of(peer.index), peer.outbox.ended
        log.warning("frontend %s is %d rows behind; %d requests fail", peer.name, peer.outbox.backlog, len(requests))
        peer.outbox.clear()
        peer.outbox.add_end(ended, FinishReason.SLOW_CONSUMER)
        self.end(requests, FinishReason.SLOW_CONSUMER)
        if peer.outbox.is_too_long:
            self.remove(peer, f"it left {peer.outbox.backlog} ends unread")


def _owners(peer: npt.NDArray[np.int32]) -> list[int]:
    """The frontends in a column [rows], which often has one."""
    if not len(peer):
        return []
    if not np.count_nonzero(peer != peer[0]):
        return [int(peer[0])]
    return [int(index) for index in np.unique(peer)]
