"""Counters of one scheduler life. Only the scheduler counts tokens and requests, so totals hold over any frontends."""

from __future__ import annotations

from dataclasses import dataclass, field

from ipc.frames import Result
from ipc.schema import FinishReason


@dataclass(slots=True)
class Counters:
    """Monotonic; times in nanoseconds. Field meanings are those of ipc.schema.Stats."""

    steps: int = 0
    hidden_steps: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    preemptions: int = 0
    overshoot_rows: int = 0
    requests_rejected: int = 0
    device_ns: int = 0
    bubble_ns: int = 0
    plan_ns: int = 0
    retire_ns: int = 0
    launch_ns: int = 0
    dropped_messages: int = 0
    requests_finished: dict[str, int] = field(
        default_factory=lambda: {r.name.lower(): 0 for r in FinishReason if r is not FinishReason.RUNNING}
    )

    def add_step(self, result: Result, continues: bool) -> None:
        """`continues`: work was waiting since the step before, so a gap before this step is a bubble."""
        self.steps += 1
        self.hidden_steps += result.hidden
        self.device_ns += result.device_ns
        self.bubble_ns += result.gap_ns if continues else 0
        self.launch_ns += result.launch_ns
