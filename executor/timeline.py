"""When each stream worked on a step, in host time: what the step trace shows of a device.

Made by `Lanes` only when tracing is on; used on its retire thread. Device events know only the time between two of
them, so times are chained from the end of the step before, starting at one moment that host and device both saw.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol


class TimedEvent(Protocol):
    def record(self, stream: Any) -> None: ...
    def synchronize(self) -> None: ...
    def elapsed_time(self, end: Any) -> float: ...  # milliseconds from this event to `end`


class DeviceSpans(NamedTuple):
    """(start, end) on each stream, nanoseconds of the host's monotonic clock."""

    h2d: tuple[int, int]
    compute: tuple[int, int]
    d2h: tuple[int, int]


@dataclass(frozen=True, slots=True)
class StepEvents:
    """Timed events of one step."""

    h2d_start: TimedEvent
    h2d_end: TimedEvent
    start: TimedEvent
    end: TimedEvent
    d2h_end: TimedEvent


class DeviceClock:
    """Places the events of successive steps in host time."""

    def __init__(self, now: TimedEvent, stream: Any) -> None:
        now.record(stream)
        now.synchronize()
        self._last, self._last_ns = now, time.monotonic_ns()

    def place(self, events: StepEvents) -> DeviceSpans:
        """Call once a step, in order, when all its events are complete."""
        start = self._last_ns + _between_ns(self._last, events.start)
        end = start + _between_ns(events.start, events.end)
        stored = end + _between_ns(events.end, events.d2h_end)
        # The chain's rounding errors add up; what the host has seen complete is in the past.
        late = max(0, stored - time.monotonic_ns())
        self._last, self._last_ns = events.end, end - late
        loading = start - _between_ns(events.h2d_start, events.start)
        loaded = start - _between_ns(events.h2d_end, events.start)
        return DeviceSpans((loading - late, loaded - late), (start - late, end - late), (end - late, stored - late))


def _between_ns(start: TimedEvent, end: TimedEvent) -> int:
    return round(start.elapsed_time(end) * 1e6)
