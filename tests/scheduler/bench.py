"""The scheduler's loop with real sockets and rings, turned by hand, and peers that talk to it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import zmq

from ipc.config import RING_SLOTS, SchedulerChannels
from ipc.control import ExecutorHello, ExecutorLost, SchedulerReady, decode_launcher
from ipc.doorbell import Doorbell
from ipc.frames import Bytes, PlanFlag, read_plan
from ipc.results import write_result_header
from ipc.ring import RingReader, RingWriter, create_ring
from ipc.schema import (
    PROTOCOL_VERSION,
    Admit,
    GetStats,
    Hello,
    Message,
    SamplingParams,
    Stats,
    Tokens,
    Welcome,
    decode_scheduler,
    encode,
    pack_tokens,
)
from ipc.sockets import connect_dealer, new_identity
from scheduler.loop import Loop
from tests.scheduler.pipeline import tiny_config

LIMIT_MS = 20_000


class Peer:
    """One end of a real DEALER; `turn` lets the loop work until something arrives."""

    def __init__(self, bench: Bench, endpoint: str, decode: Any, identity: bytes | None = None) -> None:
        self.bench, self.decode = bench, decode
        self.inbox: list[Any] = []
        self.socket = connect_dealer(bench.context, endpoint, identity or new_identity())

    def send(self, *messages: Message | bytes) -> None:
        for message in messages:
            self.socket.send(message if isinstance(message, bytes) else encode(message))

    def receive(self, kind: type[Any]) -> Any:
        """The next message of this type; those of other types stay for later."""
        for _ in range(LIMIT_MS):
            for i, message in enumerate(self.inbox):
                if isinstance(message, kind):
                    return self.inbox.pop(i)
            self.bench.turn()
            if self.socket.poll(1):
                self.inbox.append(self.decode(self.socket.recv()))
        raise AssertionError(f"no {kind.__name__} arrived, but {self.inbox}")

    def stats(self) -> Stats:
        """What the scheduler counts once it has planned for everything sent before."""
        for _ in range(2):
            self.send(GetStats())
            stats: Stats = self.receive(Stats)
        return stats


class Bench:
    """A Loop, and in place of the executor one that answers each plan with token 5."""

    def __init__(self, folder: Path, **changes: object) -> None:
        self.config = tiny_config(**changes)
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self.plan_ring = plan_ring = create_ring(RING_SLOTS, self.config.limits.plan_bytes, self.config.ranks)
        self.result_ring = result_ring = create_ring(RING_SLOTS, self.config.result_layout.nbytes)
        self.frontend, self.control = (f"ipc://{folder}/{name}" for name in ("frontend", "control"))
        channels = SchedulerChannels(
            plan_ring=plan_ring,
            plan_bell=Doorbell.create().fd,
            result_ring=result_ring,
            result_bell=Doorbell.create().fd,
            frontend=self.frontend,
            control=self.control,
            parent_pipe=-1,
            epoch=1,
        )
        self.channels = channels
        self.loop = Loop(self.config, channels)
        self.plans, self.results = RingReader(plan_ring), RingWriter(result_ring)
        self.answering = True
        self.times: dict[str, int] = {}  # of every result's header
        self.damage: Callable[[RingWriter, int, Bytes], None] | None = None  # done once, to a result about to be shown
        self.greet()

    def greet(self) -> None:
        self.launcher = Peer(self, self.control, decode_launcher)
        self.launcher.send(Hello(PROTOCOL_VERSION, "launcher", "launcher", 1))

    def replace_scheduler(self) -> None:
        """The scheduler dies between two steps, and the launcher starts another one on the same rings."""
        self.close()
        epoch = self.loop.state.epoch + 1
        self.loop = Loop(self.config, msgspec.structs.replace(self.channels, life=self.channels.life + 1, epoch=epoch))
        self.greet()

    def attach(self, epoch: int = 1) -> None:
        self.launcher.send(ExecutorHello(PROTOCOL_VERSION, epoch, 2, 17))
        while self.launcher.receive(SchedulerReady).epoch != epoch:
            pass  # a new launcher is told of the last one first

    def replace_executor(self, epoch: int) -> None:
        """The launcher has ended it and started another one on the same rings."""
        self.plans, self.results = RingReader(self.plan_ring), RingWriter(self.result_ring)
        self.launcher.send(ExecutorLost(epoch - 1))
        self.attach(epoch)

    def frontend_peer(self) -> Peer:
        peer = Peer(self, self.frontend, decode_scheduler)
        peer.send(Hello(PROTOCOL_VERSION, "frontend", "test", 3))
        assert peer.receive(Welcome).ready
        return peer

    def turn(self) -> None:
        """One round of the loop, with the executor's answers in between."""
        loop = self.loop
        loop.take_results()
        loop.exchange_masks()
        loop.plan_ahead()
        loop.deliver()
        loop.take_messages()
        loop.exchange_masks()
        loop.plan_ahead()
        loop.keep_house()
        while self.answering and (payload := self.plans.poll()) is not None:
            plan = read_plan(payload)
            self.plans.advance()
            seq = self.results.head + 1
            result = self.results.begin(seq)
            result[:] = 0
            layout = self.config.result_layout
            rows, has_logprobs = plan.num_rows + len(plan.score_token), bool(plan.flags & PlanFlag.LOGPROBS)
            result[layout.token : layout.token + 4 * rows].view("i4")[:] = 5
            numbers = {"seq": plan.seq, "epoch": plan.epoch, "num_rows": rows, **self.times}
            write_result_header(result, **numbers, has_logprobs=has_logprobs)
            self.plans.ack(plan.seq)
            self.results.publish(seq)
            if self.damage is not None:
                self.damage(self.results, seq, result)
                self.damage = None

    def close(self) -> None:
        self.loop.mail.socket.close()
        self.loop.control.socket.close()


def admit(request_id: int, max_tokens: int = 3) -> Admit:
    return Admit(request_id, pack_tokens([1, 2]), SamplingParams(max_tokens=max_tokens, temperature=0.0))


def rows(frames: list[Tokens]) -> list[tuple[int, int, int]]:
    def column(name: str, dtype: str) -> list[int]:
        return [int(x) for f in frames for x in np.frombuffer(getattr(f, name), dtype)]

    return list(zip(column("request_id", "i8"), column("token", "i4"), column("finish", "u1"), strict=True))


def receive_rows(peer: Peer, count: int) -> list[tuple[int, int, int]]:
    frames: list[Tokens] = []
    while len(rows(frames)) < count:
        frames.append(peer.receive(Tokens))
    return rows(frames)
