"""Placing device events in host time, with events whose times the test chooses."""

from __future__ import annotations

import time
from typing import Any

from executor.timeline import DeviceClock, StepEvents

MS = 1_000_000


class At:
    """An event that happened at a given time of the device's own clock, or now."""

    def __init__(self, at_ms: float | None = None) -> None:
        self.at_ms = at_ms

    def record(self, stream: Any) -> None:
        self.at_ms = 5000.0

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: Any) -> float:
        return float(end.at_ms - self.at_ms)


def test_steps_are_chained_from_the_moment_both_clocks_saw() -> None:
    before = time.monotonic_ns()
    clock = DeviceClock(At(), None)
    origin = (before + time.monotonic_ns()) // 2
    time.sleep(0.02)  # so that the steps below lie in the past
    first = clock.place(StepEvents(At(5000.5), At(5000.6), At(5001.0), At(5003.0), At(5003.2)))
    second = clock.place(StepEvents(At(5002.0), At(5002.1), At(5003.5), At(5006.0), At(5006.25)))
    assert abs(first.compute[0] - (origin + MS)) < MS / 2
    assert first.compute[1] - first.compute[0] == 2 * MS
    assert first.compute[0] - first.h2d[0] == MS // 2
    assert second.compute[0] - first.compute[1] == MS // 2
    assert second.h2d[1] - second.h2d[0] == MS // 10  # copied in while the first step ran
    assert second.h2d[1] < first.compute[1]
    assert second.d2h == (second.compute[1], second.compute[1] + MS // 4)


def test_nothing_is_placed_after_it_was_seen() -> None:
    clock = DeviceClock(At(), None)
    spans = clock.place(StepEvents(At(5000.0), At(5000.1), At(9000.0), At(9001.0), At(9001.5)))
    assert spans.d2h[1] <= time.monotonic_ns()
    assert spans.compute[1] - spans.compute[0] == MS
