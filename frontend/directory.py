"""The directory of an engine: who its replicas are, told to every client, at every change.

One ROUTER in the launcher's poll loop. Clients say Hello and get Members; launchers of replicas elsewhere say Join,
once a heartbeat. Never on the path of a request: while it is away, clients go on with the list they have.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec
import zmq

from ipc.auth import REPLICA_KEYS, ClientKeys, Gatekeeper, name_of_key
from ipc.errors import ProtocolError
from ipc.schema import (
    HEARTBEAT_LIMIT_S,
    HEARTBEAT_S,
    PROTOCOL_VERSION,
    Draining,
    Goodbye,
    Heartbeat,
    Hello,
    Join,
    Member,
    Members,
    Message,
    Rejected,
    decode_directory,
    encode,
)
from ipc.sockets import bind_router, connect_dealer, new_identity, send_to

_SILENT_BEATS: Final = math.ceil(HEARTBEAT_LIMIT_S / HEARTBEAT_S)  # then a peer is taken for gone
_MESSAGES_PER_TURN: Final = 100


@dataclass(slots=True)
class _Peer:
    """A client, or the launcher of the members in `numbers`."""

    pid: int
    left: int = -1  # open sequences, if it was told to drain
    silent_beats: int = 0
    numbers: list[int] = field(default_factory=list)


class Directory:
    """Members by number, and the peers that are told. Poll `sockets` and call `serve`; `beat` once a heartbeat."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str, *, remote: str = "", auth_keys: str = ""
    ) -> None:
        """`remote`: tcp://HOST:PORT for other hosts. Raises ConfigError if it cannot be bound."""
        self._router = bind_router(context, endpoint)
        self._gatekeeper = Gatekeeper(context, Path(auth_keys)) if remote else None
        self.remote = "" if self._gatekeeper is None else self._gatekeeper.bind(self._router, remote)
        self._members: dict[int, Member] = {}
        self._own: set[str] = set()  # endpoints of those that this launcher vouches for
        self._peers: dict[bytes, _Peer] = {}
        self._next_number = 0

    @property
    def sockets(self) -> Iterator[zmq.Socket[bytes]]:
        yield self._router
        if self._gatekeeper is not None:
            yield self._gatekeeper.socket

    @property
    def members(self) -> list[Member]:
        return list(self._members.values())

    @property
    def has_joined(self) -> bool:
        """There are replicas of other launchers."""
        return any(member.endpoint not in self._own for member in self._members.values())

    def drain(self, pids: Collection[int]) -> bool:
        """Have the clients of these processes take no more; whether they still wait for something. Ask again later."""
        clients = {identity: peer for identity, peer in self._peers.items() if peer.pid in pids}
        for identity in clients:
            self._send(identity, Draining())
        return any(peer.left for peer in clients.values())

    def close(self) -> None:
        for socket in self.sockets:
            socket.close(linger=0)

    def put(self, member: Member) -> None:
        """This replica of the same launcher is there, at these endpoints."""
        self._own.add(member.endpoint)
        self._put(member)

    def _put(self, member: Member) -> None:
        self._next_number = max(self._next_number, member.number + 1)
        if self._members.get(member.number) != member:
            self._members[member.number] = member
            self._tell_all()

    def remove(self, numbers: list[int]) -> None:
        """These replicas have left."""
        gone = [self._members.pop(number, None) for number in numbers]
        if any(gone):
            self._tell_all()

    def serve(self) -> None:
        """Handle what has come, as much as one turn of the loop may take."""
        if self._gatekeeper is not None:
            self._gatekeeper.answer()
        for _ in range(_MESSAGES_PER_TURN):
            try:
                identity, *parts = self._router.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            try:
                if len(parts) == 1:
                    self._handle(identity.bytes, decode_directory(parts[0].buffer), may_join=_may_join(parts[0]))
            except ProtocolError:
                continue  # anybody may send anything here; it concerns nobody else

    def beat(self) -> None:
        """Forget who has been silent. Counts beats, not time: a launcher that was stopped blames no one."""
        for identity, peer in list(self._peers.items()):
            peer.silent_beats += 1
            if peer.silent_beats > _SILENT_BEATS:
                self._forget(identity)

    def _handle(self, identity: bytes, message: Any, *, may_join: bool) -> None:
        if isinstance(message, Hello | Join) and message.version != PROTOCOL_VERSION:
            text = f"protocol version {message.version}, expected {PROTOCOL_VERSION}"
            self._send(identity, Rejected(-1, "protocol_error", text))
            return
        if isinstance(message, Hello | Join):
            self._peers.setdefault(identity, _Peer(message.pid))
        peer = self._peers.get(identity)
        if peer is None:
            if isinstance(message, Heartbeat):
                self._send(identity, Rejected(-1, "unavailable", "Heartbeat before Hello"))
            return
        peer.silent_beats = 0
        if isinstance(message, Goodbye):
            self._forget(identity)
            return
        if isinstance(message, Heartbeat):
            peer.left = message.left
        if isinstance(message, Join) and may_join:
            self._join(peer, message.members)
        self._send(identity, Members(PROTOCOL_VERSION, self.members))

    def _join(self, peer: _Peer, members: list[Member]) -> None:
        """Take members under numbers of ours: those they had, if they are known already."""
        known = {member.endpoint: member.number for member in self._members.values()}
        mine = []
        for member in members:
            if member.endpoint in self._own:
                continue
            number = known.get(member.endpoint, self._next_number)
            mine.append(number)
            self._put(msgspec.structs.replace(member, number=number))
        gone = [number for number in peer.numbers if number not in mine]
        for other in self._peers.values():  # it may have come back with another connection
            other.numbers = [number for number in other.numbers if number not in mine]
        peer.numbers = mine
        self.remove(gone)

    def _forget(self, identity: bytes) -> None:
        self.remove(self._peers.pop(identity).numbers)

    def _tell_all(self) -> None:
        message = Members(PROTOCOL_VERSION, self.members)
        for identity in list(self._peers):
            self._send(identity, message)

    def _send(self, identity: bytes, message: Message) -> None:
        """What a peer does not take now it gets with its next heartbeat, and one that is gone is silent from now on."""
        send_to(self._router, identity, message)


def _may_join(part: zmq.Frame) -> bool:
    """Whoever reaches the private endpoint may; of other hosts only who has a key that is listed as a replica's."""
    name = name_of_key(part)
    return name is None or name.startswith(REPLICA_KEYS)


class Announcement:
    """Tells the directory of another launcher, once a heartbeat, that replicas of this one serve there too."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], directory: str, keys: ClientKeys | None) -> None:
        self._socket = connect_dealer(context, directory, new_identity(), keys)

    def say(self, members: list[Member]) -> None:
        self._offer(Join(PROTOCOL_VERSION, os.getpid(), members))
        while self._socket.poll(0):
            self._socket.recv()  # who the other members are is for clients to know

    def leave(self) -> None:
        self._offer(Goodbye())

    def close(self) -> None:
        self._socket.close(linger=200)

    def _offer(self, message: Message) -> None:
        try:
            self._socket.send(encode(message), zmq.NOBLOCK)
        except zmq.Again:
            return  # nobody is there to read it; the next heartbeat says it again
