"""The scheduler's loop: results in, next plan out, then everything else, in the shadow of the running step.

One thread. It sleeps in one poll over the result bell and the two sockets, and plans whenever fewer than `depth` plans
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

import msgspec
import zmq

from ipc.auth import Gatekeeper
from ipc.clock import now_ns
from ipc.config import EngineConfig, SchedulerChannels
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
    Alive,
    Drain,
    Drained,
    Draining,
    ExecutorFaulty,
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
    Message,
    Paused,
    Rejected,
    SchedulerReady,
    Stats,
    Welcome,
    decode_control,
    decode_frontend,
    encode,
)
from ipc.sockets import bind_router
from ipc.trace import Act, Track, open_trace
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
MAX_BLOCKS: Final = 1 << 24  # of a KV cache: more than any device holds
REJOIN_NS: Final = 3_000_000_000  # a scheduler that replaces another one is not drained before: frontends come back


class Loop:
    """Connects a SchedulerState to rings and sockets. `run` returns after SIGTERM."""

    def __init__(self, config: EngineConfig, channels: SchedulerChannels) -> None:
        self.config = config
        self.state = SchedulerState(config)
        self.launcher: bytes | None = None
        self.wire = Wire(config, channels)
        self.state.seq = self.wire.plans.head
        self.fault = read_fault("scheduler", channels.life)
        self.rejoined_ns = now_ns() + (REJOIN_NS if channels.life else 0)
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self.mail = Mail(self.state, bind_router(context, channels.frontend))
        self.control = bind_router(context, channels.control)
        self.gatekeeper: Gatekeeper | None = None
        self.tcp_endpoint = ""
        if config.frontend_endpoint:
            self.gatekeeper = Gatekeeper(context, Path(config.auth_keys))
            self.tcp_endpoint = self.gatekeeper.bind(self.mail.socket, config.frontend_endpoint)
        self.grammar_bell = Doorbell.create()
        self.grammars = GrammarWorker(config.card, self.grammar_bell)
        self.stop_bell = Doorbell.create()
        self.stopping = False
        self.trace = open_trace(channels.trace, config.replica or 0)
        self.last_result_ns = 0
        self.next_check_ns = 0
        self.owes_drained = False
        self.stats_line = StatsLine(now_ns())
        self.stuck_epoch = -1  # the last one reported
        self.ranks: dict[int, ExecutorHello] = {}  # of the newest epoch
        self.next_epoch = -1  # the one the launcher has told to follow; -1: it has not spoken of any
        self.accusation: ExecutorFaulty | None = None  # until the launcher has replaced that executor
        self.poller = zmq.Poller()
        for waitable in (
            self.wire.result_bell.fd,
            self.grammar_bell.fd,
            self.stop_bell.fd,
            self.mail.socket,
            self.control,
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
            self._accuse(str(error))

    def _take_result(self, result: Result) -> None:
        start = now_ns()
        if result.epoch == self.state.epoch:
            self.mail.sort_out(retire(self.state, result), result)
            self.last_result_ns = start
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
                self.last_result_ns = start
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
            (self.control, decode_control, self._on_control),
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
        peer.last_heard_ns = now_ns()
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
        peer = self.mail.peers.add(identity, hello.name, hello.pid, now_ns())
        peer.last_heard_ns = now_ns()
        self.mail.notify(peer, self._welcome_message())
        if self.state.draining:
            self.mail.notify(peer, Draining())

    def _welcome_message(self) -> Welcome:
        state = self.state
        return Welcome(
            version=PROTOCOL_VERSION,
            ready=state.attached,
            card=msgspec.structs.replace(self.config.card, max_model_len=state.max_seq_len),
            epoch=state.epoch,
            num_blocks=state.pool.num_blocks,
            block_size=self.config.block_size,
        )

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

    def _on_control(self, identity: bytes, message: Any) -> None:
        state = self.state
        match message:
            case Hello(role="launcher"):
                self.launcher = identity
                if state.attached:
                    self._announce()
            case ExecutorHello():
                if message.version != PROTOCOL_VERSION:
                    raise ProtocolError(f"executor speaks version {message.version}, expected {PROTOCOL_VERSION}")
                if not (0 <= message.epoch < 1 << 31 and 1 < message.num_blocks <= MAX_BLOCKS):
                    raise ProtocolError(f"executor of epoch {message.epoch} with {message.num_blocks} blocks")
                self._on_rank(message)
            case ExecutorLost():
                self.next_epoch = message.epoch + 1
                if message.epoch == state.epoch and state.attached:
                    log.warning("executor of epoch %d lost; %d requests wait", message.epoch, len(state.requests))
                    self._detach()
            case Drain():
                self._drain(message.abort)

    def _accuse(self, reason: str) -> None:
        """The executor broke the protocol: it is believed no more, and the launcher is to replace it."""
        log.error("the executor of epoch %d is at fault: %s", self.state.epoch, reason)
        self.accusation = ExecutorFaulty(self.state.epoch, reason)
        self.next_check_ns = 0
        self._detach()

    def _detach(self) -> None:
        """The executor is gone with all it was given; requests that crashed it twice in a row end here."""
        crashed = self.state.executor_lost()
        for request in crashed:
            log.warning("a request of %d tokens crashed the executor twice; it is given up", len(request.tokens))
        self.mail.end(crashed, FinishReason.CRASHED)
        self.state.seq = self.wire.plans.restart()
        for peer in self.mail.peers:
            self.mail.notify(peer, Paused())

    def _on_rank(self, hello: ExecutorHello) -> None:
        """A rank is ready; the executor is when all of them are. Each has room for as many blocks as the least has."""
        if not 0 <= hello.rank < self.config.ranks:
            raise ProtocolError(f"rank {hello.rank} of an executor of {self.config.ranks}")
        if hello.epoch != self.next_epoch and any(other.epoch > hello.epoch for other in self.ranks.values()):
            return  # of an executor that has ended: its word came late
        self.ranks = {rank: other for rank, other in self.ranks.items() if other.epoch == hello.epoch}
        self.ranks[hello.rank] = hello
        if self.state.attached:
            self._detach()
        if set(self.ranks) == set(range(self.config.ranks)):
            self._attach(hello.epoch, min(rank.num_blocks for rank in self.ranks.values()))

    def _attach(self, epoch: int, num_blocks: int) -> None:
        self.accusation = None
        self.wire.results.skip()  # what was published before is not for this epoch
        self.wire.ring()  # a scheduler that died may have published a plan without doing so
        self.last_result_ns = now_ns()
        for request in self.state.executor_attached(epoch, num_blocks):
            peer = self.mail.peers.get(request.peer)
            self.state.finish(request)
            if peer is not None:
                numbers = f"{request.limit} tokens, the KV cache now holds {self.state.max_seq_len}"
                self.mail.notify(peer, Rejected(request.request_id, "context_length_exceeded", numbers))
        for peer in self.mail.peers:
            self.mail.notify(peer, self._welcome_message())
        self._announce()

    def _announce(self) -> None:
        kv_tokens = self.state.pool.capacity * self.config.block_size
        self._tell_launcher(SchedulerReady(self.state.epoch, self.state.max_seq_len, kv_tokens, self.tcp_endpoint))

    def _tell_launcher(self, message: Message) -> bool:
        """False if it was not sent: the launcher was stopped for long. Of one that is gone, the pipe tells."""
        if self.launcher is None:
            return False
        try:
            self.control.send_multipart([self.launcher, encode(message)], zmq.NOBLOCK)
        except zmq.ZMQError:
            return False
        return True

    def _drain(self, abort: bool) -> None:
        state = self.state
        if not state.draining:
            state.draining = True
            for peer in self.mail.peers:
                self.mail.notify(peer, Draining())
        if abort:
            self.mail.end(list(state.requests.values()), FinishReason.ABORTED)
        self.owes_drained = True

    # -- once in a while

    def keep_house(self) -> None:
        """Once a heartbeat: silent frontends, a stuck executor; and Drained as soon as the last request ended."""
        now, state = now_ns(), self.state
        self.deliver()
        if self.owes_drained and not state.requests and not self._is_owed_to_frontends():
            self.owes_drained = not self._tell_launcher(Drained())
        if now < self.next_check_ns:
            return
        self.next_check_ns = now + int(HEARTBEAT_S * 1e9)
        for peer in self.mail.peers:
            if now - peer.last_heard_ns > HEARTBEAT_LIMIT_S * 1e9:
                self.mail.remove(peer, f"silent for {HEARTBEAT_LIMIT_S:.0f} s")
                self._tell_launcher(FrontendStuck(peer.pid))
        self._tell_launcher(Alive())
        if self.accusation is not None:
            self._tell_launcher(self.accusation)
        if self.config.log_stats and self.stats_line.is_due(now):
            line = self.stats_line.make(self.stats(), now)
            if line is not None:
                log.info("%s", line)
        age_s = self._step_age_ns() * 1e-9
        if age_s > self.config.watchdog_timeout_s and self.stuck_epoch != state.epoch:
            self.stuck_epoch = state.epoch
            self._tell_launcher(ExecutorStuck(state.epoch, age_s))

    def _is_owed_to_frontends(self) -> bool:
        """Rows wait to be sent, or frontends of the scheduler before this one may still bring requests."""
        return now_ns() < self.rejoined_ns or self.mail.waits

    def _step_age_ns(self) -> int:
        waits = self.state.inflight or (self.state.attached and self.state.has_work and not self._can_plan)
        return now_ns() - self.last_result_ns if waits else 0

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
            queued_tokens=state.queue.num_tokens,
            peers=self.mail.peers.stats(owner for owner, _ in state.requests),
            **{name: getattr(counters, name) for name in counters.__slots__},
        )
