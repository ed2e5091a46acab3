"""The relay: stands for the ranks of a replica that are on other nodes. They get its plans from here, over tcp.

Entry `python -P -m executor.relay --start-fd N`, started by the launcher like one more rank. To the scheduler it is one
more reader of the plan ring, which gives a plan back when every rank elsewhere has. It sends each node what to start
(`frontend/node.py` is the other end), and passes on their hellos. It ends when the ranks of a node do, or a node is
silent or new: then the launcher starts all ranks and the relay anew, as it does for a rank of its own. Must never look
into a plan, and imports no torch.
"""

from __future__ import annotations

import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import zmq

import executor
from ipc.auth import REPLICA_KEYS, Gatekeeper, name_of_key
from ipc.clock import now_s
from ipc.config import EngineConfig, RelayChannels
from ipc.control import ExecutorHello, NodeHello, PlanAck, PlanFrame, RanksLost, StartRanks, decode_node
from ipc.doorbell import Doorbell
from ipc.errors import ProtocolError, TandemError
from ipc.frames import PlanWord
from ipc.lifetime import run_child
from ipc.logs import news
from ipc.ring import RingReader
from ipc.schema import HEARTBEAT_LIMIT_S, HEARTBEAT_S, PROTOCOL_VERSION, Goodbye, Heartbeat, Message, Rejected, encode
from ipc.sockets import connect_dealer, make_router, new_identity, send_to

ROLE: Final = RelayChannels.name
_SILENT_BEATS: Final = int(HEARTBEAT_LIMIT_S / HEARTBEAT_S)
_PATIENCE_S: Final = 15.0  # then it says whom it is waiting for
_AWAITED_S: Final = 120.0  # for nodes that were there before; after as many restarts as it has, the engine ends
_GOODBYE_MS: Final = 200


class NodeLostError(TandemError):
    """The ranks of a node are gone, and with them the life of all."""

    def __init__(self, message: str, *, fault_of_user: bool = False) -> None:
        super().__init__(message)
        self.fault_of_user = fault_of_user


@dataclass(slots=True)
class _Node:
    """One that said hello."""

    number: int
    acked: int = 0  # plans that all of its ranks have given back
    silent_beats: int = 0


class Relay:
    """One life of it. `run` returns after SIGTERM, and raises NodeLostError when the ranks elsewhere cannot go on."""

    def __init__(self, config: EngineConfig, channels: RelayChannels) -> None:
        self._config, self._channels = config, channels
        self._plans = RingReader(channels.plan_ring, channels.place)
        self._acked = self._plans.head
        self._plan_bell, self._result_bell = Doorbell(channels.plan_bell), Doorbell(channels.result_bell)
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._router = make_router(context)
        self._router.setsockopt(zmq.USE_FD, channels.listener)  # which the launcher keeps for the next life
        self._gatekeeper = Gatekeeper(context, Path(config.auth_keys))
        self._gatekeeper.bind(self._router, config.nodes_endpoint)
        self._control = connect_dealer(context, channels.control, new_identity())
        self._nodes: dict[bytes, _Node] = {}
        self._started = False
        self._began_s = self._told_s = now_s()
        self._beat_s = self._began_s + HEARTBEAT_S
        self._stopping = False
        self._stop_bell = Doorbell.create()
        self._poller = zmq.Poller()
        for source in (self._plan_bell.fd, self._stop_bell.fd, self._router, self._gatekeeper.socket):
            self._poller.register(source, zmq.POLLIN)

    def stop(self, *_: object) -> None:
        """From a signal handler."""
        self._stopping = True
        self._stop_bell.ring()

    def run(self) -> None:
        while not self._stopping:
            self._poller.poll(int(max(0.0, self._beat_s - now_s()) * 1e3) + 1)
            self._plan_bell.drain()
            self._gatekeeper.answer()
            self._send_plans()
            self._take_messages()
            if now_s() >= self._beat_s:
                self._beat()
        for identity in list(self._nodes):
            self._send(identity, Goodbye())
        self._router.close(linger=_GOODBYE_MS)

    # -- plans

    def _send_plans(self) -> None:
        """Those of an earlier epoch are given back unread, as a rank does."""
        while (payload := self._plans.poll()) is not None:
            words = payload[: 8 * PlanWord.OFFSETS].view("i8")
            seq = self._plans.next
            if words[PlanWord.EPOCH] < self._channels.epoch:
                self._plans.ack(seq)
                for node in self._nodes.values():
                    node.acked = seq
            else:
                frame = PlanFrame(seq, payload[: words[PlanWord.TOTAL_BYTES]].tobytes())
                self._plans.check(seq)
                for identity in list(self._nodes):
                    self._send(identity, frame)
            self._plans.advance()

    def _give_back(self) -> None:
        """Plans that no rank elsewhere needs any more; a scheduler that waits for their slots is woken."""
        before, acked = self._acked, min(node.acked for node in self._nodes.values())
        if acked > before:
            self._acked = acked
            self._plans.ack(acked)
            if self._plans.head - before >= self._plans.slots - 1:
                self._result_bell.ring()

    # -- nodes

    def _take_messages(self) -> None:
        while True:
            try:
                identity, *parts = self._router.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            if len(parts) != 1 or not (name_of_key(parts[0]) or "").startswith(REPLICA_KEYS):
                continue  # a listed client, but not one that may read what users say
            try:
                self._handle(identity.bytes, decode_node(parts[0].buffer))
            except ProtocolError as error:
                news(ROLE, f"message dropped: {error}")

    def _handle(self, identity: bytes, message: Any) -> None:
        if isinstance(message, NodeHello):
            self._welcome(identity, message)
            return
        node = self._nodes.get(identity)
        if node is None:
            self._send(identity, Rejected(-1, "unavailable", f"{type(message).__name__} before NodeHello"))
            return
        node.silent_beats = 0
        match message:
            case ExecutorHello():
                if message.rank // self._config.ranks_per_node != node.number:
                    raise ProtocolError(f"rank {message.rank} says hello from node {node.number}")
                self._control.send(encode(message))
            case PlanAck():
                if not node.acked <= message.seq < self._plans.next:
                    raise ProtocolError(f"node {node.number} gives back plan {message.seq} of {self._plans.next - 1}")
                node.acked = message.seq
                self._give_back()
            case RanksLost():
                raise NodeLostError(f"node {node.number}: {message.reason}", fault_of_user=message.fault_of_user)

    def _welcome(self, identity: bytes, hello: NodeHello) -> None:
        """Once all nodes are there, all start."""
        nodes = self._config.nodes
        if hello.version != PROTOCOL_VERSION:
            text = f"protocol version {hello.version}, expected {PROTOCOL_VERSION}"
            self._send(identity, Rejected(-1, "protocol_error", text))
            return
        if not 0 < hello.node < nodes:
            self._send(identity, Rejected(-1, "invalid_config", f"node {hello.node} of {nodes}", "--node-rank"))
            return
        before = [key for key, node in self._nodes.items() if node.number == hello.node]
        if before and self._started:
            raise NodeLostError(f"node {hello.node} came back: its ranks have ended")
        for key in before:
            del self._nodes[key]
        self._nodes[identity] = _Node(hello.node, self._plans.head)
        if len(self._nodes) == nodes - 1:
            self._start()

    def _start(self) -> None:
        self._started = True
        self._plans.skip()  # nothing is planned for this epoch before all ranks are there
        self._acked = self._plans.head
        config, channels = msgspec.msgpack.encode(self._config), self._channels
        start = StartRanks(PROTOCOL_VERSION, config, channels.epoch, self._acked, channels.store)
        for identity, node in list(self._nodes.items()):
            node.acked = self._acked
            self._send(identity, start)

    def _beat(self) -> None:
        """Counts beats, not time: one that was stopped blames no one."""
        now = now_s()
        self._beat_s = now + HEARTBEAT_S
        for identity, node in list(self._nodes.items()):
            node.silent_beats += 1
            if node.silent_beats > _SILENT_BEATS:
                raise NodeLostError(f"node {node.number} is silent for {HEARTBEAT_LIMIT_S:.0f} s")
            self._send(identity, Heartbeat(0))
        if self._started:
            return
        missing = sorted(set(range(1, self._config.nodes)) - {node.number for node in self._nodes.values()})
        if self._channels.epoch and now - self._began_s > _AWAITED_S:
            raise NodeLostError(f"no word of node {missing} for {_AWAITED_S:.0f} s")
        if now - self._told_s > _PATIENCE_S:
            self._told_s = now
            news(ROLE, f"waiting for node {', '.join(map(str, missing))} at {self._config.nodes_endpoint}")

    def _send(self, identity: bytes, message: Message) -> None:
        """A node that does not take it is lost."""
        if send_to(self._router, identity, message):
            return
        node = self._nodes.pop(identity, None)
        if node is not None and self._started and not self._stopping:
            raise NodeLostError(f"the connection with node {node.number} is lost")


def run(config: EngineConfig, channels: RelayChannels) -> int:
    """Relay until SIGTERM; returns the exit code."""
    relay = Relay(config, channels)
    signal.signal(signal.SIGTERM, relay.stop)
    try:
        relay.run()
    except NodeLostError as error:
        news(ROLE, error.message, error=True)
        return 2 if error.fault_of_user else 1
    return 0


if __name__ == "__main__":
    sys.exit(run_child(executor, RelayChannels, run))
