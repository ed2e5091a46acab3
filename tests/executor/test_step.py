"""What a step runner does before it serves, and with graphs. That it serves what transformers does is tested with the
process."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from executor.inputs import PlanHeader, StagedPlan, StepInputs, build_inputs
from executor.sampler import Sampler
from executor.slot_state import SlotState
from executor.step import StepRunner
from executor.warmup import synthetic_plan, warmup_plans
from ipc.frames import INVALID_TOKEN, NULL_BLOCK, FrameLimits, PlanFlag, write_plan
from ipc.results import RESULT_HEADER_BYTES, ResultLayout

VOCAB = 50
LIMITS = FrameLimits(max_rows=6, max_tokens=64, max_seq_len=96, block_size=16, max_logprobs=3)
LAYOUT = ResultLayout(max_results=6, max_logprobs=3)


def test_ways_are_timed_on_rows_with_a_context_of_their_own_and_nothing_of_it_stays() -> None:
    limits = FrameLimits(max_rows=6, max_tokens=64, max_seq_len=96, block_size=16, max_logprobs=0)
    state = SlotState(limits, torch.device("cpu"))
    seen: list[StepInputs] = []

    def model_forward(inputs: StepInputs) -> torch.Tensor:
        assert inputs.kv_len.tolist() == [49] * inputs.num_rows, "half of what a row may have, and the new token"
        pages = state.block_table[inputs.row_slot, :4]
        assert pages.unique().numel() == pages.numel(), "rows do not share pages"
        assert pages.max() < 100
        seen.append(inputs)
        return torch.empty(0)

    def choose_ways(forward: Callable[[int], torch.Tensor], max_rows: int, context: int) -> None:
        assert (max_rows, context) == (6, 48)
        for rows in (4, 4, 6):
            forward(rows)

    model: Any = SimpleNamespace(
        decoder=SimpleNamespace(choose_ways=choose_ways), num_blocks=100, forward=model_forward
    )
    StepRunner(model, None, state, limits, None).choose_ways()  # type: ignore[arg-type]
    assert [inputs.num_rows for inputs in seen] == [4, 4, 6]
    assert (state.block_table == NULL_BLOCK).all()
    assert (state.position == 0).all()


class Graphs:
    """Stands in for captured graphs: 40 + row is what their tail chooses, 10 + row the most probable token."""

    def __init__(self, state: SlotState) -> None:
        self._state = state

    def replay(self, plan: StagedPlan, token_address: int) -> Any:
        rows = plan.header.num_rows
        if token_address:
            (ctypes.c_int32 * rows).from_address(token_address)[:] = [40 + row for row in range(rows)]
        logits = torch.nn.functional.one_hot(10 + torch.arange(6), VOCAB).float()
        return SimpleNamespace(inputs=build_inputs(plan, self._state), logits=logits)


@pytest.mark.parametrize(
    ("flags", "poison", "token", "carried"),
    [
        (PlanFlag.NONE, False, [40, 41, 42], [0, 0, 0]),
        (PlanFlag.NONE, True, [INVALID_TOKEN, 11, 12], [0, 11, 12]),
        (PlanFlag.SAMPLE, False, [10, 11, 12], [10, 11, 12]),
        (PlanFlag.LOGPROBS, False, [10, 11, 12], [10, 11, 12]),
        (PlanFlag.PENALTY, True, [INVALID_TOKEN, 11, 12], [0, 11, 12]),
    ],
)
def test_only_a_greedy_step_leaves_the_choice_to_its_graph(
    flags: PlanFlag, poison: bool, token: list[int], carried: list[int]
) -> None:
    state = SlotState(LIMITS, torch.device("cpu"))
    runner = StepRunner(None, Sampler(state.last_token, VOCAB, 3, "cpu"), state, LIMITS, LAYOUT)  # type: ignore[arg-type]
    runner._graphs = Graphs(state)  # type: ignore[assignment]
    assert run(runner, flags, 3, poison)["token"] == token
    assert state.last_token[:3].tolist() == carried


def test_warming_up_leaves_the_state_and_the_samplers_tables_as_they_were() -> None:
    state = SlotState(LIMITS, torch.device("cpu"))
    sampler = Sampler(state.last_token, VOCAB, 3, "cpu")
    scored: list[int] = []

    def forward(inputs: StepInputs) -> torch.Tensor:
        scored.append(len(inputs.last_index) - inputs.num_rows)
        return torch.zeros(len(inputs.last_index), VOCAB)

    runner = StepRunner(SimpleNamespace(forward=forward), sampler, state, LIMITS, LAYOUT)  # type: ignore[arg-type]
    tables = (state.position, state.block_table, sampler.tables.params, sampler.tables.bias_until)
    before = [table.clone() for table in tables]
    for plan in warmup_plans(LIMITS):
        runner.run_alone(plan)
    assert sorted(set(scored)) == [0, 1]
    assert all(torch.equal(*pair) for pair in zip(tables, before, strict=True))
    assert not sampler.tables.token_counts.any()


def run(runner: StepRunner, flags: PlanFlag, rows: int, poison: bool = False) -> dict[str, list[float]]:
    """The result's columns of a step of decode rows."""
    device = runner._state.position.device
    payload = np.zeros(LIMITS.plan_bytes, np.uint8)
    used = write_plan(payload, synthetic_plan([1] * rows, rows, flags))
    output = torch.zeros(LAYOUT.nbytes - RESULT_HEADER_BYTES, dtype=torch.uint8, device=device)
    runner.run(PlanHeader.read(payload), poison, torch.from_numpy(payload[:used]).to(device), output)

    def column(offset: int, dtype: torch.dtype) -> list[float]:
        values: list[float] = output[offset - RESULT_HEADER_BYTES :][: 4 * rows].view(dtype).tolist()
        return values

    return {"token": column(LAYOUT.token, torch.int32), "logprob": column(LAYOUT.logprob, torch.float32)}


@pytest.mark.gpu
def test_steps_that_replay_graphs_and_those_that_run_eagerly_have_the_same_results() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    device = torch.device("cuda")

    def forward(inputs: StepInputs) -> torch.Tensor:
        target = ((inputs.token_ids * 3 + inputs.positions) % VOCAB)[inputs.last_index]
        return (target[:, None] == torch.arange(VOCAB, device=device)).to(torch.bfloat16)

    model: Any = SimpleNamespace(forward=forward, num_parameters=1, has_flash=False)
    compute = torch.cuda.Stream(device)
    with torch.inference_mode(), torch.cuda.stream(compute):
        states = [SlotState(LIMITS, device) for _ in range(2)]
        runners = [StepRunner(model, Sampler(x.last_token, VOCAB, 3, device), x, LIMITS, LAYOUT) for x in states]
        runners[0].capture(compute)
        steps = [
            (PlanFlag.NONE, 3, False),
            (PlanFlag.NONE, 6, False),
            (PlanFlag.LOGPROBS, 5, False),
            (PlanFlag.NONE, 5, True),
            (PlanFlag.SAMPLE, 6, False),
            (PlanFlag.NONE, 2, False),
        ]
        for step in steps:
            replayed, eager = (run(runner, *step) for runner in runners)
            assert replayed == eager
            assert (INVALID_TOKEN in replayed["token"]) == step[2]
            for name in ("last_token", "position"):
                assert torch.equal(getattr(states[0], name), getattr(states[1], name)), name
