"""Which replica a request goes to. Pure policy: no sockets, no clock, no threads.

Asked by every client for every sequence, and by the cluster simulator. Must never do work that grows with the number
of replicas: a pick takes 15 us with 4 and 18 with 1024.

A request goes where it would be done first. What that costs is counted in prompt tokens that a replica has to compute
before and for it:

    cost(replica) = OPEN_TOKENS * open requests + prompt tokens in its queue - prompt tokens it has cached

Candidates are those that were given such a prompt from here, and a home. Each client remembers its own prompts only, so
without more each would have a beginning computed where it likes. Therefore a beginning has homes: a row of replicas
that follows from its hash, the same for all clients without a word. The candidate is the less busy of the first two, or
of the next two if a replica at random would be done with the whole prompt before these begin, and so on: what many ask
for lives in more places, and everybody knows which. Two, because with loads that are a little old the best of all would
be everybody's choice at once. So affinity needs no limit of its own: it yields when the load outweighs what it saves.
"""

from __future__ import annotations

import random
from bisect import bisect
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b
from typing import Final

OPEN_TOKENS: Final = 128  # half or twice as many change little (scripts/bench_routing.py); more spread prefixes thin
MAX_LEVELS: Final = 10  # prefixes of 1, 2, 4 .. 512 blocks are told apart
MAX_PREFIXES: Final = 1 << 16  # remembered; the least recently used goes first
MAX_HOMES: Final = 32  # of a beginning; who finds all of them busy takes a replica at random
RING_POINTS: Final = 8  # of a replica: its share of homes is even to about a third, and load does the rest
_NEXT_HOME: Final = 0x9E3779B97F4A7C15  # from point to point of a beginning's homes: they spread evenly over the ring
_RING: Final = 1 << 64  # points on it
MAX_HOLDERS: Final = 32  # replicas remembered for a prefix; one that has more is found everywhere soon


class _Replica:
    """What is known of one replica in one stay; when it joins again it is another one, with an empty cache."""

    __slots__ = ("load", "number", "place", "sent")

    def __init__(self, number: int, place: int) -> None:
        self.number = number
        self.place = place  # in the list of those that take requests; -1: it has left
        self.load = 0  # as last reported, in prompt tokens
        self.sent = 0  # to it since, likewise

    @property
    def due(self) -> int:
        return self.load + self.sent


_Holders = list[_Replica] | None  # None: so many that any replica may be taken for one


class Router:
    """Replicas that take requests, their loads, and which of them hold which prefixes."""

    def __init__(self, block_tokens: int = 16, *, seed: int | None = None, max_prefixes: int = MAX_PREFIXES) -> None:
        """`block_tokens`: the size of a KV block, in which prefixes are shared. `seed`: for a choice to be repeated."""
        self._block_tokens = block_tokens
        self._max_prefixes = max_prefixes
        self._random = random.Random(seed).random
        self._replicas: dict[int, _Replica] = {}
        self._taking: list[_Replica] = []
        self._prefixes: OrderedDict[bytes, _Holders] = OrderedDict()
        self._points: list[int] = []  # of all that take requests, ascending
        self._ring: list[_Replica] = []  # whose each point is

    def __len__(self) -> int:
        return len(self._taking)

    def __contains__(self, number: int) -> bool:
        return number in self._replicas

    def join(self, number: int) -> None:
        """Replica `number` takes requests from now on. One that was here before has lost its cache."""
        self.leave(number)
        self._replicas[number] = replica = _Replica(number, len(self._taking))
        self._taking.append(replica)
        for point in _points_of(number):
            place = bisect(self._points, point)
            self._points.insert(place, point)
            self._ring.insert(place, replica)

    def leave(self, number: int) -> None:
        """It takes none any more: it drains, waits for its executor, or is gone. May be called twice."""
        replica = self._replicas.pop(number, None)
        if replica is not None:
            last = self._taking.pop()
            if last is not replica:
                self._taking[replica.place] = last
                last.place = replica.place
            replica.place = -1
            for point in _points_of(number):
                place = bisect(self._points, point) - 1
                del self._points[place], self._ring[place]

    def report(self, number: int, running: int, waiting: int, queued_tokens: int) -> None:
        """What replica `number` says of itself; it includes what was sent to it before."""
        replica = self._replicas.get(number)
        if replica is not None:
            replica.load = OPEN_TOKENS * (running + waiting) + queued_tokens
            replica.sent = 0

    def load(self, number: int) -> int:
        """What replica `number` has to do, in prompt tokens, as far as is known here."""
        return self._replicas[number].due

    def pick(self, prompt: bytes, salt: str = "") -> int | None:
        """The replica for a request with this prompt, packed int32; it counts as sent. None if nobody takes any.

        Prompts share nothing across salts.
        """
        if not self._taking:
            return None
        keys = prefix_keys(prompt, salt, 4 * self._block_tokens)
        known = [self._prefixes.get(key, ()) for key in keys]
        best = self._home(keys) if keys else self._less_busy(self._taking)
        best_saved = self._saved_tokens(best, known)
        best_cost = best.due - best_saved
        for holder in self._holders(known):
            saved = self._saved_tokens(holder, known)
            if holder.due - saved <= best_cost:
                best, best_cost, best_saved = holder, holder.due - saved, saved
        best.sent += OPEN_TOKENS + max(0, len(prompt) // 4 - best_saved)
        self._remember(keys, best)
        return best.number

    def _home(self, keys: Sequence[bytes]) -> _Replica:
        """Where a prompt goes of which nothing is known here. It has the homes of its second longest key, a quarter to
        half of it; if others have begun so, it is taken to share most of the rest with them."""
        elsewhere = self._less_busy(self._taking)
        limit = elsewhere.due + (self._block_tokens << (len(keys) - 1))
        point = int.from_bytes(keys[max(0, len(keys) - 2)])
        for _ in range(MAX_HOMES // 2):
            one, other = self._at(point), self._at(point + _NEXT_HOME)
            home = one if one.due <= other.due else other
            if home.due <= limit:
                return home
            point += 2 * _NEXT_HOME
        return elsewhere

    def _at(self, point: int) -> _Replica:
        return self._ring[bisect(self._points, point % _RING) % len(self._ring)]

    def _holders(self, known: Sequence[_Holders | tuple[()]]) -> Sequence[_Replica]:
        """Two of those that hold the longest prefix that any replica here holds."""
        for holders in reversed(known):
            if holders:
                here = [holder for holder in holders if holder.place >= 0]
                if here:
                    return here if len(here) <= 2 else self._two_of(here)
        return ()

    def _less_busy(self, replicas: Sequence[_Replica]) -> _Replica:
        """Of two at random."""
        one, other = self._two_of(replicas)
        return one if one.due <= other.due else other

    def _two_of(self, replicas: Sequence[_Replica]) -> list[_Replica]:
        count = len(replicas)
        first = int(self._random() * count)
        second = int(self._random() * (count - 1))  # of the others
        return [replicas[first], replicas[second + (second >= first) if count > 1 else 0]]

    def _saved_tokens(self, replica: _Replica, known: Sequence[_Holders | tuple[()]]) -> int:
        """Prompt tokens that this replica holds, as far as is remembered: at least half of them."""
        for level in range(len(known) - 1, -1, -1):
            holders = known[level]
            if holders is None or replica in holders:
                return self._block_tokens << level
        return 0

    def _remember(self, keys: Sequence[bytes], replica: _Replica) -> None:
        prefixes = self._prefixes
        for key in keys:
            holders = prefixes.setdefault(key, [])
            prefixes.move_to_end(key)
            if holders is None or replica in holders:
                continue
            if len(holders) >= MAX_HOLDERS:
                holders[:] = [holder for holder in holders if holder.place >= 0]
            if len(holders) < MAX_HOLDERS:
                holders.append(replica)
            else:
                prefixes[key] = None
        while len(prefixes) > self._max_prefixes:
            prefixes.popitem(last=False)


def _points_of(number: int) -> list[int]:
    """Where a replica is on the ring: one that joins or leaves moves few homes."""
    digest = blake2b(b"%d" % number, digest_size=8 * RING_POINTS).digest()
    return [int.from_bytes(digest[i : i + 8]) for i in range(0, len(digest), 8)]


def prefix_keys(prompt: bytes, salt: str, block_bytes: int) -> list[bytes]:
    """Hashes of the first 1, 2, 4 .. blocks of a prompt, at most MAX_LEVELS, within one tenant's salt."""
    keys: list[bytes] = []
    if len(prompt) < block_bytes:
        return keys
    secret = blake2b(salt.encode("utf-8", "surrogatepass"), digest_size=16).digest() if salt else b""
    hasher = blake2b(digest_size=8, key=secret)
    start, end = 0, block_bytes
    while end <= len(prompt) and len(keys) < MAX_LEVELS:
        hasher.update(prompt[start:end])
        keys.append(hasher.digest())
        start, end = end, 2 * end
    return keys
