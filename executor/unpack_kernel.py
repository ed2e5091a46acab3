"""One Triton launch that readies a decode-only step for its CUDA graph: block table entries and padded row slots.

The same as `SlotState.set_blocks` and two copies, without their eight small kernels. Called by `DecodeGraphs` only.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl

from executor.inputs import StagedPlan
from executor.slot_state import SlotState
from ipc.frames import PlanWord

_BLOCK: Final = 256


def unpack_decode(plan: StagedPlan, state: SlotState, row_slot: torch.Tensor) -> None:
    """Apply the plan's block deltas to `state`, and set row_slot int32 [bucket] to its rows, then the null slot."""
    words = plan.header.words
    deltas, bucket = words[PlanWord.NUM_BLOCKS], len(row_slot)
    grid = (triton.cdiv(max(deltas, bucket), _BLOCK),)
    _unpack_decode[grid](
        plan.staged.view(torch.int32),
        plan.offset("row_slot"),
        plan.header.num_rows,
        bucket,
        plan.offset("block_slot"),
        plan.offset("block_index"),
        plan.offset("block_id"),
        deltas,
        row_slot,
        state.block_table,
        state.block_table.shape[1],
        state.null_slot,
        BLOCK=_BLOCK,
    )


@triton.jit(
    do_not_specialize=[
        "row_slot_offset",
        "rows",
        "bucket",
        "slot_offset",
        "index_offset",
        "block_offset",
        "deltas",
        "max_blocks",
        "null_slot",
    ]
)
def _unpack_decode(
    staged,  # int32 [words], a packed plan
    row_slot_offset,  # offsets count int32 words
    rows,
    bucket,
    slot_offset,
    index_offset,
    block_offset,
    deltas,
    row_slot,  # int32 [bucket]
    block_table,  # int32 [slots, max_blocks]
    max_blocks,
    null_slot,
    BLOCK: tl.constexpr,  # noqa: N803
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(staged + row_slot_offset + i, mask=i < rows, other=0)
    tl.store(row_slot + i, tl.where(i < rows, slot, null_slot), mask=i < bucket)
    is_delta = i < deltas
    slot = tl.load(staged + slot_offset + i, mask=is_delta, other=0)
    index = tl.load(staged + index_offset + i, mask=is_delta, other=0)
    block = tl.load(staged + block_offset + i, mask=is_delta, other=0)
    tl.store(block_table + slot.to(tl.int64) * max_blocks + index, block, mask=is_delta)
