"""One replica as its launcher sees it: the epochs of its scheduler and ranks, and the talk with its scheduler.

Used by the supervisor, which starts and ends the processes. Never on the path of a request, a plan or a token.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

import msgspec
import zmq

from frontend.plumbing import Lines
from ipc.clock import now_s
from ipc.config import EngineConfig
from ipc.control import Drain, ExecutorHello, ExecutorLost, SchedulerReady, decode_launcher
from ipc.errors import ProtocolError
from ipc.logs import news
from ipc.schema import PROTOCOL_VERSION, Hello, Member, Message, encode
from ipc.sockets import connect_dealer, new_identity


class Replica:
    """The scheduler and the ranks of one replica, by what is known of their lives."""

    def __init__(
        self,
        number: int,
        config: EngineConfig,
        lines: Lines,
        context: zmq.Context[zmq.Socket[bytes]],
        environment: Mapping[str, str],
    ) -> None:
        """`environment`: what its ranks have beside the launcher's."""
        self.number = number
        self.config = config
        self.environment = environment
        self._lines = lines
        self._context = context
        self.control: zmq.Socket[bytes]
        self.ready: SchedulerReady | None = None  # the last one
        self.regrouping = False  # a rank has ended, and with it the life of all of them
        self.drained = False
        self.given_up = False  # it failed too often; its processes are ended and not started again
        self.silent_beats = 0  # of the scheduler
        self._epoch = 0  # of scheduler and executor together: a new one begins when either ends
        self._scheduler_lives = 0
        self._num_blocks = 0  # of the executor that is attached; 0 while none is
        self._lost_s: dict[str, float] = {}  # when scheduler or executor ended, until the replica serves again

    @property
    def member(self) -> Member:
        """How clients find it."""
        remote = "" if self.ready is None else self.ready.tcp_endpoint
        return Member(self.number, self._lines.frontend, remote)

    def say(self, text: str) -> None:
        """To whoever runs the engine."""
        say(text if self.config.replica is None else f"replica {self.number}: {text}")

    def channels(self, role: str, place: int) -> tuple[msgspec.Struct, list[int]]:
        """What a new scheduler or rank inherits, or the relay, which stands after the ranks of this node."""
        if role == "executor":
            return self._lines.executor(self._epoch, place)
        return self._lines.scheduler(self._scheduler_lives, self._epoch)

    def send(self, message: Message) -> None:
        try:
            self.control.send(encode(message), zmq.NOBLOCK)
        except zmq.Again:
            self.say("the scheduler does not read its control socket")

    def greet(self) -> None:
        """Introduce the launcher to a scheduler that starts."""
        self.silent_beats = 0
        self.control = connect_dealer(self._context, self._lines.control, new_identity())
        self.send(Hello(version=PROTOCOL_VERSION, role="launcher", name="launcher", pid=os.getpid()))

    def messages(self) -> Iterator[Message]:
        """What the scheduler has said, without what it said of another epoch."""
        control = self.control
        while not control.closed and control.poll(0):
            try:
                message = decode_launcher(control.recv())
            except ProtocolError as error:
                self.say(f"not understood on the control socket: {error}")
                continue
            self.silent_beats = 0
            if isinstance(message, SchedulerReady):
                self._on_ready(message)
            if getattr(message, "epoch", self._epoch) == self._epoch:
                yield message

    def _on_ready(self, message: SchedulerReady) -> None:
        if message.tcp_endpoint:  # a scheduler that is started again must be found where it was
            self.config = msgspec.structs.replace(self.config, frontend_endpoint=message.tcp_endpoint)
        if message.epoch != self._epoch:
            return  # the executor it speaks of has ended since
        self._num_blocks = message.kv_tokens // self.config.block_size + 1
        for role, lost_s in self._lost_s.items():
            self.say(f"{role} restarted, epoch {message.epoch}: serving again after {now_s() - lost_s:.2f} s")
        self._lost_s.clear()
        self.ready = message

    def lost_executor(self) -> None:
        """Plans and results of this epoch mean nothing to the next one."""
        self._lost_s.setdefault("executor", now_s())
        self._num_blocks = 0
        self._epoch += 1
        self.send(ExecutorLost(epoch=self._epoch - 1))

    def lost_scheduler(self, drain: Drain | None) -> bool:
        """Prepare for the next scheduler; `drain` is what it must be told. False if the ranks cannot serve it."""
        self._lost_s.setdefault("scheduler", now_s())
        self._epoch += 1
        self._scheduler_lives += 1
        self.drained = False
        self.control.close(linger=0)
        self.greet()
        if self._num_blocks:
            # Their memory is intact, and they run what is planned in order: the next scheduler can go on with them.
            for rank in range(self.config.ranks):
                self.send(ExecutorHello(PROTOCOL_VERSION, self._epoch, os.getpid(), self._num_blocks, rank))
        if drain is not None:
            self.send(drain)
        return bool(self._num_blocks)


def environment_of(number: int, replicas: int, config: EngineConfig, gpus: int) -> dict[str, str]:
    """What tells the ranks of replica `number` of so many which of the devices, or of the cores, are theirs."""
    if replicas == 1:
        return {}
    if config.device == "cuda":
        shown = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = [str(index) for index in range(gpus)] if shown is None else shown.split(",")
        return {"CUDA_VISIBLE_DEVICES": ",".join(names[number * config.ranks : (number + 1) * config.ranks])}
    if "OMP_NUM_THREADS" in os.environ:
        return {}
    cores = len(os.sched_getaffinity(0))
    return {"OMP_NUM_THREADS": str(max(1, cores // (replicas * config.ranks)))}


def config_of(number: int, replicas: int, config: EngineConfig) -> EngineConfig:
    """The engine's configuration as that of one replica: with its number, and a tcp port of its own."""
    endpoint, own = config.frontend_endpoint, ""
    if endpoint:
        address, _, port = endpoint.rpartition(":")
        own = f"{address}:{int(port) + 1 + number if int(port) else 0}"  # the first one is the directory's
    return msgspec.structs.replace(config, replica=number if replicas > 1 else None, frontend_endpoint=own)


def say(text: str) -> None:
    news("engine-launch", text)
