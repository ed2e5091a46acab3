"""Slot state: what persists on the device between steps."""

from __future__ import annotations

import torch

from executor.slot_state import SlotState
from ipc.frames import NULL_BLOCK, FrameLimits

LIMITS = FrameLimits(max_rows=3, max_tokens=64, max_seq_len=40, block_size=16, max_logprobs=0)


def make_state() -> SlotState:
    return SlotState(LIMITS, torch.device("cpu"))


def test_there_is_one_more_slot_than_rows_and_every_block_is_the_null_block() -> None:
    state = make_state()
    assert (len(state.position), state.null_slot) == (4, 3)
    assert state.block_table.shape == (4, 3)
    assert bool((state.block_table == NULL_BLOCK).all())


def test_admit_moves_only_the_admitted() -> None:
    state = make_state()
    state.position[:] = torch.tensor([5, 6, 7, 0])
    state.admit(torch.tensor([2, 0]), torch.tensor([16, 32], dtype=torch.int32))
    assert state.position.tolist() == [32, 6, 16, 0]


def test_block_deltas_change_single_entries() -> None:
    state = make_state()
    int32 = {"dtype": torch.int32}
    state.set_blocks(
        torch.tensor([0, 2, 0], **int32), torch.tensor([0, 1, 2], **int32), torch.tensor([9, 8, 7], **int32)
    )
    assert state.block_table.tolist() == [[9, 0, 7], [0, 0, 0], [0, 8, 0], [0, 0, 0]]
