"""Monotonic time: deadlines, heartbeats and statistics use this clock only, so a jump of the wall clock is harmless."""

from __future__ import annotations

import time


def now_ns() -> int:
    """Nanoseconds of the system-wide monotonic clock: comparable between processes of one host."""
    return time.monotonic_ns()


def now_s() -> float:
    """Seconds of the same clock."""
    return time.monotonic_ns() * 1e-9
