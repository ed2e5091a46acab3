"""The frontends connected to this scheduler: who they are, how long they have been silent, what they are still owed."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from ipc.schema import Message, PeerStats
from scheduler.outbox import Outbox


@dataclass(slots=True)
class Peer:
    """One frontend connection. `identity` routes replies, so no other frontend can receive or abort its requests."""

    index: int
    identity: bytes
    name: str
    pid: int
    silent_beats: int = 0  # since it was last heard: a scheduler that stood still counts none
    sent_tokens: int = 0
    rests_until_ns: int = 0  # before then no frame is put together for it: its socket was full
    outbox: Outbox = field(default_factory=Outbox)
    notices: deque[Message] = field(default_factory=deque)  # found its socket full; in order, before its rows


class PeerTable:
    """Frontends by ZMQ identity and by the small index that slots carry. An index is never reused."""

    def __init__(self) -> None:
        self._by_identity: dict[bytes, Peer] = {}
        self._by_index: dict[int, Peer] = {}
        self._next_index = 0

    def __len__(self) -> int:
        return len(self._by_index)

    def __iter__(self) -> Iterator[Peer]:
        return iter(list(self._by_index.values()))

    def add(self, identity: bytes, name: str, pid: int) -> Peer:
        """A new frontend, or the same one saying Hello again, which keeps its index and its requests."""
        peer = self._by_identity.get(identity)
        if peer is None:
            peer = Peer(self._next_index, identity, name, pid)
            self._next_index += 1
            self._by_identity[identity] = self._by_index[peer.index] = peer
        return peer

    def find(self, identity: bytes) -> Peer | None:
        return self._by_identity.get(identity)

    def get(self, index: int) -> Peer | None:
        return self._by_index.get(index)

    def remove(self, peer: Peer) -> None:
        del self._by_identity[peer.identity], self._by_index[peer.index]

    def stats(self, open_requests: Counter[int]) -> list[PeerStats]:
        """Of each peer; `open_requests` by the index of a peer."""
        return [
            PeerStats(peer.name, peer.pid, open_requests[peer.index], peer.sent_tokens, peer.outbox.backlog)
            for peer in self
        ]
