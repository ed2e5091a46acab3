"""How many replicas and frontends a cluster should have, by what waits. Pure policy: no Ray, no clock.

Asked by the cluster launcher once a beat. Grows at once, since a queue is time that users lose; shrinks by one only
after a long calm, since a replica takes its cache along. Must never know where anything runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

CALM_BEATS: Final = 120  # so many beats in a row could have been served by one less
WAITING_PER_REPLICA: Final = 8  # requests; beyond, another replica would have run them
OPEN_PER_FRONTEND: Final = 400  # sequences; their tokens take about half of a core (docs/cluster.md)
_SPARE: Final = 0.7  # what is left after shrinking must be no fuller than this


@dataclass(frozen=True, slots=True)
class Load:
    """Of the whole engine, now."""

    running: int
    waiting: int


class Scale:
    """The number of one kind of part, between two bounds."""

    def __init__(self, low: int, high: int) -> None:
        self._low, self._high = low, high
        self._calm = 0

    def replicas(self, have: int, load: Load, max_num_seqs: int) -> int:
        """How many replicas there should be; `max_num_seqs`: requests that one runs at a time."""
        needed = have + math.ceil(load.waiting / WAITING_PER_REPLICA) - 1 if load.waiting else 0
        return self._decide(have, needed, load.waiting == 0 and load.running < _SPARE * max_num_seqs * (have - 1))

    def frontends(self, have: int, load: Load) -> int:
        """How many frontends there should be."""
        opened = load.running + load.waiting
        return self._decide(
            have, math.ceil(opened / OPEN_PER_FRONTEND), opened < _SPARE * OPEN_PER_FRONTEND * (have - 1)
        )

    def _decide(self, have: int, needed: int, calm: bool) -> int:
        self._calm = self._calm + 1 if calm else 0
        if needed > have:
            return max(min(needed, self._high, 2 * have), self._low)  # doubling: a burst may be over before all serve
        if self._calm >= CALM_BEATS and have > self._low:
            self._calm = 0
            return have - 1
        return max(have, self._low)
