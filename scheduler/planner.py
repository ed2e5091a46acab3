"""Composing a plan: which tokens of which slots run next, within one token budget. Needs no token of steps in flight.

Order within the budget: decode rows, prefill rows already running, waiting requests. A request gets the blocks of all
its known tokens when it is admitted, so only decode rows ever ask for more, one block each, and a victim is always
found: every admitted request fits the cache alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from ipc.clock import now_ns
from ipc.frames import Int32, Plan, PlanFlag
from ipc.histograms import Distribution
from scheduler.admission import forbidden_ids
from scheduler.admit_columns import NO_ADMITS, admit_columns
from scheduler.inflight import PlanRecord
from scheduler.metrics import observe_start
from scheduler.request import Request
from scheduler.slots import SlotTable
from scheduler.state import SchedulerState

_EMPTY: Final = np.empty(0, np.int32)
_NO_BLOCKS: Final = np.empty((3, 0), np.int32)
_NO_SCORES: Final = np.empty((3, 0), np.int32)
_NO_GENERATIONS: Final = np.empty(0, np.int64)
# As plain numbers: to combine flags of an enum takes a microsecond each.
_LOGPROBS, _GRAMMAR, _CONTINUES = int(PlanFlag.LOGPROBS), int(PlanFlag.GRAMMAR), int(PlanFlag.CONTINUES)
MAX_ADMITS: Final = 32  # in one plan: each costs 20 us, and a burst of them must not outlast the step in flight


@dataclass(slots=True)
class _Draft:
    """A plan in the making: what is not simply the decode rows."""

    budget: int  # tokens left
    results: int  # rows and scores left
    grammar_room: int  # rows with a grammar that may still come in
    prefill_slots: list[int] = field(default_factory=list)
    prefill_lens: list[int] = field(default_factory=list)
    block_columns: list[Int32] = field(default_factory=list)  # [3, n] each: slot, index, block
    num_blocks: int = 0
    admits: list[Request] = field(default_factory=list)
    num_bias: int = 0
    num_history: int = 0
    scores: list[tuple[int, int, int]] = field(default_factory=list)  # prefill row, first and last position + 1

    @property
    def is_full(self) -> bool:
        return self.budget == 0 or self.results < 2  # a row, and a score if it wants any

    def add_blocks(self, slot: Int32 | int, index: Int32, block: list[int]) -> None:
        column = np.empty((3, len(block)), np.int32)
        column[0], column[1], column[2] = slot, index, block
        self.block_columns.append(column)
        self.num_blocks += len(block)


def make_plan(state: SchedulerState) -> Plan | None:
    """The next plan, already entered into `state` as in flight; None if no row can run.

    Call only while fewer than `state.depth.steps` plans are in flight.
    """
    limits = state.limits
    draft = _Draft(budget=limits.max_tokens, results=limits.max_results, grammar_room=limits.max_grammar_rows)
    preemptions = state.counters.preemptions
    if (head := state.queue.head()) is not None and head.strikes and state.on_trial is None:
        _admit_suspect(state, draft, head)
        decode = _EMPTY
    else:
        decode = _decode_rows(state, draft)
        _continue_prefill(state, draft)
        if state.counters.preemptions == preemptions and state.on_trial is None:
            _admit_waiting(state, draft)
    if not len(decode) and not draft.prefill_slots:
        return None
    plan = _compose(state, draft, decode)
    _seal(state, plan)
    return plan


def _eligible(state: SchedulerState) -> Int32:
    """Slots that may have rows now: all running ones, or only the suspect's while one is on trial."""
    return state.slots.running if state.on_trial is None else np.array([state.on_trial.slot], np.int32)


def _decode_rows(state: SchedulerState, draft: _Draft) -> Int32:
    """Slots [rows] that decode one token, each with a block to write it to; preempts until all have."""
    slots, block_size = state.slots, state.limits.block_size
    while True:
        running = _eligible(state)
        computed = slots.computed[running]
        ready = computed + 1 < slots.limit[running]
        if slots.num_prefilling:
            ready &= computed >= slots.prefill_end[running]
        if slots.num_constrained:
            ready &= _may_sample(slots, running, draft.grammar_room)
        decode = running[ready][: draft.budget]
        need = decode[slots.num_blocks[decode] * block_size <= computed[ready][: draft.budget]]
        if len(need) <= state.pool.num_free:
            break
        state.preempt(_victim(state))
    if len(need):
        blocks = state.pool.allocate(len(need))
        index = slots.num_blocks[need]
        slots.block_table[need, index] = blocks
        slots.num_blocks[need] += 1
        draft.add_blocks(need, index, blocks)
    draft.budget -= len(decode)
    draft.results -= len(decode)
    if slots.num_constrained:
        draft.grammar_room -= int(np.count_nonzero(slots.constrained[decode]))
    return decode


def _may_sample(slots: SlotTable, running: Int32, grammar_room: int) -> npt.NDArray[np.bool_]:
    """Which rows [running] may sample: all without a grammar, and as many as there is room for whose mask is there."""
    runnable, constrained = slots.runnable[running], slots.constrained[running]
    return runnable & (~constrained | (np.cumsum(runnable & constrained) <= grammar_room))


def _victim(state: SchedulerState) -> Request:
    """Who gives up its blocks: of the lowest priority, the last to arrive."""
    running = [r for slot in state.slots.running.tolist() if (r := state.slots.request[slot]) is not None]
    return max(running, key=lambda request: request.order)


def _chunk(state: SchedulerState, draft: _Draft, remaining: int) -> int:
    return min(remaining, draft.budget, state.config.max_prefill_chunk or remaining)


def _add_prefill(state: SchedulerState, draft: _Draft, slot: int) -> None:
    computed, request = int(state.slots.computed[slot]), state.slots.request[slot]
    assert request is not None, f"slot {slot} prefills for no one"
    n = _chunk(state, draft, int(state.slots.prefill_end[slot]) - computed)
    draft.results -= 1
    first = max(computed, request.scored)
    last = min(computed + n, first + draft.results, request.num_scores)
    if last > first:
        n = n if last == request.num_scores else last - computed
        draft.scores.append((len(draft.prefill_slots), first, last))
        draft.results -= last - first
    draft.prefill_slots.append(slot)
    draft.prefill_lens.append(n)
    draft.budget -= n
    draft.grammar_room -= int(state.slots.constrained[slot])


def _continue_prefill(state: SchedulerState, draft: _Draft) -> None:
    slots = state.slots
    if not slots.num_prefilling:
        return
    running = _eligible(state)
    for slot in running[slots.computed[running] < slots.prefill_end[running]].tolist():
        if draft.is_full:
            break
        if draft.grammar_room or not slots.constrained[slot]:
            _add_prefill(state, draft, slot)


def _admit_waiting(state: SchedulerState, draft: _Draft) -> None:
    """Admit from the head of the queue while budget, slots, blocks and room in the frame last. No one overtakes."""
    while not draft.is_full and len(draft.admits) < MAX_ADMITS and (request := state.queue.head()) is not None:
        if not _admit(state, draft, request):
            break


def _admit(state: SchedulerState, draft: _Draft, request: Request) -> bool:
    """Admit the head of the queue; False if it must wait for a slot, for blocks or for the next frame."""
    room = state.pool.num_free - len(state.slots.running)  # each running row may soon ask for one more
    blocked, too_few = state.blocked
    if not state.slots.num_free or (request is blocked and room <= too_few):
        return False
    limits = state.limits
    hit = _find_prefix(state, request)
    total = -(-len(request.tokens) // limits.block_size)
    need = total - len(hit) + state.pool.num_free_in(hit)
    bias, history = _count_extras(state, request)
    if need > room:
        state.blocked = (request, room)
        return False
    if (
        draft.num_blocks + total > limits.max_plan_blocks
        or draft.num_bias + bias > limits.max_plan_bias
        or draft.num_history + history > limits.max_plan_history
        or (request.grammar and not draft.grammar_room)
    ):
        return False
    _place(state, draft, state.queue.pop(), hit, total)
    draft.num_bias += bias
    draft.num_history += history
    return True


def _admit_suspect(state: SchedulerState, draft: _Draft, request: Request) -> None:
    """Put a suspect on trial once nothing else is in flight; others yield the slot and the blocks it needs."""
    if state.inflight:
        return
    while not _admit(state, draft, request):
        state.preempt(_victim(state))
    state.on_trial = request


def _find_prefix(state: SchedulerState, request: Request) -> list[int]:
    """Cached blocks of the request's known tokens; at least one token is left to run, for its logits."""
    if not state.config.enable_prefix_caching:
        return []
    # What was cached would have no logits to score.
    end = request.scored if request.scored < request.num_scores else len(request.tokens) - 1
    return state.pool.find_prefix(request.chain[: end // state.limits.block_size])


def _place(state: SchedulerState, draft: _Draft, request: Request, hit: list[int], total: int) -> None:
    for block in hit:
        state.pool.share(block)
    blocks = hit + state.pool.allocate(total - len(hit))
    cached = len(hit) * state.limits.block_size
    slot = state.slots.occupy(request, blocks, cached)
    draft.admits.append(request)
    draft.add_blocks(slot, np.arange(total, dtype=np.int32), blocks)
    if not request.started_ns:
        observe_start(state.histograms, request, now_ns())
        state.counters.prefix_query_tokens += request.prompt_len
        state.counters.prefix_hit_tokens += cached
        state.started.append((request.peer, request.request_id, cached))
    _add_prefill(state, draft, slot)


def _count_extras(state: SchedulerState, request: Request) -> tuple[int, int]:
    """(bias rows, history entries at most) that admitting the request puts into the plan."""
    params = request.params
    bias = len(params.logit_bias) + len(forbidden_ids(params, state.config.card))
    return bias, len(request.tokens) if request.features & PlanFlag.PENALTY else 0


def _compose(state: SchedulerState, draft: _Draft, decode: Int32) -> Plan:
    slots = state.slots
    row_slot, query_len, sample, tokens = _rows(slots, draft, decode)
    columns = draft.block_columns
    blocks = _NO_BLOCKS if not columns else columns[0] if len(columns) == 1 else np.concatenate(columns, axis=1)
    flags = int(np.bitwise_or.reduce(slots.features[row_slot]))
    scores = _NO_SCORES
    if draft.scores:
        scores = _score_columns(state, draft, len(decode))
        flags |= _LOGPROBS
    grammar_row, masks = _EMPTY, _EMPTY
    if slots.num_constrained:
        grammar_row = np.flatnonzero(sample & slots.constrained[row_slot]).astype(np.int32)
    if len(grammar_row):
        flags |= _GRAMMAR
        slots.runnable[row_slot[grammar_row]] = False  # until the mask after the token that this step samples
        masks = _masks(state, row_slot[grammar_row])
    continues = not state.was_idle
    if continues:
        flags |= _CONTINUES
    state.seq += 1
    state.histograms.observe(Distribution.STEP_TOKENS, state.limits.max_tokens - draft.budget)
    plan = Plan(
        seq=state.seq,
        epoch=state.epoch,
        flags=PlanFlag(flags),
        num_decode=len(decode),
        row_slot=row_slot,
        row_query_len=query_len,
        row_sample=sample,
        prefill_token=tokens,
        block_slot=blocks[0],
        block_index=blocks[1],
        block_id=blocks[2],
        score_index=scores[0],
        score_token=scores[1],
        grammar_row=grammar_row,
        grammar_word=masks,
        **(admit_columns(state, draft.admits) if draft.admits else NO_ADMITS),
    )
    slots.advance(row_slot, query_len, len(decode))
    state.was_idle = False
    state.inflight.append(
        PlanRecord(
            plan.seq,
            row_slot,
            slots.generation[row_slot],
            sample.astype(np.bool_),
            wants_logprobs=bool(flags & _LOGPROBS),
            continues=continues,
            score_slot=scores[2],
            score_generation=slots.generation[scores[2]] if draft.scores else _NO_GENERATIONS,
        )
    )
    return plan


def _rows(slots: SlotTable, draft: _Draft, decode: Int32) -> tuple[Int32, Int32, Int32, Int32]:
    """Slot, query length and whether it samples of each row [rows], and the tokens of prefill rows."""
    ones = slots.ones[: len(decode)]
    if not draft.prefill_slots:
        return decode, ones, ones, _EMPTY
    prefill, lens = np.array(draft.prefill_slots, np.int32), np.array(draft.prefill_lens, np.int32)
    start = slots.computed[prefill]
    ends = start + lens == slots.prefill_end[prefill]
    chunks = [slots.tokens[s, a : a + n] for s, a, n in zip(prefill, start, lens, strict=True)]
    return (
        np.concatenate((decode, prefill)),
        np.concatenate((ones, lens)),
        np.concatenate((ones, ends.astype(np.int32))),
        np.concatenate(chunks),
    )


def _score_columns(state: SchedulerState, draft: _Draft, num_decode: int) -> Int32:
    """[3, scores]: index among the step's tokens, the prompt token that follows, slot."""
    slots, parts = state.slots, []
    row_start = num_decode + np.cumsum([0, *draft.prefill_lens])
    for row, first, last in draft.scores:
        slot = draft.prefill_slots[row]
        index = row_start[row] + np.arange(first, last) - slots.computed[slot]
        parts.append(np.stack((index, slots.tokens[slot, first + 1 : last + 1], np.full(last - first, slot))))
    return np.concatenate(parts, axis=1).astype(np.int32)


def _masks(state: SchedulerState, slot: Int32) -> Int32:
    """The masks of rows [rows], one after the other."""
    masks = [request.mask for s in slot.tolist() if (request := state.slots.request[s]) is not None]
    return np.concatenate(masks) if masks else _EMPTY


def _seal(state: SchedulerState, plan: Plan) -> None:
    """Prompt blocks that this plan fills become visible to the next one, never to itself."""
    for slot in plan.row_slot[plan.num_decode :].tolist():
        state.register_blocks(slot)
