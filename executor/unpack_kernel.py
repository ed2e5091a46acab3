"""Two Triton launches that ready a decode-only step: block table entries and padded row slots, then the model's inputs.

The same as `SlotState.set_blocks` and `inputs.build_decode_inputs`, without their many small kernels. Called by
`DecodeGraphs` only: the first launch ahead of the CUDA graph, because its arguments change, the second inside.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

from typing import Any, Final

import torch
import triton
import triton.language as tl

from executor.inputs import StagedPlan, StepInputs
from executor.slot_state import SlotState
from ipc.frames import PlanWord

_BLOCK: Final = 256


class UnpackDecode:
    """Applies a plan's block deltas to `state`, and sets row_slot int32 [bucket] to its rows, then the null slot."""

    def __init__(self, state: SlotState) -> None:
        self._state = state
        self._kernel: Any = None  # compiled; to find it by its arguments would take 50 us a step

    def __call__(self, plan: StagedPlan, row_slot: torch.Tensor) -> None:
        state = self._state
        deltas, bucket = plan.header.words[PlanWord.NUM_BLOCKS], len(row_slot)
        grid = (-(-max(deltas, bucket) // _BLOCK), 1, 1)
        arguments = (
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
            _BLOCK,
        )
        if self._kernel is None:
            self._kernel = _unpack_decode[grid](*arguments)
        else:
            self._kernel[grid](*arguments)


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


def decode_inputs(
    row_slot: torch.Tensor, row_sample: torch.Tensor, index: torch.Tensor, state: SlotState, max_kv_len: int
) -> StepInputs:
    """`inputs.build_decode_inputs`, but the null slot stays at position 0. Capturable in a CUDA graph.

    `index` is int64 [more than rows], counting from 0.
    """
    rows, device = len(row_slot), row_slot.device
    wide = torch.empty(4, rows, dtype=torch.int64, device=device)
    kv_len = torch.empty(rows, dtype=torch.int32, device=device)
    _decode_inputs[(triton.cdiv(rows, _BLOCK),)](
        row_slot,
        state.position,
        state.last_token,
        state.block_table,
        wide,
        kv_len,
        rows,
        state.block_table.shape[1],
        state.null_slot,
        PAGE=state.block_size,
        BLOCK=_BLOCK,
    )
    return StepInputs(
        num_rows=rows,
        num_decode=rows,
        num_tokens=rows,
        max_query_len=1,
        max_kv_len=max_kv_len,
        token_ids=wide[0],
        positions=wide[1],
        slot_mapping=wide[2],
        row_slot=wide[3],
        query_start=index[: rows + 1],
        kv_len=kv_len,
        last_index=index[:rows],
        row_sample=row_sample,
        block_table=state.block_table,
    )


@triton.jit(do_not_specialize=["rows", "max_blocks", "null_slot"])
def _decode_inputs(
    row_slot,  # int32 [rows]
    position,  # int64 [slots], advanced
    last_token,  # int64 [slots]
    block_table,  # int32 [slots, max_blocks]
    wide,  # int64 [4, rows]: token ids, positions, slot mapping, slots
    kv_len,  # int32 [rows]
    rows,
    max_blocks,
    null_slot,
    PAGE: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < rows
    slot = tl.load(row_slot + i, mask=inside, other=0).to(tl.int64)
    at = tl.load(position + slot, mask=inside, other=0)
    block = tl.load(block_table + slot * max_blocks + at // PAGE, mask=inside, other=0).to(tl.int64)
    tl.store(wide + i, tl.load(last_token + slot, mask=inside, other=0), mask=inside)
    tl.store(wide + rows + i, at, mask=inside)
    tl.store(wide + 2 * rows + i, block * PAGE + at % PAGE, mask=inside)
    tl.store(wide + 3 * rows + i, slot, mask=inside)
    tl.store(kv_len + i, (at + 1).to(tl.int32), mask=inside)
    # Padding rows share the null slot: it must not outgrow the null block.
    tl.store(position + slot, at + 1, mask=inside & (slot != null_slot))
