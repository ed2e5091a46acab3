"""Which replica a request goes to. Pure policy: no sockets, no clock, no threads.

Asked by every client for every sequence, and by the cluster simulator. Must never do work that grows with the number
of replicas: a pick is about 10 us at any size.

A request goes where it would be done first. What that costs is counted in prompt tokens that a replica has to compute
before and for it:

    cost(replica) = OPEN_TOKENS * open requests + prompt tokens in its queue - prompt tokens it has cached

Candidates are two replicas at random (power of two choices: with loads that are a little old, the best of all would
be everybody's choice at once) and two that were given a prompt with the same beginning. So affinity needs no limit of
its own: a replica that holds a prefix is preferred until its load outweighs what computing the prefix once more costs;
then another one computes it, and from then on holds it too.

Each client remembers its own prompts only. A beginning that is new to it may be old to others, so it has two homes, by
its hash, on which all clients agree without a word.
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
RING_POINTS: Final = 8  # of a replica: its share of homes is even to about a third, and load does the rest
MAX_HOLDERS: Final = 32  # replicas remembered for a prefix; one that has more is found everywhere soon


class _Replica:
    """What is known of one replica in one stay; when it joins again it is another one, with an empty cache."""

    __slots__ = ("load", "number", "place", "sent")

    def __init__(self, number: int, place: int) -> None:
        self.number = number
        self.place = place  # in the list of those that take requests; -1: it has left
        self.load = 0  # as last reported, in prompt tokens
        self.sent = 0  # to it since, likewise


_Holders = list[_Replica] | None  # None: so many that any replica may be taken for one


class Router:
    """Replicas that take requests, their loads, and which of them hold which prefixes."""

    def __init__(self, block_tokens: int = 16, *, seed: int | None = None, max_prefixes: int = MAX_PREFIXES) -> None:
        """`block_tokens`: the size of a KV block, in which prefixes are shared. `seed`: for a choice to be repeated."""
        self._block_bytes = 4 * block_tokens
        self._max_prefixes = max_prefixes
        self._random = random.Random(seed).random
        self._replicas: dict[int, _Replica] = {}
        self._taking: list[_Replica] = []
        self._prefixes: OrderedDict[bytes, _Holders] = OrderedDict()
        self._ring: list[tuple[bytes, _Replica]] = []  # by hash, anew after each change of who takes requests

    def __len__(self) -> int:
        return len(self._taking)

    def __contains__(self, number: int) -> bool:
        return number in self._replicas

    def join(self, number: int) -> None:
        """Replica `number` takes requests from now on. One that was here before has lost its cache."""
        self.leave(number)
        self._replicas[number] = replica = _Replica(number, len(self._taking))
        self._taking.append(replica)
        self._ring = []

    def leave(self, number: int) -> None:
        """It takes none any more: it drains, waits for its executor, or is gone. May be called twice."""
        replica = self._replicas.pop(number, None)
        if replica is not None:
            last = self._taking.pop()
            if last is not replica:
                self._taking[replica.place] = last
                last.place = replica.place
            replica.place = -1
            self._ring = []

    def report(self, number: int, running: int, waiting: int, queued_tokens: int) -> None:
        """What replica `number` says of itself; it includes what was sent to it before."""
        replica = self._replicas.get(number)
        if replica is not None:
            replica.load = OPEN_TOKENS * (running + waiting) + queued_tokens
            replica.sent = 0

    def load(self, number: int) -> int:
        """What replica `number` has to do, in prompt tokens, as far as is known here."""
        replica = self._replicas[number]
        return replica.load + replica.sent

    def pick(self, prompt: bytes, salt: str = "") -> int | None:
        """The replica for a request with this prompt, packed int32; it counts as sent. None if nobody takes any.

        Prompts share nothing across salts.
        """
        if not self._taking:
            return None
        keys = prefix_keys(prompt, salt, self._block_bytes)
        known = [self._prefixes.get(key, ()) for key in keys]
        home_level = max(0, len(keys) - 2)  # the second longest is a quarter to a half of the prompt
        homes = self._homes(keys[home_level]) if keys and known[home_level] == () else []
        likely = (self._block_bytes >> 2) << home_level
        best, best_cost, best_saved = self._taking[0], 1 << 62, 0
        for replica in (*homes, *self._candidates(known)):
            saved = self._saved_tokens(replica, known)
            # If it is shared at all, others have sent it there.
            cost = replica.load + replica.sent - (max(saved, likely) if replica in homes else saved)
            if cost < best_cost:
                best, best_cost, best_saved = replica, cost, saved
        best.sent += OPEN_TOKENS + max(0, len(prompt) // 4 - best_saved)
        self._remember(keys, best)
        return best.number

    def _candidates(self, known: Sequence[_Holders | tuple[()]]) -> list[_Replica]:
        """Two holders of the longest prefix that any replica here holds, and two at random."""
        found: list[_Replica] = []
        for holders in reversed(known):
            if holders:
                here = [holder for holder in holders if holder.place >= 0]
                if here:
                    found = here if len(here) <= 2 else self._two_of(here)
                    break
        return found + self._two_of(self._taking)

    def _homes(self, key: bytes) -> list[_Replica]:
        """Where a prefix is at home: the next two points on the ring. One that joins or leaves moves few homes."""
        if not self._ring:
            for replica in self._taking:
                digest = blake2b(b"%d" % replica.number, digest_size=8 * RING_POINTS).digest()
                self._ring += [(digest[i : i + 8], replica) for i in range(0, len(digest), 8)]
            self._ring.sort(key=_point)
        place = bisect(self._ring, key, key=_point)
        return [self._ring[(place + i) % len(self._ring)][1] for i in range(2)]

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
                return (self._block_bytes >> 2) << level
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


def _point(entry: tuple[bytes, _Replica]) -> bytes:
    return entry[0]


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
