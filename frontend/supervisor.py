"""Starts the processes of one engine, restarts those that end, and stops all of them in order.

Run by `engine-launch`. One thread, one poll over pidfds, signals, stderr pipes, the control socket of each replica and
the directory, so it sleeps while nothing happens. Never on the path of a request, a plan or a token.
"""

from __future__ import annotations

import os
import signal
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from functools import partial
from typing import Final

from frontend.children import TRACEBACK, Child, Role
from frontend.directory import Announcement, Directory
from frontend.plumbing import Plumbing
from frontend.poll_loop import PollLoop
from frontend.replica import Replica, say
from ipc.clock import now_s
from ipc.config import EngineConfig
from ipc.control import Drain, Drained, ExecutorFaulty, ExecutorStuck, FrontendStuck, SchedulerReady
from ipc.schema import HEARTBEAT_LIMIT_S, HEARTBEAT_S, Message

RESTART_WINDOW_S: Final = 600.0
_ABORT_GRACE_S: Final = 2.0  # for the last frames of requests that a shutdown ends early
_STOP_GRACE_S: Final = 5.0  # from SIGTERM to SIGKILL
_HURRY_GRACE_S: Final = 2.0  # from SIGTERM to SIGKILL after a second signal
_DUMP_GRACE_S: Final = 1.0  # for a stuck process to write its stacks and end
_CONFIG_FAULT: Final = 2  # exit code of a child whose fault is the user's; once it has served, it may pass


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


class Supervisor:
    """The life of one engine, from the first child to the last. `run` returns the exit code of the launcher."""

    def __init__(
        self,
        config: EngineConfig,
        plumbing: Plumbing,
        replicas: Sequence[Replica],
        directory: Directory,
        roles: Mapping[str, Role],
        *,
        shutdown_timeout_s: float,
        max_restarts: int,
        on_ready: Callable[[], None],
        announcement: Announcement | None = None,
    ) -> None:
        """`announcement`: to the directory of an engine that this one is a part of."""
        self._config = config
        self._plumbing = plumbing
        self._replicas = {replica.number: replica for replica in replicas}
        self._directory = directory
        self._announcement = announcement
        self._roles = dict(roles)
        self._shutdown_timeout_s = shutdown_timeout_s
        self._max_restarts = max_restarts
        self._on_ready = on_ready
        self._loop = PollLoop()
        self._children: dict[int, Child] = {}  # by pidfd
        self._failures: defaultdict[tuple[int, str], deque[Failure]] = defaultdict(deque)  # of RESTART_WINDOW_S
        self._phase = Phase.STARTING
        self._frontends_ready = 0
        self._frontend_lives = 0  # restarts so far
        self._aborting = False  # the drain has become an abort
        self._frontends_drain = False  # they have requests at replicas of other launchers
        self._exit_code = 0
        self._last_words = ""  # printed after everything else
        self._ending: list[Child] = []  # they write their stacks and end, or else they are killed
        self._stop_order: list[str] = []  # roles that are still to be told to stop
        self._signals, self._signals_writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def run(self) -> int:
        """Start everything, supervise until the last child is gone, and return the exit code."""
        self._loop.watch(self._signals, self._on_signal)
        self._loop.watch(self._plumbing.ready_bell.fd, self._on_frontend_ready)
        old_wakeup = signal.set_wakeup_fd(self._signals_writer)
        old = {number: signal.signal(number, _ignore) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
        try:
            self._loop.after(HEARTBEAT_S, self._beat)
            for socket in self._directory.sockets:
                self._loop.watch(socket, self._directory.serve)
            for replica in self._replicas.values():
                self._greet(replica)
                self._directory.put(replica.member)
            self._start_all()
            self._announce_if_ready()  # a mere directory has nobody to wait for
            while self._children or self._phase is not Phase.STOPPING:
                self._loop.turn()
        finally:
            for child in self._children.values():
                child.signal(signal.SIGKILL)
                child.reap()
            signal.set_wakeup_fd(old_wakeup)
            for number, handler in old.items():
                signal.signal(number, handler)
            os.close(self._signals)
            os.close(self._signals_writer)
        if self._last_words:
            say(self._last_words)
        return self._exit_code

    def _start_all(self) -> None:
        for name, role in self._roles.items():
            for replica in [None] if name == "frontend" else self._replicas.values():
                for index in range(role.count):
                    self._spawn(name, index, replica)

    def _send(self, message: Message) -> None:
        for replica in self._living():
            replica.send(message)

    def _living(self) -> list[Replica]:
        return [replica for replica in self._replicas.values() if not replica.given_up]

    def _spawn(self, name: str, index: int, replica: Replica | None) -> None:
        role = self._roles[name]
        module = role.last if role.last and index == role.count - 1 else role.module
        if replica is None:
            child = Child(name, index, module, self._config, *self._plumbing.frontend(self._frontend_lives))
        else:
            channels = replica.channels(name, index)
            own = replica.environment if name == "executor" else {}
            child = Child(name, index, module, replica.config, *channels, replica=replica.number, environment=own)
        self._children[child.pidfd] = child
        self._loop.watch(child.pidfd, lambda: self._on_exit(child))
        self._loop.watch(child.stderr, lambda: self._on_stderr(child))

    def _on_stderr(self, child: Child) -> None:
        if child.forward_stderr() == b"":
            self._loop.unwatch(child.stderr)

    def _on_exit(self, child: Child) -> None:
        del self._children[child.pidfd]
        self._loop.unwatch(child.pidfd)
        self._loop.unwatch(child.stderr)
        code = child.reap()
        replica = self._replicas.get(child.replica)
        if self._phase is Phase.STOPPING:
            self._continue_stop()
        elif replica is not None and replica.given_up:
            return
        elif replica is not None and replica.regrouping and child.role == "executor":
            self._regroup(replica)
        elif self._phase is Phase.STARTING or not self._may_restart(child):
            self._fail(child, code)
        else:
            self._restart(child, replica, code)

    def _may_restart(self, child: Child) -> bool:
        failures = self._failures[child.replica, child.role]
        while failures and failures[0].at_s < now_s() - RESTART_WINDOW_S:
            failures.popleft()
        return len(failures) < self._max_restarts

    def _restart(self, child: Child, replica: Replica | None, code: int) -> None:
        failures = self._failures[child.replica, child.role]
        failures.append(Failure(now_s(), child.failure()))
        told = f"{child.role} (pid {child.pid}) {_how(code)}; restart {len(failures)} of {self._max_restarts}"
        (say if replica is None else replica.say)(told)
        if replica is None:
            self._frontend_lives += 1
            self._spawn(child.role, child.index, None)
        elif child.role == "executor":
            replica.lost_executor()
            replica.regrouping = True
            self._kill(self._of_role("executor", replica))
            self._regroup(replica)
        else:
            self._replace_scheduler(replica)

    def _regroup(self, replica: Replica) -> None:
        """Start all ranks of an executor anew once the last one has ended: none can go on without the others."""
        if not self._of_role("executor", replica):
            replica.regrouping = False
            for rank in range(self._roles["executor"].count):
                self._spawn("executor", rank, replica)

    def _replace_scheduler(self, replica: Replica) -> None:
        self._loop.unwatch(replica.control)
        drain = Drain(abort=self._aborting) if self._phase is Phase.DRAINING else None
        if not replica.lost_scheduler(drain):
            self._kill(
                self._of_role("executor", replica)
            )  # they may have said hello to the one that ended, and say it only once
        self._loop.watch(replica.control, partial(self._on_control, replica))
        self._spawn("scheduler", 0, replica)

    def _greet(self, replica: Replica) -> None:
        replica.greet()
        self._loop.watch(replica.control, partial(self._on_control, replica))

    def _of_role(self, name: str, replica: Replica | None = None) -> list[Child]:
        """The children of this role, of one replica or of all."""
        return [
            child
            for child in self._children.values()
            if child.role == name and (replica is None or child.replica == replica.number)
        ]

    def _fail(self, child: Child, code: int) -> None:
        """End the engine, or one of its replicas, because of this child; what went wrong first is printed last."""
        failures = self._failures[child.replica, child.role]
        if code == _CONFIG_FAULT and self._phase is Phase.STARTING:
            self._stop(_CONFIG_FAULT)  # its one line already says everything
            return
        words = ""
        if failures:
            words = f"{child.role} failed {len(failures) + 1} times, the first time with:\n{failures[0].text}"
        elif TRACEBACK not in child.failure():
            words = f"{child.role} (pid {child.pid}) {_how(code)}"
        replica = self._replicas.get(child.replica)
        if replica is not None and self._phase is not Phase.STARTING and len(self._living()) > 1:
            self._give_up(replica, words)
        else:
            self._last_words = words
            self._stop(1)

    def _give_up(self, replica: Replica, words: str) -> None:
        """The others go on without this one, and take over what it had."""
        replica.say(f"is given up. {words}")
        replica.given_up = True
        self._loop.unwatch(replica.control)
        self._directory.remove([replica.number])
        self._kill([child for child in self._children.values() if child.replica == replica.number])
        self._stop_if_drained()

    def _on_control(self, replica: Replica) -> None:
        for message in replica.messages():
            if isinstance(message, SchedulerReady):
                self._directory.put(replica.member)
                self._announce_if_ready()
            elif isinstance(message, Drained):
                replica.drained = True
                self._stop_if_drained()
            elif isinstance(message, ExecutorStuck):
                self._end_stuck(self._of_role("executor", replica), f"no step finished for {message.age_s:.1f} s")
            elif isinstance(message, ExecutorFaulty):
                self._end_faulty(self._of_role("executor", replica), message.reason)
            elif isinstance(message, FrontendStuck):
                stuck = [child for child in self._of_role("frontend") if child.pid == message.pid]
                self._end_stuck(stuck, f"silent for {HEARTBEAT_LIMIT_S:.0f} s")

    def _stop_if_drained(self) -> None:
        if self._phase is not Phase.DRAINING:
            return
        frontends = {child.pid for child in self._of_role("frontend")}
        open_elsewhere = self._frontends_drain and self._directory.drain(frontends)
        if not open_elsewhere and all(replica.drained for replica in self._living()):
            self._stop(0)

    def _on_frontend_ready(self) -> None:
        self._frontends_ready += os.eventfd_read(self._plumbing.ready_bell.fd)
        self._announce_if_ready()

    def _announce_if_ready(self) -> None:
        """Serving starts when the engine and every frontend say so."""
        enough = self._frontends_ready >= self._roles["frontend"].count
        if self._phase is Phase.STARTING and enough and all(replica.ready for replica in self._replicas.values()):
            self._phase = Phase.SERVING
            self._on_ready()
            self._announce()

    def _announce(self) -> None:
        if self._announcement is not None and self._phase is Phase.SERVING:
            self._announcement.say(self._directory.members)

    def _beat(self) -> None:
        """Counts beats without a word of a scheduler, not time: a launcher that was stopped blames no one."""
        self._directory.beat()
        self._announce()
        self._stop_if_drained()
        for replica in self._living():
            replica.silent_beats += 1
            silent_s = replica.silent_beats * HEARTBEAT_S
            if silent_s > self._config.watchdog_timeout_s and self._phase in (Phase.SERVING, Phase.DRAINING):
                replica.silent_beats = 0
                self._end_stuck(self._of_role("scheduler", replica), f"silent for {silent_s:.1f} s")
        self._loop.after(HEARTBEAT_S, self._beat)

    def _end_faulty(self, faulty: list[Child], why: str) -> None:
        for child in faulty:
            say(f"ending {child.role} (pid {child.pid}): {why}")
            child.ended_for = why
        self._kill(faulty)

    def _end_stuck(self, stuck: list[Child], why: str) -> None:
        stuck = [child for child in stuck if child not in self._ending]  # each replica tells of a frontend
        self._ending.extend(stuck)
        for child in stuck:
            child.ended_for = why
            say(f"{why}; ending {child.role} (pid {child.pid}), its stacks:")
            child.signal(signal.SIGUSR2)
            child.signal(signal.SIGCONT)  # one that was stopped ends of that before it does anything else
        self._loop.after(_DUMP_GRACE_S, lambda: self._kill(stuck))

    def _kill(self, children: list[Child]) -> None:
        for child in children:
            if child in self._ending:
                self._ending.remove(child)
            if child.pidfd in self._children and self._children[child.pidfd] is child:
                child.signal(signal.SIGKILL)

    def _on_signal(self) -> None:
        os.read(self._signals, 64)
        if self._phase is Phase.SERVING and self._shutdown_timeout_s > 0:
            self._phase = Phase.DRAINING
            say(f"draining: open requests have {self._shutdown_timeout_s:g} s; a second signal stops at once")
            if self._announcement is not None:
                self._announcement.leave()
            self._send(Drain())
            self._frontends_drain = self._directory.has_joined
            self._loop.after(self._shutdown_timeout_s, self._abort_open)
            self._stop_if_drained()
        elif self._phase is Phase.STOPPING or self._phase is Phase.DRAINING:
            self._hurry()
        else:
            self._stop(0)

    def _abort_open(self) -> None:
        if self._phase is Phase.DRAINING:
            self._aborting = True
            self._send(Drain(abort=True))
            self._loop.after(_ABORT_GRACE_S, lambda: self._stop(0))

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
            self._loop.after(_STOP_GRACE_S, lambda: self._kill(told))

    def _hurry(self) -> None:
        self._stop(0)
        self._stop_order.clear()
        for child in self._children.values():
            child.signal(signal.SIGTERM)
        self._loop.after(_HURRY_GRACE_S, lambda: self._kill(list(self._children.values())))


def _ignore(number: int, frame: object) -> None:
    """The wake-up pipe carries the signal to the loop; Python needs a handler to write there."""


def _how(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
