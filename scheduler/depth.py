"""How many steps may be in flight. Asked before a plan is made, told of every step that retires.

Two hide the host behind a step that takes as long as the way around: result, plan, launch. Shorter steps need a third.
"""

from __future__ import annotations

from typing import Final

from ipc.config import MAX_DEPTH

_SHORT_NS: Final = 1_500_000
_LONG_NS: Final = 2_000_000  # apart from _SHORT_NS, so that steps in between change nothing
_WEIGHT: Final = 1 / 16  # of one step in the mean


class PipelineDepth:
    """`steps`: a given depth, or for 0 two and, while steps are short, three."""

    def __init__(self, depth: int) -> None:
        self._adapts = depth == 0
        self.steps = depth or 2
        self._mean_ns = float(_LONG_NS)

    def observe(self, device_ns: int) -> None:
        """A step took `device_ns` on the device."""
        if not self._adapts:
            return
        self._mean_ns += (device_ns - self._mean_ns) * _WEIGHT
        if self._mean_ns < _SHORT_NS:
            self.steps = MAX_DEPTH
        elif self._mean_ns > _LONG_NS:
            self.steps = 2
