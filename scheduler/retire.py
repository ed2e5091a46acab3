"""Applying a result: append tokens, end requests, free what they held, and say what each frontend is to be told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from ipc.clock import now_ns
from ipc.errors import ProtocolError
from ipc.frames import INVALID_TOKEN
from ipc.results import Result
from ipc.schema import FinishReason
from scheduler.inflight import PlanRecord
from scheduler.metrics import observe_tokens
from scheduler.state import SchedulerState

_NO_SCORES: Final = np.empty(0, np.int32), np.empty(0, np.int64), np.empty(0, np.int64)
# As numpy takes them at once, which of an enum it does not.
_RUNNING, _STOP, _LENGTH, _INVALID_LOGITS = (
    np.uint8(reason)
    for reason in (FinishReason.RUNNING, FinishReason.STOP, FinishReason.LENGTH, FinishReason.INVALID_LOGITS)
)


@dataclass(slots=True)  # frozen, it would take 2 us more to make
class Delivery:
    """Rows for frontends, in the order of the plan. Rows of ended requests carry their finish reason."""

    peer: npt.NDArray[np.int32]  # [rows]
    request_id: npt.NDArray[np.int64]  # [rows]
    token: npt.NDArray[np.int32]  # [rows]
    finish: npt.NDArray[np.uint8]  # [rows], FinishReason
    num_logprobs: npt.NDArray[np.int32]  # [rows], as the request asked: -1 = none
    result_row: npt.NDArray[np.int64]  # [rows], index into the result's columns
    # [scores], each prompt's in order
    score_peer: npt.NDArray[np.int32]
    score_request_id: npt.NDArray[np.int64]
    score_result_row: npt.NDArray[np.int64]


def retire(state: SchedulerState, result: Result) -> Delivery:
    """Apply the result of the oldest plan in flight. Rows whose slot has changed hands since are dropped.

    Raises ProtocolError, and changes nothing, for a result that cannot be that of the plan.
    """
    all_valid = _check(state, result)
    record = state.inflight.popleft()
    slots = state.slots
    alive = record.sample & (slots.generation[record.slots] == record.generation)
    rows = alive.nonzero()[0]
    slot, token = record.slots[rows], result.token[rows]
    finish = _append(state, slot, token, all_valid)
    if slots.num_constrained:
        _want_masks(state, slot[finish == _RUNNING])
    observe_tokens(state.histograms, slots, slot, now_ns())
    score_peer, score_request_id, score_result_row = _score(state, record) if len(record.score_slot) else _NO_SCORES
    delivery = Delivery(
        peer=slots.peer[slot],
        request_id=slots.request_id[slot],
        token=token,
        finish=finish,
        num_logprobs=slots.num_logprobs[slot],
        result_row=rows,
        score_peer=score_peer,
        score_request_id=score_request_id,
        score_result_row=score_result_row,
    )
    for i in finish.nonzero()[0].tolist():
        request = slots.request[int(slot[i])]
        assert request is not None
        state.complete(request, FinishReason(int(finish[i])))
    state.end_trial()
    state.depth.observe(result.device_ns)
    state.counters.add_step(result, continues=record.continues)
    state.counters.generation_tokens += len(rows) if all_valid else int(np.count_nonzero(finish != _INVALID_LOGITS))
    state.counters.overshoot_rows += int(np.count_nonzero(record.sample)) - len(rows)
    state.was_idle = not state.has_work
    return delivery


def _check(state: SchedulerState, result: Result) -> bool:
    """Another process wrote it; of what a step may answer, only the choice of tokens is free.

    Returns whether every row has a token.
    """
    if not state.inflight or state.inflight[0].seq != result.seq:
        expected = state.inflight[0].seq if state.inflight else None
        raise ProtocolError(f"result of plan {result.seq} arrived, expected that of {expected}")
    record = state.inflight[0]
    num_rows = len(record.slots) + len(record.score_slot)
    if len(result.token) != num_rows:
        raise ProtocolError(f"result of {len(result.token)} rows and scores, plan {record.seq} has {num_rows}")
    if record.wants_logprobs and result.logprob is None:
        raise ProtocolError(f"result without log-probabilities, plan {record.seq} asks for them")
    if result.top_token is not None and result.top_token.size:
        _check_tokens("top_token", result.top_token.reshape(-1), state.config.card.vocab_size)
    return _check_tokens("token", result.token, state.config.card.vocab_size) > INVALID_TOKEN


def _check_tokens(name: str, token: npt.NDArray[np.int32], vocab_size: int) -> int:
    """The least of `token` [n], n > 0; raises ProtocolError if one is outside the vocabulary."""
    low, high = int(np.minimum.reduce(token)), int(np.maximum.reduce(token))
    if low < INVALID_TOKEN or high >= vocab_size:
        raise ProtocolError(f"{name} from {low} to {high}, the vocabulary has {vocab_size}")
    return low


def _score(
    state: SchedulerState, record: PlanRecord
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Frontend, request and index into the result's columns of each score [scores] whose slot still has its owner."""
    slots = state.slots
    alive = np.flatnonzero(slots.generation[record.score_slot] == record.score_generation)
    scored = record.score_slot[alive]
    for slot, count in zip(*np.unique(scored, return_counts=True), strict=True):
        request = slots.request[int(slot)]
        assert request is not None, f"slot {slot} was scored for no one"
        request.scored += int(count)
    return slots.peer[scored], slots.request_id[scored], alive + len(record.slots)


def _want_masks(state: SchedulerState, slot: npt.NDArray[np.int32]) -> None:
    """Rows [rows] with a grammar go on once the mask of their next token is there."""
    for s in slot[state.slots.constrained[slot]].tolist():
        request = state.slots.request[s]
        assert request is not None
        request.mask = None
        state.masks_wanted.append((request, [int(state.slots.tokens[s, state.slots.known[s] - 1])]))


def _append(
    state: SchedulerState, slot: npt.NDArray[np.int32], token: npt.NDArray[np.int32], all_valid: bool
) -> npt.NDArray[np.uint8]:
    """Append `token` [rows] to `slot` [rows]; returns the finish reason of each row."""
    slots = state.slots
    known = slots.known[slot]
    finish = np.zeros(len(slot), np.uint8)
    finish[known + 1 >= slots.limit[slot]] = _LENGTH
    if all_valid:
        slots.tokens[slot, known] = token
        slots.known[slot] = known + 1
    else:
        valid = token >= 0
        slots.tokens[slot[valid], known[valid]] = token[valid]
        slots.known[slot] = known + valid
        finish[~valid] = _INVALID_LOGITS
    ends = state.is_eos(token).nonzero()[0]
    if len(ends):
        finish[ends[slots.eos_stops[slot[ends]]]] = _STOP
    if slots.num_with_stop_ids:
        for i in slots.has_stop_ids[slot].nonzero()[0].tolist():
            request = slots.request[int(slot[i])]
            assert request is not None
            if int(token[i]) in request.stop_ids:
                finish[i] = _STOP
    return finish
