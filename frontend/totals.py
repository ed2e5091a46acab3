"""What several replicas say of themselves, as one engine would. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from ipc.schema import Invariants, Stats

# The others are counts, and add up.
_MOST: Final = {"epoch", "step_age_ns", "longest_bubble_ns", "longest_step_ns", "frontends"}


def total_stats(parts: Sequence[Stats]) -> Stats:
    """Of at least one replica: sums, and the most of what has no sum; it drains if all do."""
    if len(parts) == 1:
        return parts[0]
    tables = [np.frombuffer(part.histograms) for part in parts if part.histograms]
    special: dict[str, Any] = {
        "requests_finished": dict(sum((Counter(part.requests_finished) for part in parts), Counter())),
        "draining": all(part.draining for part in parts),
        "peers": [peer for part in parts for peer in part.peers],
        "histograms": np.sum(tables, axis=0).tobytes() if tables else b"",
    }
    return Stats(**special, **_added(parts, special))


def total_invariants(parts: Mapping[int, Invariants]) -> Invariants:
    """Of at least one replica, by number: sums, and every violation with the number of its replica."""
    violations = [f"engine {number}: {text}" for number, part in parts.items() for text in part.violations]
    return Invariants(violations=violations, **_added(list(parts.values()), {"violations": violations}))


def _added(parts: Sequence[Stats] | Sequence[Invariants], special: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: (max if name in _MOST else sum)(getattr(part, name) for part in parts)
        for name in parts[0].__struct_fields__
        if name not in special
    }
