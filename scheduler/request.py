"""The cold record of one request: what does not change every step. The hot columns are in slots.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ipc.frames import PlanFlag
from ipc.schema import SamplingParams

# A request runs before one that came up to this many arrivals earlier and whose priority value is higher by 1. So a
# request of priority p is overtaken by at most this many times p - q later ones of priority q, whatever the load.
ARRIVALS_PER_PRIORITY: Final = 1000


class State(Enum):
    PREPARING = auto()  # waits for the mask of its next token, outside the queue: nobody waits behind it
    WAITING = auto()  # in the queue, new or preempted; `tokens` is all there is
    RUNNING = auto()  # owns a slot; the slot's row of tokens is the truth
    DONE = auto()


@dataclass(slots=True, eq=False)
class Request:
    """One sequence from Admit to its terminal frame."""

    peer: int  # index of the frontend that owns it
    request_id: int
    arrival: int  # order of arrival, kept over preemptions
    prompt_len: int
    limit: int  # prompt + max_tokens
    params: SamplingParams
    priority: int
    root: bytes  # hash chain root of its tenant
    tokens: npt.NDArray[np.int32]  # [known], prompt and output; current only while WAITING
    features: PlanFlag
    stop_ids: frozenset[int]  # beyond the model's own end of sequence
    grammar: str = ""  # what its output must match; empty: anything
    matcher: Any = None  # of the grammar worker, which alone touches it; it has seen every known output token
    mask: npt.NDArray[np.int32] | None = None  # [mask words]: what the next token may be; None: not known yet
    chain: list[bytes] = field(default_factory=list)  # hashes of its full blocks so far
    scored: int = 0  # leading prompt positions whose scores were delivered
    state: State = State.WAITING
    slot: int = -1
    arrived_ns: int = 0
    started_ns: int = 0  # when it left the queue, which its frontend then knows; 0: not yet
    first_token_ns: int = 0  # 0: no token yet
    last_token_ns: int = 0  # current only while WAITING
    strikes: int = 0  # executor crashes in a row that happened in a step of it; above 0 it is a suspect
    alone_until: int = 0  # a suspect is acquitted once it has this many tokens

    @property
    def num_scores(self) -> int:
        """Prompt positions to score in all: the last one's successor is sampled."""
        return self.prompt_len - 1 if self.params.prompt_logprobs >= 0 else 0

    @property
    def awaits_mask(self) -> bool:
        return bool(self.grammar) and self.mask is None

    @property
    def order(self) -> tuple[bool, int, int]:
        """Who runs first: suspects; then by arrival, of which priority is worth a number, so that no one starves."""
        return not self.strikes, self.priority * ARRIVALS_PER_PRIORITY + self.arrival, self.arrival


def features_of(params: SamplingParams) -> PlanFlag:
    """The sampling stages this request needs."""
    flags = PlanFlag.NONE
    if params.temperature > 0:
        flags |= PlanFlag.SAMPLE
        if params.top_k > 0 or params.top_p < 1 or params.min_p > 0:
            flags |= PlanFlag.FILTER
    if params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0:
        flags |= PlanFlag.PENALTY
    if params.logit_bias or params.min_tokens > 0:
        flags |= PlanFlag.BIAS
    if params.logprobs >= 0:
        flags |= PlanFlag.LOGPROBS
    return flags
