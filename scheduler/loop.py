"""The scheduler's loop: results in, next plan out, then everything else, in the shadow of the running step.

One thread. It sleeps in one poll over its bells and sockets, and plans whenever fewer than `depth` plans
are in flight. Messages are taken in small helpings, so a burst of arrivals cannot delay the next plan.

A scheduler that replaces a dead one finds the rings as they were. It goes on counting where the plan ring stands, waits
until the executor has given back the plans of its predecessor, and drops their results by their epoch. Requests come
back from the frontends, which replay them.
"""

from __future__ import annotations

import logging
import signal
from pathlib import Path
from typing import Any, Final

import zmq

from ipc.auth import Gatekeeper
from ipc.clock import now_ns
from ipc.config import EngineConfig, SchedulerChannels
from ipc.control import FrontendStuck, decode_control
from ipc.doorbell import Doorbell
from ipc.errors import GrammarError, ProtocolError, TandemError
from ipc.fault import read_fault
from ipc.results import Result
from ipc.schema import (
    HEARTBEAT_LIMIT_S,
    HEARTBEAT_S,
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
    Rejected,
    Stats,
    decode_frontend,
)
from ipc.sockets import bind_router
from ipc.trace import Act, Track, open_trace
from scheduler.control import Control
from scheduler.grammar import GrammarWorker
from scheduler.invariants import take_invariants
from scheduler.mail import Mail
from scheduler.peers import Peer
from scheduler.planner import make_plan
from scheduler.request import Request, State
from scheduler.retire import retire
from scheduler.state import SchedulerState
from scheduler.stats_line import StatsLine
from scheduler.wire import Wire

log = logging.getLogger(__name__)

MESSAGE_HELPING_NS: Final = 200_000  # time for messages between two looks at the result bell
REJOIN_NS: Final = 3_000_000_000  # a scheduler that replaces another one is not drained before: frontends come back


class Loop:
    """Connects a SchedulerState to rings and sockets. `run` returns after SIGTERM."""

    def __init__(self, config: EngineConfig, channels: SchedulerChannels) -> None:
        self.config = config
        self.state = SchedulerState(config)
        self.wire = Wire(config, channels)
        self.state.seq = self.wire.plans.head
        self.fault = read_fault("scheduler", channels.life)
        self.rejoined_ns = now_ns() + (REJOIN_NS if channels.life else 0)
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self.mail = Mail(self.state, bind_router(context, channels.frontend))
        self.gatekeeper: Gatekeeper | None = None
        tcp_endpoint = ""
        if config.frontend_endpoint:
            self.gatekeeper = Gatekeeper(context, Path(config.auth_keys))
            tcp_endpoint = self.gatekeeper.bind(self.mail.socket, config.frontend_endpoint)
        control = bind_router(context, channels.control)
        self.control = Control(
            self.state, self.wire, self.mail, control, epoch=channels.epoch, tcp_endpoint=tcp_endpoint
        )
        self.grammar_bell = Doorbell.create()
        self.grammars = GrammarWorker(config.card, self.grammar_bell)
        self.stop_bell = Doorbell.create()
        self.stopping = False
        self.trace = open_trace(channels.trace, config.replica or 0)
        self.next_check_ns = 0
        self.stats_line = StatsLine(now_ns())
        self.poller = zmq.Poller()
        for waitable in (
            self.wire.result_bell.fd,
            self.grammar_bell.fd,
            self.stop_bell.fd,
            self.mail.socket,
            self.control.socket,
        ):
            self.poller.register(waitable, zmq.POLLIN)
        if self.gatekeeper is not None:
            self.poller.register(self.gatekeeper.socket, zmq.POLLIN)

    def run(self) -> None:
        signal.signal(signal.SIGTERM, self._stop)
        while not self.stopping:
            self.poller.poll(int(HEARTBEAT_S * 1e3))
            self.wire.result_bell.drain()
            self.take_results()
            self.exchange_masks()
            self.plan_ahead()
            self.deliver()
            self.take_messages()
            self.exchange_masks()
            self.plan_ahead()
            self.state.register_new_blocks()
            self.keep_house()

    def _stop(self, *_: object) -> None:
        self.stopping = True
        self.stop_bell.ring()

    # -- the step

    def take_results(self) -> None:
        """Retire every published result, in order. One that cannot be costs the executor its place."""
        try:
            while self.state.attached and (result := self.wire.next_result()) is not None:
                self._take_result(result)
        except ProtocolError as error:
            self.control.accuse(str(error))
            self.next_check_ns = 0

    def _take_result(self, result: Result) -> None:
        start = now_ns()
        if result.epoch == self.state.epoch:
            self.mail.sort_out(retire(self.state, result), result)
            self.wire.quiet_since_ns = start
            self.fault.strike(self.state.counters.steps)
        elif not 0 <= result.epoch < self.state.epoch:
            raise ProtocolError(f"result of epoch {result.epoch}, expected {self.state.epoch} or an earlier one")
        self.wire.give_back()
        end = now_ns()
        self.state.counters.retire_ns += end - start
        self._record(Act.RETIRE, start, end, result.seq, len(result.token))

    def plan_ahead(self) -> None:
        """Fill the pipeline: plan until `depth` plans are in flight or no row can run."""
        state = self.state
        while self._can_plan and state.has_work and len(state.inflight) < state.depth.steps:
            start = now_ns()
            if not state.inflight:
                self.wire.quiet_since_ns = start
            plan = make_plan(state)
            if plan is None:
                break
            self.wire.send(plan)
            end = now_ns()
            state.counters.plan_ns += end - start
            self._record(Act.PLAN, start, end, plan.seq, plan.num_rows)

    def _record(self, act: Act, start_ns: int, end_ns: int, step: int, rows: int) -> None:
        if self.trace is not None:
            self.trace.span(Track.SCHEDULER, act, start_ns, end_ns, step, rows)

    @property
    def _can_plan(self) -> bool:
        """An executor is attached, holds no plan of a scheduler before this one, and has no rank a whole lap behind."""
        return self.state.attached and self.wire.has_room

    def exchange_masks(self) -> None:
        """Ask for the grammar masks that are missing, and let the rows go on whose masks have come."""
        if self.state.masks_wanted:
            self.grammars.submit(self.state.masks_wanted)
            self.state.masks_wanted = []
        for request, outcome in self.grammars.take():
            if request.state is State.DONE:
                continue
            if isinstance(outcome, GrammarError):
                self._fail_grammar(request, outcome)
            else:
                self.state.mask_arrived(request, outcome)

    def _fail_grammar(self, request: Request, error: GrammarError) -> None:
        self.state.finish(request)
        peer = self.mail.peers.get(request.peer)
        assert peer is not None, f"a request of frontend {request.peer} outlived it"
        if request.started_ns:  # tokens may still be on their way: the end comes after them
            self.state.counters.requests_finished["invalid_grammar"] += 1
            peer.outbox.add_end([request.request_id], FinishReason.INVALID_GRAMMAR)
        else:
            self.state.counters.requests_rejected += 1
            self.mail.notify(peer, Rejected(request.request_id, error.code, error.message))

    def deliver(self) -> None:
        """Send the frontends what they are owed."""
        start = now_ns()
        if rows := self.mail.deliver():
            self._record(Act.DELIVER, start, now_ns(), 0, rows)

    # -- messages

    def take_messages(self) -> None:
        """Handle messages for at most one helping of time; the poll wakes again for the rest."""
        if self.gatekeeper is not None:
            self.gatekeeper.answer()
        start, taken = now_ns(), 0
        deadline = start + MESSAGE_HELPING_NS
        for socket, decode, handle in (
            (self.control.socket, decode_control, self.control.handle),
            (self.mail.socket, decode_frontend, self._on_frontend),
        ):
            while now_ns() < deadline:
                try:
                    identity, *parts = socket.recv_multipart(zmq.NOBLOCK)
                except zmq.Again:
                    break
                taken += 1
                try:
                    if len(parts) != 1:
                        raise ProtocolError(f"a message of {len(parts)} parts, expected 1")
                    handle(identity, decode(parts[0]))
                except ProtocolError as error:
                    self.state.counters.dropped_messages += 1
                    log.warning("message dropped: %s", error)
        if taken:
            self._record(Act.MESSAGES, start, now_ns(), 0, taken)

    def _on_frontend(self, identity: bytes, message: Any) -> None:
        if isinstance(message, Hello):
            self._welcome(identity, message)
            return
        peer = self.mail.peers.find(identity)
        if peer is None:  # it was away for too long, or we are new: it must introduce itself again
            self.mail.send_to(identity, Rejected(-1, "unavailable", f"{type(message).__name__} before Hello"))
            return
        peer.silent_beats = 0
        match message:
            case Admit():
                self._admit(peer, message)
            case Abort():
                self._abort(peer, message)
            case Heartbeat():
                self.mail.reply(peer, self.stats())
            case GetStats():
                self.mail.reply(peer, self.stats())
                if message.restart_longest:
                    self.state.counters.restart_longest()
            case GetInvariants() if self.config.debug_endpoints:
                self.mail.reply(peer, take_invariants(self.state, self.mail.peers, self.wire.plans, self.wire.results))
            case Goodbye():
                self.mail.remove(peer, "goodbye")

    def _welcome(self, identity: bytes, hello: Hello) -> None:
        if hello.version != PROTOCOL_VERSION:
            text = f"protocol version {hello.version}, expected {PROTOCOL_VERSION}"
            self.mail.send_to(identity, Rejected(-1, "protocol_error", text))
            return
        peer = self.mail.peers.add(identity, hello.name, hello.pid)
        peer.silent_beats = 0
        self.mail.welcome(peer)
        if self.state.draining:
            self.mail.notify(peer, Draining())

    def _admit(self, peer: Peer, message: Admit) -> None:
        try:
            self.state.admit(peer.index, message)
        except TandemError as error:
            self.state.counters.requests_rejected += 1
            self.mail.notify(peer, Rejected(message.request_id, error.code, error.message, error.param))

    def _abort(self, peer: Peer, message: Abort) -> None:
        for request_id in message.stopped_ids:
            request = self.state.requests.get((peer.index, request_id))
            if request is not None and request.first_token_ns:
                self.state.complete(request, FinishReason.STOP)
        ended = [i for i in message.request_ids if self.state.abort(peer.index, i)]
        self.state.counters.requests_finished["aborted"] += len(ended)
        if ended:
            peer.outbox.add_end(ended, FinishReason.ABORTED)
            self.deliver()

    # -- once in a while

    def keep_house(self) -> None:
        """Once a heartbeat: silent frontends, a stuck executor; and Drained as soon as the last request ended."""
        now, state = now_ns(), self.state
        self.deliver()
        if not state.requests and not self._is_owed_to_frontends():
            self.control.tell_drained()
        if now < self.next_check_ns:
            return
        self.next_check_ns = now + int(HEARTBEAT_S * 1e9)
        for peer in self.mail.peers:
            peer.silent_beats += 1
            if peer.silent_beats * HEARTBEAT_S > HEARTBEAT_LIMIT_S:
                self._give_up(peer)
        self.control.report(self._step_age_ns() * 1e-9)
        if self.config.log_stats and self.stats_line.is_due(now):
            line = self.stats_line.make(self.stats(), now)
            if line is not None:
                log.info("%s", line)

    def _give_up(self, peer: Peer) -> None:
        """A frontend is silent: the launcher ends it, unless it has come back under another identity."""
        self.mail.remove(peer, f"silent for {HEARTBEAT_LIMIT_S:.0f} s")
        if all((other.name, other.pid) != (peer.name, peer.pid) for other in self.mail.peers):
            self.control.tell(FrontendStuck(peer.pid))

    def _is_owed_to_frontends(self) -> bool:
        """Rows wait to be sent, or frontends of the scheduler before this one may still bring requests."""
        return now_ns() < self.rejoined_ns or self.mail.waits

    def _step_age_ns(self) -> int:
        waits = self.state.inflight or (self.state.attached and self.state.has_work and not self._can_plan)
        return now_ns() - self.wire.quiet_since_ns if waits else 0

    def stats(self) -> Stats:
        """A snapshot of counters and gauges."""
        state, counters = self.state, self.state.counters
        return Stats(
            epoch=state.epoch,
            running=len(state.slots.running),
            waiting=state.num_waiting,
            inflight=len(state.inflight),
            blocks_total=state.pool.capacity,
            blocks_free=state.pool.num_free,
            step_age_ns=self._step_age_ns(),
            frontends=len(self.mail.peers),
            draining=state.draining,
            histograms=state.histograms.pack(),
            queued_tokens=state.num_waiting_tokens,
            peers=self.mail.peers.stats(state.open_requests),
            **{name: getattr(counters, name) for name in counters.__slots__},
        )
