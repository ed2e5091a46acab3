"""The line of statistics: rates over its own period, and silence when nothing happens."""

from __future__ import annotations

from scheduler.stats_line import PERIOD_NS, StatsLine
from tests.frontend.scripted_scheduler import stats


def test_rates_are_those_of_the_period() -> None:
    line = StatsLine(0)
    assert not line.is_due(PERIOD_NS - 1)
    assert line.is_due(PERIOD_NS)
    first = stats(steps=100, generation_tokens=1000, blocks_total=10, blocks_free=5, device_ns=99, bubble_ns=1)
    assert "generation 100.0 tokens/s" in (line.make(first, PERIOD_NS) or "")
    second = stats(
        steps=300, hidden_steps=150, generation_tokens=5000, prompt_tokens=20, running=3, blocks_total=10,
        blocks_free=9, prefix_query_tokens=20, prefix_hit_tokens=5, device_ns=999, bubble_ns=101, plan_ns=2_000_000,
        retire_ns=4_000_000, launch_ns=14_000_000,
    )  # fmt: skip
    assert line.make(second, 3 * PERIOD_NS) == (
        "prompt 1.0 tokens/s, generation 200.0 tokens/s, running 3, waiting 0, KV cache 10.0 %, prefix hits 25.0 %, "
        "device idle 10.0 %, hidden steps 75.0 %, host 100 us/step"
    )
    assert line.make(second, 4 * PERIOD_NS) is None
    assert line.make(stats(waiting=1), 5 * PERIOD_NS) is not None
