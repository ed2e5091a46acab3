"""Counters and distributions of one scheduler life. Only the scheduler counts, so totals hold over any frontends."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from ipc.histograms import Distribution, Histograms
from ipc.results import Result
from ipc.schema import BUBBLE_NS, FinishReason
from scheduler.request import Request
from scheduler.slots import SlotTable

_S: Final = 1e-9  # of a nanosecond


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


def observe_start(histograms: Histograms, request: Request, now_ns: int) -> None:
    """A request left the queue for the first time."""
    request.started_ns = now_ns
    histograms.observe(Distribution.QUEUE_S, (now_ns - request.arrived_ns) * _S)


def observe_tokens(histograms: Histograms, slots: SlotTable, slot: npt.NDArray[np.int32], now_ns: int) -> None:
    """Each of `slot` [rows] got a token."""
    last_ns = slots.last_token_ns[slot]
    slots.last_token_ns[slot] = now_ns
    if not len(slot):
        return
    common_ns = int(last_ns[0])
    # The usual step: all had their last token in the same one.
    if common_ns and not np.count_nonzero(last_ns != common_ns):
        histograms.observe(Distribution.INTER_TOKEN_S, (now_ns - common_ns) * _S, len(slot))
        return
    later = last_ns > 0
    if not later.all():
        for index in slot[~later].tolist():
            request = slots.request[index]
            assert request is not None, f"slot {index} got a token for no one"
            request.first_token_ns = now_ns
            histograms.observe(Distribution.FIRST_TOKEN_S, (now_ns - request.arrived_ns) * _S)
            histograms.observe(Distribution.PREFILL_S, (now_ns - request.started_ns) * _S)
        last_ns = last_ns[later]
    histograms.observe_many(Distribution.INTER_TOKEN_S, (now_ns - last_ns) * _S)


def observe_end(histograms: Histograms, request: Request, now_ns: int) -> None:
    """A request came to its own end, and its tokens are back in its record."""
    generated = len(request.tokens) - request.prompt_len
    decode_s = (now_ns - request.first_token_ns) * _S
    histograms.observe(Distribution.REQUEST_S, (now_ns - request.arrived_ns) * _S)
    histograms.observe(Distribution.INFERENCE_S, (now_ns - request.started_ns) * _S)
    histograms.observe(Distribution.DECODE_S, decode_s)
    if generated > 1:
        histograms.observe(Distribution.PER_OUTPUT_TOKEN_S, decode_s / (generated - 1))
    histograms.observe(Distribution.PROMPT_TOKENS, request.prompt_len)
    histograms.observe(Distribution.GENERATION_TOKENS, generated)
    histograms.observe(Distribution.MAX_TOKENS, request.params.max_tokens)
