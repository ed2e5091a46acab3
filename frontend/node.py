"""`engine-launch --node-rank K`: the ranks of one node of a replica whose scheduler is on another one.

Connects to the relay there (`executor/relay.py`), starts ranks when it says so, fills their plan ring with what comes
from it, and says what they have given back. When one of them ends, or the connection, all of them end, and it offers
itself anew. One thread that sleeps while nothing happens. Unlike an engine's launcher it is on the path of plans: it
copies them, and must never do more with them.
"""

from __future__ import annotations

import contextlib
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import zmq

from frontend import flags
from frontend.children import Child, executor_module
from frontend.plumbing import Elsewhere, Plumbing
from frontend.poll_loop import PollLoop
from frontend.replica import say
from ipc.auth import load_client_keys
from ipc.config import EngineConfig
from ipc.control import (
    ExecutorHello,
    NodeHello,
    PlanAck,
    PlanFrame,
    RanksLost,
    StartRanks,
    decode_control,
    decode_relay,
)
from ipc.errors import ConfigError, ProtocolError
from ipc.lifetime import fail
from ipc.ring import RingWriter
from ipc.schema import (
    HEARTBEAT_LIMIT_S,
    HEARTBEAT_S,
    PROTOCOL_VERSION,
    Decoder,
    Goodbye,
    Heartbeat,
    Message,
    Rejected,
    encode,
)
from ipc.sockets import bind_router, connect_dealer, new_identity

_SILENT_BEATS: Final = int(HEARTBEAT_LIMIT_S / HEARTBEAT_S)
_STOP_GRACE_S: Final = 5.0  # from SIGTERM to SIGKILL
_LINGER_MS: Final = 200  # for the last word
_FAULT_OF_USER: Final = 2  # exit code
_decode_config: Final = Decoder(EngineConfig)


class Session:
    """The ranks of one life: their ring and bells, and the processes themselves, until the last one is gone."""

    def __init__(self, config: EngineConfig, elsewhere: Elsewhere, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        """Raises OSError if /dev/shm cannot hold the rings."""
        self.config = config
        self._plumbing = Plumbing(config, None, elsewhere=elsewhere)
        self.lines = self._plumbing.lines[0]
        self.plans = RingWriter(self.lines.plan_ring)
        self.acked = elsewhere.head  # as the relay was told
        self.control = bind_router(context, self.lines.control)
        self.children: dict[int, Child] = {}  # by pidfd

    def spawn(self, place: int, epoch: int) -> Child:
        module = executor_module(self.config.fake_executor)
        child = Child("executor", place, module, self.config, *self.lines.executor(epoch, place))
        self.children[child.pidfd] = child
        return child

    def take(self, frame: PlanFrame) -> None:
        """Show a plan to the ranks. Raises ProtocolError if it is not the next one, or they still have its slot."""
        expected = self.plans.head + 1
        if frame.seq != expected or len(frame.payload) > self.plans.slot_bytes:
            raise ProtocolError(f"plan {frame.seq} of {len(frame.payload)} bytes, expected number {expected}")
        self.plans.begin(frame.seq)[: len(frame.payload)] = np.frombuffer(frame.payload, np.uint8)
        self.plans.publish(frame.seq)
        self.lines.plan_bells[0].ring()

    def signal(self, number: signal.Signals) -> None:
        for child in self.children.values():
            child.signal(number)

    def close(self) -> None:
        self.control.close(linger=0)
        self._plumbing.close()


class Node:
    """Sessions, one after the other. `run` returns the exit code after SIGTERM."""

    def __init__(self, options: flags.Options, config: EngineConfig) -> None:
        """`config`: what this node has itself of, its model folder and its device; the rest is the first node's."""
        host = f"[{options.master_addr}]" if ":" in str(options.master_addr) else options.master_addr
        self._endpoint = f"tcp://{host}:{options.master_port}"
        self._node = options.node_rank
        self._keys = load_client_keys(Path(config.auth_keys))
        self._own = config
        self._shutdown_timeout_s = options.shutdown_timeout
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._loop = PollLoop()
        self._socket: zmq.Socket[bytes] | None = None  # None: what runs is ending
        self._monitor: zmq.Socket[bytes]
        self._session: Session | None = None
        self._silent_beats = 0
        self._stopping = False
        self._exit_code = 0
        self._signals, self._signals_writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def run(self) -> int:
        self._loop.watch(self._signals, self._on_signal)
        signal.set_wakeup_fd(self._signals_writer)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: None)  # the wake-up pipe tells
        self._loop.after(HEARTBEAT_S, self._beat)
        say(f"node {self._node} of {self._own.nodes} offers {self._own.ranks_per_node} ranks to {self._endpoint}")
        self._connect()
        while self._session is not None or not self._stopping:
            self._loop.turn()
        self._context.destroy(linger=_LINGER_MS)
        return self._exit_code

    # -- the connection

    def _connect(self) -> None:
        """Under a new identity: a relay must never take this for the ranks it knew."""
        self._silent_beats = 0
        self._socket = connect_dealer(self._context, self._endpoint, new_identity(), self._keys)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._loop.watch(self._socket, self._on_message)
        self._loop.watch(self._monitor, lambda: self._end("the connection is lost"))
        self._offer(NodeHello(PROTOCOL_VERSION, self._node))

    def _disconnect(self) -> None:
        socket, self._socket = self._socket, None
        assert socket is not None, "connected"
        self._loop.unwatch(socket)
        self._loop.unwatch(self._monitor)
        socket.disable_monitor()
        self._monitor.close(linger=0)
        socket.close(linger=_LINGER_MS)

    def _offer(self, message: Message) -> None:
        """What cannot be sent is missed soon: the relay does not hear from us either."""
        if self._socket is not None:
            with contextlib.suppress(zmq.Again):
                self._socket.send(encode(message), zmq.NOBLOCK)

    def _beat(self) -> None:
        """Counts beats, not time: one that was stopped blames no one."""
        self._loop.after(HEARTBEAT_S, self._beat)
        if self._socket is None:
            return
        self._silent_beats += 1
        if self._silent_beats > _SILENT_BEATS:
            self._end(f"silent for {HEARTBEAT_LIMIT_S:.0f} s")
        elif self._session is not None:
            self._offer(Heartbeat(0))

    def _on_message(self) -> None:
        while self._socket is not None:
            try:
                message = decode_relay(self._socket.recv(zmq.NOBLOCK))
                self._silent_beats = 0
                self._handle(message)
            except zmq.Again:
                return
            except ProtocolError as error:
                self._lose(error.message)

    def _handle(self, message: Any) -> None:
        match message:
            case StartRanks() if self._session is None:
                self._start(message)
            case PlanFrame() if self._session is not None:
                self._session.take(message)
            case Goodbye():
                self._end("it has stopped", signal.SIGTERM)
            case Rejected(code="unavailable"):
                self._end("it does not know this node")
            case Rejected():
                self._exit_code = fail("engine-launch", ConfigError(message.message, param=message.param))
                self._stop()

    # -- ranks

    def _start(self, start: StartRanks) -> None:
        config: EngineConfig = _decode_config(start.config)
        if start.version != PROTOCOL_VERSION or config.device != self._own.device:
            wrong = f"protocol version {start.version} and device {config.device} asked for"
            self._lose(f"{wrong}, here are {PROTOCOL_VERSION} and {self._own.device}", fault_of_user=True)
            return
        config = msgspec.structs.replace(config, card=msgspec.structs.replace(config.card, path=self._own.card.path))
        try:
            session = Session(config, Elsewhere(self._node, start.head, start.store), self._context)
        except OSError as error:
            self._lose(f"/dev/shm cannot hold the rings: {error.strerror}", fault_of_user=True)
            return
        self._session = session
        self._loop.watch(session.control, partial(self._on_hello, session))
        self._loop.watch(session.lines.result_bell.fd, partial(self._on_given_back, session))
        for place in range(config.ranks_per_node):
            child = session.spawn(place, start.epoch)
            self._loop.watch(child.pidfd, partial(self._on_exit, session, child))
            self._loop.watch(child.stderr, partial(self._on_stderr, child))

    def _on_hello(self, session: Session) -> None:
        """A rank is ready: the scheduler is to know."""
        while session.control.poll(0):
            _, payload = session.control.recv_multipart()
            message = decode_control(payload)
            if isinstance(message, ExecutorHello):
                self._offer(message)

    def _on_given_back(self, session: Session) -> None:
        session.lines.result_bell.drain()
        acked = session.plans.acked
        if acked > session.acked:
            session.acked = acked
            self._offer(PlanAck(acked))

    def _on_stderr(self, child: Child) -> None:
        if child.forward_stderr() == b"":
            self._loop.unwatch(child.stderr)

    def _on_exit(self, session: Session, child: Child) -> None:
        del session.children[child.pidfd]
        self._loop.unwatch(child.pidfd)
        self._loop.unwatch(child.stderr)
        code = child.reap()
        if self._socket is not None:
            self._lose(f"a rank (pid {child.pid}) ended with code {code}", fault_of_user=code == _FAULT_OF_USER)
        else:
            self._renew()

    def _lose(self, reason: str, *, fault_of_user: bool = False) -> None:
        """Tell the relay that the ranks here cannot go on, and end them."""
        self._offer(RanksLost(reason, fault_of_user))
        self._end(reason)

    def _end(self, why: str, how: signal.Signals = signal.SIGKILL) -> None:
        """End the connection and with it all ranks; the next one begins when they are gone."""
        if self._socket is None:
            return
        self._disconnect()
        if (session := self._session) is not None:
            say(f"node {self._node} ends its ranks; {self._endpoint}: {why}")
            self._loop.unwatch(session.control)
            self._loop.unwatch(session.lines.result_bell.fd)
            session.signal(how)
            self._loop.after(_STOP_GRACE_S, lambda: session.signal(signal.SIGKILL))
        self._renew()

    def _renew(self) -> None:
        if self._session is not None and not self._session.children:
            self._session.close()
            self._session = None
        if self._session is None and not self._stopping:
            self._connect()

    def _on_signal(self) -> None:
        """The engine may have been told the same: then its open requests need these ranks until they are done."""
        os.read(self._signals, 64)
        if self._session is None or self._stopping or not self._shutdown_timeout_s:
            self._stop()
            return
        self._stopping = True
        say(f"the ranks have {self._shutdown_timeout_s:g} s, or until the engine ends; a second signal stops at once")
        self._loop.after(self._shutdown_timeout_s + _STOP_GRACE_S, self._stop)

    def _stop(self) -> None:
        self._stopping = True
        self._offer(RanksLost("it was told to stop"))
        self._end("told to stop", signal.SIGTERM)


def serve(options: flags.Options, config: EngineConfig) -> int:
    """Run this node's ranks until told to stop; returns the exit code. Raises ConfigError before."""
    return Node(options, config).run()
