"""What a step runner does before it serves. That it serves what transformers does is tested with the process."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from executor.inputs import StepInputs
from executor.slot_state import SlotState
from executor.step import StepRunner
from ipc.frames import NULL_BLOCK, FrameLimits


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
