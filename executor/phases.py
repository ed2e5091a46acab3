"""How long each part of the executor's start took: the table in its log. Used by the process before it serves."""

from __future__ import annotations

from ipc.clock import now_s
from ipc.logs import news


class Phases:
    """Phases end one after the other; the first began at `started_s`."""

    def __init__(self, started_s: float) -> None:
        self._started_s = self._last_s = started_s
        self._rows: list[tuple[str, float, float]] = []  # name, seconds, seconds since the start

    def end(self, phase: str) -> None:
        now = now_s()
        self._rows.append((phase, now - self._last_s, now - self._started_s))
        self._last_s = now

    def report(self, description: str) -> None:
        """The table on stderr, then one line that says what is ready."""
        lines = [f"start-up {'seconds':>17} {'total':>7}"]
        lines += [f"  {name:14} {taken:9.1f} {total:7.1f}" for name, taken, total in self._rows]
        lines.append(f"{description}; ready in {self._last_s - self._started_s:.1f} s")
        for line in lines:
            news("executor", line)
