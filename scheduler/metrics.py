"""Counters of one scheduler life. Only the scheduler counts tokens and requests, so totals hold over any frontends."""

from __future__ import annotations

from dataclasses import dataclass, field

from ipc.frames import Result
from ipc.schema import BUBBLE_NS, FinishReason


@dataclass(slots=True)
class Counters:
    """Monotonic but for `longest_*`; times in nanoseconds. Field meanings are those of ipc.schema.Stats."""

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
    bubbles: int = 0
    longest_bubble_ns: int = 0
    longest_step_ns: int = 0
    compilations: int = 0
    requests_finished: dict[str, int] = field(
        default_factory=lambda: {r.name.lower(): 0 for r in FinishReason if r is not FinishReason.RUNNING}
    )

    def add_step(self, result: Result, continues: bool) -> None:
        """`continues`: work was waiting since the step before, so a gap before this step is a bubble."""
        self.steps += 1
        self.hidden_steps += result.hidden
        self.device_ns += result.device_ns
        self.launch_ns += result.launch_ns
        self.compilations += result.compilations
        self.longest_step_ns = max(self.longest_step_ns, result.device_ns)
        if continues:
            self.bubble_ns += result.gap_ns
            self.bubbles += result.gap_ns > BUBBLE_NS
            self.longest_bubble_ns = max(self.longest_bubble_ns, result.gap_ns)

    def restart_longest(self) -> None:
        self.longest_bubble_ns = self.longest_step_ns = 0
