"""Plans to model inputs: the tensors of a step against plain loops over the plan and a dictionary of slots."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from executor.inputs import (
    PlanHeader,
    StagedPlan,
    StepInputs,
    apply_slots,
    apply_tables,
    build_inputs,
)
from executor.slot_state import SlotState
from executor.warmup import full_step_plan, synthetic_plan, warmup_plans
from ipc.frames import FrameLimits, Param, Plan, PlanFlag, write_plan

LIMITS = FrameLimits(max_rows=12, max_tokens=128, max_seq_len=100, block_size=4, max_logprobs=2)


def stage(plan: Plan) -> StagedPlan:
    payload = np.full(LIMITS.plan_bytes, 0xA5, np.uint8)
    used = write_plan(payload, plan)
    return StagedPlan(PlanHeader.read(payload), torch.from_numpy(payload[:used].copy()))


class RecordingSampler:
    """Keeps what it was given, in order."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[Any]]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *columns: self.calls.append((name, [column.tolist() for column in columns]))


def int32(*values: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.array(values, np.int32)


def random_state(rng: np.random.Generator) -> SlotState:
    state = SlotState(LIMITS, torch.device("cpu"))
    state.last_token.copy_(torch.from_numpy(rng.integers(0, 500, len(state.position))))
    state.position[:-1] = torch.from_numpy(rng.integers(0, 60, LIMITS.max_rows))
    state.block_table.copy_(torch.from_numpy(rng.integers(1, 99, state.block_table.shape)))
    return state


def random_plan(rng: np.random.Generator, num_decode: int, num_prefill: int) -> Plan:
    lens = [1] * num_decode + rng.integers(1, 9, num_prefill).tolist()
    plan = synthetic_plan(lens, num_decode, PlanFlag.NONE)
    plan.row_slot = rng.permutation(LIMITS.max_rows)[: len(lens)].astype(np.int32)
    plan.row_sample = rng.integers(0, 2, len(lens)).astype(np.int32)
    plan.prefill_token = rng.integers(0, 500, len(plan.prefill_token)).astype(np.int32)
    return plan


def expected_inputs(plan: Plan, state: SlotState) -> dict[str, list[int]]:
    """The definition, one token at a time."""
    want: dict[str, list[int]] = {
        name: [] for name in ("token_ids", "positions", "slot_mapping", "kv_len", "last_index")
    }
    want["query_start"] = [0]
    prefill = iter(plan.prefill_token.tolist())
    for row, (slot, length) in enumerate(zip(plan.row_slot.tolist(), plan.row_query_len.tolist(), strict=True)):
        start = int(state.position[slot])
        for position in range(start, start + length):
            want["token_ids"].append(int(state.last_token[slot]) if row < plan.num_decode else next(prefill))
            want["positions"].append(position)
            block = int(state.block_table[slot, position // LIMITS.block_size])
            want["slot_mapping"].append(block * LIMITS.block_size + position % LIMITS.block_size)
        want["kv_len"].append(start + length)
        want["query_start"].append(len(want["token_ids"]))
        want["last_index"].append(len(want["token_ids"]) - 1)
    return want


def check(inputs: StepInputs, want: dict[str, list[int]]) -> None:
    for name, values in want.items():
        assert getattr(inputs, name).tolist() == values, name
    for name in ("token_ids", "positions", "slot_mapping", "row_slot", "last_index"):
        assert getattr(inputs, name).dtype == torch.int64, name
    for name in ("query_start", "kv_len", "block_table"):
        assert getattr(inputs, name).dtype == torch.int32, name


@pytest.mark.parametrize(("num_decode", "num_prefill"), [(1, 0), (12, 0), (0, 1), (0, 5), (1, 1), (7, 5), (3, 9)])
def test_inputs_match_the_definition(num_decode: int, num_prefill: int) -> None:
    rng = np.random.default_rng(10 * num_decode + num_prefill)
    for _ in range(20):
        state = random_state(rng)
        plan = random_plan(rng, num_decode, num_prefill)
        want = expected_inputs(plan, state)
        positions = state.position.clone()
        inputs = build_inputs(stage(plan), state)
        check(inputs, want)
        assert inputs.row_slot.tolist() == plan.row_slot.tolist()
        assert (inputs.num_rows, inputs.num_decode) == (plan.num_rows, plan.num_decode)
        assert (inputs.num_prefill, inputs.num_tokens) == (num_prefill, plan.num_tokens)
        assert inputs.counts.tolist() == [plan.num_rows, plan.num_decode]
        positions[torch.from_numpy(plan.row_slot).long()] += torch.from_numpy(plan.row_query_len)
        assert state.position.tolist() == positions.tolist()


def test_deltas_reach_their_owners_in_order() -> None:
    state, sampler = SlotState(LIMITS, torch.device("cpu")), RecordingSampler()
    plan = synthetic_plan([3, 2], 0, PlanFlag.PENALTY | PlanFlag.BIAS)
    params = np.arange(2 * Param.COUNT, dtype=np.int32).reshape(2, Param.COUNT)
    params[:, Param.COMPUTED] = 8, 0
    plan.admit_slot, plan.admit_params = int32(4, 1), params
    plan.bias_slot, plan.bias_index, plan.bias_token = int32(4), int32(2), int32(77)
    plan.bias_value, plan.bias_until = np.array([-2.5], np.float32), int32(19)
    plan.history_slot, plan.history_token, plan.history_count = int32(4, 4), int32(5, 6), int32(1, 3)
    plan.block_slot, plan.block_index, plan.block_id = int32(4, 1), int32(0, 3), int32(21, 22)
    apply_slots(stage(plan), state, sampler)  # type: ignore[arg-type]
    apply_tables(stage(plan), sampler)  # type: ignore[arg-type]
    assert state.position.tolist()[:5] == [0, 0, 0, 0, 8]
    assert (int(state.block_table[4, 0]), int(state.block_table[1, 3])) == (21, 22)
    calls = dict(sampler.calls)
    assert sampler.calls[0][0] == "admit"
    assert calls["admit"] == [[4, 1], params.tolist()]
    assert calls["set_bias"] == [[4], [2], [77], [-2.5], [19]]
    assert calls["set_history"][-3:] == [[4, 4], [5, 6], [1, 3]]


def test_a_plan_without_deltas_touches_nothing() -> None:
    state, sampler = SlotState(LIMITS, torch.device("cpu")), RecordingSampler()
    plan = stage(synthetic_plan([1, 1], 2, PlanFlag.NONE))
    apply_slots(plan, state, sampler)  # type: ignore[arg-type]
    apply_tables(plan, sampler)  # type: ignore[arg-type]
    assert sampler.calls == []


def test_synthetic_plans_fit_the_limits() -> None:
    for limits in (LIMITS, FrameLimits(1, 8, 4, 4, 0), FrameLimits(2, 2, 100, 16, 0), FrameLimits(300, 256, 64, 16, 5)):
        payload = np.zeros(limits.plan_bytes, np.uint8)
        full = full_step_plan(limits)
        assert full.num_tokens == min(limits.max_tokens, limits.max_seq_len * limits.max_rows)
        for plan in (full, *warmup_plans(limits)):
            write_plan(payload, plan)
            assert plan.num_rows <= limits.max_rows
            assert plan.num_tokens <= limits.max_tokens
            assert int(plan.row_query_len.max()) <= limits.max_seq_len
            assert int(plan.row_query_len.min()) >= 1
