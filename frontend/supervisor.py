"""Starts the processes of one engine, restarts those that end, and stops all of them in order.

Run by `engine-launch`. One thread, one poll over pidfds, signals, stderr pipes and the control socket, so it sleeps
while nothing happens. Never on the path of a request, a plan or a token.
"""

from __future__ import annotations

import heapq
import itertools
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

import msgspec
import zmq

from frontend.children import TRACEBACK, Child, Plumbing
from ipc.clock import now_s
from ipc.config import EngineConfig
from ipc.errors import ProtocolError
from ipc.schema import (
    HEARTBEAT_LIMIT_S,
    HEARTBEAT_S,
    PROTOCOL_VERSION,
    Drain,
    Drained,
    ExecutorFaulty,
    ExecutorHello,
    ExecutorLost,
    ExecutorStuck,
    FrontendStuck,
    Hello,
    Message,
    SchedulerReady,
    decode_launcher,
    encode,
)
from ipc.sockets import connect_dealer, new_identity

RESTART_WINDOW_S: Final = 600.0
_ABORT_GRACE_S: Final = 2.0  # for the last frames of requests that a shutdown ends early
_STOP_GRACE_S: Final = 5.0  # from SIGTERM to SIGKILL
_HURRY_GRACE_S: Final = 2.0  # from SIGTERM to SIGKILL after a second signal
_DUMP_GRACE_S: Final = 1.0  # for a stuck process to write its stacks
_CONFIG_FAULT: Final = 2  # exit code of a child whose fault is the user's and will come again


class Phase(Enum):
    STARTING = auto()
    SERVING = auto()
    DRAINING = auto()
    STOPPING = auto()


@dataclass(frozen=True, slots=True)
class Failure:
    """An unexpected end of a child that was followed by a restart."""

    at_s: float
    text: str


@dataclass(frozen=True, slots=True)
class Role:
    """One kind of process: the module that is its entry, and how many of it there are."""

    module: str
    count: int


def engine_roles(frontends: int, *, ranks: int = 1, fake_executor: bool = False) -> dict[str, Role]:
    """The processes of an engine in the order of their start; they stop in the opposite order."""
    return {
        "scheduler": Role("scheduler", 1),
        "executor": Role("executor.fake" if fake_executor else "executor", ranks),
        "frontend": Role("frontend", frontends),
    }


class Supervisor:
    """The life of one engine, from the first child to the last. `run` returns the exit code of the launcher."""

    def __init__(
        self,
        config: EngineConfig,
        plumbing: Plumbing,
        roles: Mapping[str, Role],
        *,
        shutdown_timeout_s: float,
        max_restarts: int,
        on_ready: Callable[[SchedulerReady], None],
    ) -> None:
        self._config = config
        self._plumbing = plumbing
        self._roles = dict(roles)
        self._shutdown_timeout_s = shutdown_timeout_s
        self._max_restarts = max_restarts
        self._on_ready = on_ready
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        self._control = connect_dealer(self._context, plumbing.endpoints.control, new_identity())
        self._poller = zmq.Poller()
        self._handlers: dict[object, Callable[[], None]] = {}
        self._children: dict[int, Child] = {}  # by pidfd
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._timer_ids = itertools.count()
        self._failures: dict[str, deque[Failure]] = {role: deque() for role in roles}  # of the last RESTART_WINDOW_S
        self._phase = Phase.STARTING
        self._ready: SchedulerReady | None = None  # the last one
        self._frontends_ready = 0
        self._epoch = 0  # of scheduler and executor together: a new one begins when either ends
        self._lives = dict.fromkeys(roles, 0)  # restarts so far
        self._num_blocks = 0  # of the executor that is attached; 0 while none is
        self._regrouping = False  # a rank has ended, and with it the life of all of them
        self._lost_s: dict[str, float] = {}  # when scheduler or executor ended, until the engine serves again
        self._silent_beats = 0  # of the scheduler
        self._aborting = False  # the drain has become an abort
        self._exit_code = 0
        self._last_words = ""  # printed after everything else
        self._stop_order: list[str] = []  # roles that are still to be told to stop
        self._signals, self._signals_writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def run(self) -> int:
        """Start everything, supervise until the last child is gone, and return the exit code."""
        self._watch(self._signals, self._on_signal)
        self._watch(self._plumbing.ready_bell.fd, self._on_frontend_ready)
        old_wakeup = signal.set_wakeup_fd(self._signals_writer)
        old = {number: signal.signal(number, _ignore) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
        try:
            self._greet_scheduler()
            self._after(HEARTBEAT_S, self._beat)
            for name, role in self._roles.items():
                for index in range(role.count):
                    self._spawn(name, index)
            while self._children:
                self._turn()
        finally:
            for child in self._children.values():
                child.signal(signal.SIGKILL)
                child.reap()
            signal.set_wakeup_fd(old_wakeup)
            for number, handler in old.items():
                signal.signal(number, handler)
            self._control.close()
            self._context.term()
            os.close(self._signals)
            os.close(self._signals_writer)
        if self._last_words:
            _log(self._last_words)
        return self._exit_code

    def _turn(self) -> None:
        timeout_ms = None
        if self._timers:
            timeout_ms = int(max(0.0, self._timers[0][0] - now_s()) * 1e3) + 1
        for source, _ in self._poller.poll(timeout_ms):
            handler = self._handlers.get(source)  # an earlier handler of this turn may have closed it
            if handler is not None:
                handler()
        while self._timers and self._timers[0][0] <= now_s():
            heapq.heappop(self._timers)[2]()

    def _watch(self, source: int | zmq.Socket[bytes], handler: Callable[[], None]) -> None:
        self._handlers[source] = handler
        self._poller.register(source, zmq.POLLIN)

    def _unwatch(self, source: int | zmq.Socket[bytes]) -> None:
        if self._handlers.pop(source, None) is not None:
            self._poller.unregister(source)

    def _after(self, delay_s: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._timers, (now_s() + delay_s, next(self._timer_ids), action))

    def _send(self, message: Message) -> None:
        try:
            self._control.send(encode(message), zmq.NOBLOCK)
        except zmq.Again:
            _log("the scheduler does not read its control socket")

    def _spawn(self, name: str, index: int) -> None:
        channels: msgspec.Struct
        if name == "executor":
            channels, fds = self._plumbing.executor(self._epoch, index)
        elif name == "scheduler":
            channels, fds = self._plumbing.scheduler(self._lives[name])
        else:
            channels, fds = self._plumbing.frontend(self._lives[name])
        child = Child(name, index, self._roles[name].module, self._config, channels, fds)
        self._children[child.pidfd] = child
        self._watch(child.pidfd, lambda: self._on_exit(child))
        self._watch(child.stderr, lambda: self._on_stderr(child))

    def _on_stderr(self, child: Child) -> None:
        if child.forward_stderr() == b"":
            self._unwatch(child.stderr)

    def _on_exit(self, child: Child) -> None:
        del self._children[child.pidfd]
        self._unwatch(child.pidfd)
        self._unwatch(child.stderr)
        code = child.reap()
        if self._phase is Phase.STOPPING:
            self._continue_stop()
        elif child.role == "executor" and self._regrouping:
            self._regroup()
        elif self._phase is Phase.STARTING or code == _CONFIG_FAULT or not self._may_restart(child.role):
            self._fail(child, code)
        else:
            self._restart(child, code)

    def _may_restart(self, name: str) -> bool:
        failures = self._failures[name]
        while failures and failures[0].at_s < now_s() - RESTART_WINDOW_S:
            failures.popleft()
        return len(failures) < self._max_restarts

    def _restart(self, child: Child, code: int) -> None:
        failures = self._failures[child.role]
        failures.append(Failure(now_s(), child.failure()))
        _log(f"{child.role} (pid {child.pid}) {_how(code)}; restart {len(failures)} of {self._max_restarts}")
        self._lives[child.role] += 1
        if child.role != "frontend":
            self._begin_epoch(child.role)
        if child.role == "executor":
            self._regrouping = True
            self._kill(self._of_role("executor"))
            self._regroup()
        else:
            self._spawn(child.role, child.index)

    def _regroup(self) -> None:
        """Start all ranks of an executor anew once the last one has ended: none can go on without the others."""
        if not self._of_role("executor"):
            self._regrouping = False
            for rank in range(self._roles["executor"].count):
                self._spawn("executor", rank)

    def _begin_epoch(self, lost: str) -> None:
        """Scheduler or executor ended; plans and results of this epoch mean nothing to the next one."""
        self._lost_s.setdefault(lost, now_s())
        ended, self._epoch = self._epoch, self._epoch + 1
        if lost == "executor":
            self._num_blocks = 0
            self._send(ExecutorLost(epoch=ended))
            return
        self._unwatch(self._control)
        self._control.close(linger=0)
        self._control = connect_dealer(self._context, self._plumbing.endpoints.control, new_identity())
        self._greet_scheduler()
        executors = self._of_role("executor")
        if self._num_blocks:
            # Its memory is intact, and it runs what is planned in order: the next scheduler can go on with it.
            for rank in executors:
                self._send(ExecutorHello(PROTOCOL_VERSION, self._epoch, rank.pid, self._num_blocks, rank.index))
        else:
            self._kill(executors)  # it may have said hello to the one that ended, and says it only once
        if self._phase is Phase.DRAINING:
            self._send(Drain(abort=self._aborting))

    def _greet_scheduler(self) -> None:
        self._silent_beats = 0
        self._watch(self._control, self._on_control)
        self._send(Hello(version=PROTOCOL_VERSION, role="launcher", name="launcher", pid=os.getpid()))

    def _of_role(self, name: str) -> list[Child]:
        return [child for child in self._children.values() if child.role == name]

    def _fail(self, child: Child, code: int) -> None:
        """End the engine because of this child, and see that what went wrong first is printed last."""
        failures = self._failures[child.role]
        if code == _CONFIG_FAULT:
            self._stop(_CONFIG_FAULT)  # its one line already says everything
            return
        if failures:
            first = failures[0].text
            self._last_words = f"{child.role} failed {len(failures) + 1} times, the first time with:\n{first}"
        elif TRACEBACK not in child.failure():
            self._last_words = f"{child.role} (pid {child.pid}) {_how(code)}"
        self._stop(1)

    def _on_control(self) -> None:
        control = self._control
        while not control.closed and control.poll(0):
            try:
                message = decode_launcher(control.recv())
            except ProtocolError as error:
                _log(f"not understood on the control socket: {error}")
                continue
            self._silent_beats = 0
            if isinstance(message, SchedulerReady):
                self._on_scheduler_ready(message)
            elif isinstance(message, Drained):
                if self._phase is Phase.DRAINING:
                    self._stop(0)
            elif isinstance(message, ExecutorStuck) and message.epoch == self._epoch:
                self._end_stuck(self._of_role("executor"), f"no step finished for {message.age_s:.1f} s")
            elif isinstance(message, ExecutorFaulty) and message.epoch == self._epoch:
                self._end_faulty(self._of_role("executor"), message.reason)
            elif isinstance(message, FrontendStuck):
                stuck = [child for child in self._of_role("frontend") if child.pid == message.pid]
                self._end_stuck(stuck, f"silent for {HEARTBEAT_LIMIT_S:.0f} s")

    def _on_scheduler_ready(self, message: SchedulerReady) -> None:
        if message.tcp_endpoint:  # a scheduler that is started again must be found where it was
            self._config = msgspec.structs.replace(self._config, frontend_endpoint=message.tcp_endpoint)
        if message.epoch != self._epoch:
            return  # the executor it speaks of has ended since
        self._num_blocks = message.kv_tokens // self._config.block_size + 1
        for role, lost_s in self._lost_s.items():
            _log(f"{role} restarted, epoch {message.epoch}: serving again after {now_s() - lost_s:.2f} s")
        self._lost_s.clear()
        self._ready = message
        self._announce_if_ready()

    def _on_frontend_ready(self) -> None:
        self._frontends_ready += os.eventfd_read(self._plumbing.ready_bell.fd)
        self._announce_if_ready()

    def _announce_if_ready(self) -> None:
        """Serving starts when the engine and every frontend say so."""
        enough = self._frontends_ready >= self._roles["frontend"].count
        if self._phase is Phase.STARTING and self._ready is not None and enough:
            self._phase = Phase.SERVING
            self._on_ready(self._ready)

    def _beat(self) -> None:
        """Counts beats without a word of the scheduler, not time: a launcher that was stopped blames no one."""
        self._silent_beats += 1
        silent_s = self._silent_beats * HEARTBEAT_S
        if silent_s > self._config.watchdog_timeout_s and self._phase in (Phase.SERVING, Phase.DRAINING):
            self._silent_beats = 0
            self._end_stuck(self._of_role("scheduler"), f"silent for {silent_s:.1f} s")
        self._after(HEARTBEAT_S, self._beat)

    def _end_faulty(self, faulty: list[Child], why: str) -> None:
        for child in faulty:
            _log(f"ending {child.role} (pid {child.pid}): {why}")
            child.ended_for = why
        self._kill(faulty)

    def _end_stuck(self, stuck: list[Child], why: str) -> None:
        for child in stuck:
            child.ended_for = why
            _log(f"{why}; ending {child.role} (pid {child.pid}), its stacks:")
            child.signal(signal.SIGUSR1)
            child.signal(signal.SIGCONT)  # one that was stopped shows its stacks only if it goes on
        self._after(_DUMP_GRACE_S, lambda: self._kill(stuck))

    def _kill(self, children: list[Child]) -> None:
        for child in children:
            if child.pidfd in self._children and self._children[child.pidfd] is child:
                child.signal(signal.SIGKILL)

    def _on_signal(self) -> None:
        os.read(self._signals, 64)
        if self._phase is Phase.SERVING and self._shutdown_timeout_s > 0:
            self._phase = Phase.DRAINING
            _log(f"draining: open requests have {self._shutdown_timeout_s:g} s; a second signal stops at once")
            self._send(Drain())
            self._after(self._shutdown_timeout_s, self._abort_open)
        elif self._phase is Phase.STOPPING or self._phase is Phase.DRAINING:
            self._hurry()
        else:
            self._stop(0)

    def _abort_open(self) -> None:
        if self._phase is Phase.DRAINING:
            self._aborting = True
            self._send(Drain(abort=True))
            self._after(_ABORT_GRACE_S, lambda: self._stop(0))

    def _stop(self, code: int) -> None:
        """SIGTERM role by role, frontends first so that their last bytes reach the clients."""
        if self._phase is Phase.STOPPING:
            return
        self._phase = Phase.STOPPING
        self._exit_code = code
        self._send(Drain(abort=True))  # whoever still waits for tokens is told that none will come
        self._stop_order = list(self._roles)
        self._continue_stop()

    def _continue_stop(self) -> None:
        """Tell the next role to stop once the one before is gone."""
        told = [child for child in self._children.values() if child.role not in self._stop_order]
        while not told and self._stop_order:
            name = self._stop_order.pop()
            told = self._of_role(name)
            for child in told:
                child.signal(signal.SIGTERM)
        if told:
            self._after(_STOP_GRACE_S, lambda: self._kill(told))

    def _hurry(self) -> None:
        self._stop(0)
        self._stop_order.clear()
        for child in self._children.values():
            child.signal(signal.SIGTERM)
        self._after(_HURRY_GRACE_S, lambda: self._kill(list(self._children.values())))


def _ignore(number: int, frame: object) -> None:
    """The wake-up pipe carries the signal to the loop; Python needs a handler to write there."""


def _how(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _log(text: str) -> None:
    print(f"engine-launch: {text}", file=sys.stderr, flush=True)
