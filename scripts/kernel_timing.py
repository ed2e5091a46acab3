"""Device time of small work, for the kernel benches: a graph of many calls, replayed; medians.

On CUDA the calls are captured into one graph, so that no launch from Python is in the time; each call uses other
buffers than the one before, and together they exceed the L2 cache. On the CPU the same calls run eagerly, which shows
only that the bench works.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch

Call = Callable[[], object]
L2_BYTES: Final = 50 << 20  # H100 and H200
ROTATED_BYTES: Final = 4 * L2_BYTES
MIN_CALLS: Final = 8  # in a graph: the graph's own launch is then a small part
MAX_COPIES: Final = 64
REPLAYS: Final = 15


@dataclass(frozen=True)
class Measured:
    """Microseconds of one call, and what it may not be faster than."""

    group: str
    name: str
    kernel: str
    us: float
    limit_us: float

    @property
    def of_limit(self) -> float:
        return self.limit_us / self.us


def copies_needed(bytes_per_call: float) -> int:
    """How many sets of buffers to rotate, so that a set has left the cache when its turn comes again."""
    return max(1, min(MAX_COPIES, -(-ROTATED_BYTES // max(1, int(bytes_per_call)))))


def time_us(calls: Sequence[Call], device: torch.device, replays: int = REPLAYS) -> float:
    """Median microseconds of a call. Each of `calls` must be capturable; all are run at least once before."""
    rounds = -(-MIN_CALLS // len(calls))
    if device.type != "cuda":
        return _time_eagerly_us(calls, replays)
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        for call in calls:  # compiles, and loads what is loaded lazily
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(rounds):
            for call in calls:
                call()
    times = []
    with torch.cuda.stream(stream):
        for i in range(replays + 3):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record(stream)
            graph.replay()
            end.record(stream)
            end.synchronize()
            if i >= 3:
                times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times) / (rounds * len(calls))


def _time_eagerly_us(calls: Sequence[Call], replays: int) -> float:
    times = []
    for i in range(replays + 1):
        start = time.perf_counter()
        for call in calls:
            call()
        if i:
            times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times) / len(calls)
