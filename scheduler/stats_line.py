"""The line of statistics that the scheduler logs every ten seconds of work: what an operator looks at first."""

from __future__ import annotations

from typing import Final

from ipc.schema import Stats

PERIOD_NS: Final = 10_000_000_000
_NS_OF_S: Final = 1_000_000_000


class StatsLine:
    """Compares Stats with those of the line before. Counts nothing itself."""

    def __init__(self, now_ns: int) -> None:
        self._last: Stats | None = None
        self._last_ns = now_ns

    def is_due(self, now_ns: int) -> bool:
        return now_ns - self._last_ns >= PERIOD_NS

    def make(self, stats: Stats, now_ns: int) -> str | None:
        """The line for the time since the last call; None if no step ran and nothing waits."""
        last, seconds = self._last, (now_ns - self._last_ns) / _NS_OF_S
        self._last, self._last_ns = stats, now_ns

        def since(name: str) -> int:
            return int(getattr(stats, name)) - (0 if last is None else int(getattr(last, name)))

        steps = since("steps")
        if not steps and not stats.waiting:
            return None
        host_ns = since("plan_ns") + since("retire_ns") + since("launch_ns")
        return (
            f"prompt {since('prompt_tokens') / seconds:.1f} tokens/s, "
            f"generation {since('generation_tokens') / seconds:.1f} tokens/s, "
            f"running {stats.running}, waiting {stats.waiting}, "
            f"KV cache {_percent(stats.blocks_total - stats.blocks_free, stats.blocks_total)}, "
            f"prefix hits {_percent(since('prefix_hit_tokens'), since('prefix_query_tokens'))}, "
            f"device idle {_percent(since('bubble_ns'), since('bubble_ns') + since('device_ns'))}, "
            f"hidden steps {_percent(since('hidden_steps'), steps)}, host {host_ns / 1000 / max(steps, 1):.0f} us/step"
        )


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"
