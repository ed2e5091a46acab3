"""The one launch that readies a step on CUDA: the plan's admits and block deltas, then what the model sees.

The same as `inputs.apply_slots` and `inputs.build_inputs`, without their many small kernels. Called by the step runner
and by `executor.graphs`, whose graphs begin with it. The plan lies somewhere else in every step, and so does its
output: where, is in two numbers on the device. What it writes lies always at the same place.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl

from executor.copies import Numbers
from executor.inputs import OFFSET_WORD, StagedPlan, StepInputs
from executor.products import padded_tokens
from executor.slot_state import SlotState
from ipc.frames import FrameLimits, Param, PlanWord

_BLOCK: Final = 512
_WARPS: Final = 8

_NUM_ROWS = tl.constexpr(int(PlanWord.NUM_ROWS))
_NUM_DECODE = tl.constexpr(int(PlanWord.NUM_DECODE))
_NUM_ADMITS = tl.constexpr(int(PlanWord.NUM_ADMITS))
_NUM_BLOCKS = tl.constexpr(int(PlanWord.NUM_BLOCKS))
_ADMIT_SLOT = tl.constexpr(OFFSET_WORD["admit_slot"])
_ADMIT_PARAMS = tl.constexpr(OFFSET_WORD["admit_params"])
_BLOCK_SLOT = tl.constexpr(OFFSET_WORD["block_slot"])
_BLOCK_INDEX = tl.constexpr(OFFSET_WORD["block_index"])
_BLOCK_ID = tl.constexpr(OFFSET_WORD["block_id"])
_ROW_SLOT = tl.constexpr(OFFSET_WORD["row_slot"])
_ROW_QUERY_LEN = tl.constexpr(OFFSET_WORD["row_query_len"])
_PREFILL_TOKEN = tl.constexpr(OFFSET_WORD["prefill_token"])
_PARAMS = tl.constexpr(int(Param.COUNT))
_COMPUTED = tl.constexpr(int(Param.COMPUTED))


class Unpack:
    """Owns the memory of every step's inputs: each step's are its first rows and tokens."""

    def __init__(self, state: SlotState, params: torch.Tensor, limits: FrameLimits) -> None:
        """`params` int32 [slots, Param.COUNT] are the sampler's. Steps will run on the stream that is current now."""
        device, rows, tokens = state.position.device, limits.max_rows, limits.max_tokens
        self._max_tokens = tokens

        def zeros(count: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(count, dtype=dtype, device=device)

        self._all = StepInputs(
            num_rows=rows,
            num_decode=0,
            num_prefill=rows,
            num_tokens=tokens,
            counts=zeros(2, torch.int32),
            token_ids=zeros(tokens, torch.int64),
            positions=zeros(tokens, torch.int64),
            slot_mapping=zeros(tokens, torch.int64),
            row_slot=zeros(rows, torch.int64),
            query_start=zeros(rows + 1, torch.int32),
            kv_len=zeros(rows, torch.int32),
            last_index=zeros(rows, torch.int64),
            block_table=state.block_table,
        )
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        # int64 [1], of the plan; and of the column that the greedy tokens of a graph go to, 0 = nobody wants them
        self._addresses = zeros(2, torch.int64)
        self._plan_address, self.token_address = self._addresses.split(1)
        self._numbers = Numbers(self._addresses)
        self._nothing = zeros(len(OFFSET_WORD) + int(PlanWord.OFFSETS), torch.int64)  # the header of a plan
        every = self._all
        self._memory = (
            params, state.position, state.last_token, state.block_table,
            every.counts, every.token_ids, every.positions, every.slot_mapping, every.row_slot, every.query_start,
            every.kv_len, every.last_index,
        )  # fmt: skip
        self._sizes = limits.max_blocks_per_seq, state.null_slot, state.block_size, rows.bit_length(), _BLOCK

    def room(self, *, rows: int, decode: int, prefill: int, tokens: int, has_exact_rows: bool = False) -> StepInputs:
        """Inputs for up to so many rows, decode rows, prefill rows and tokens, or for just these rows. Their memory is
        that of all others."""
        every = self._all
        assert rows <= len(every.row_slot), f"room for {rows} rows, there is memory for {len(every.row_slot)}"
        assert tokens <= self._max_tokens, f"room for {tokens} tokens, there is memory for {self._max_tokens}"
        return StepInputs(
            num_rows=rows,
            num_decode=decode,
            num_prefill=prefill,
            num_tokens=tokens,
            counts=every.counts,
            token_ids=every.token_ids[:tokens],
            positions=every.positions[:tokens],
            slot_mapping=every.slot_mapping[:tokens],
            row_slot=every.row_slot[:rows],
            query_start=every.query_start[: rows + 1],
            kv_len=every.kv_len[:rows],
            last_index=every.last_index[:rows],
            block_table=every.block_table,
            has_exact_rows=has_exact_rows,
        )

    def point(self, staged: torch.Tensor, token_address: int = 0) -> None:
        """What is queued from now on reads the plan in `staged`, and finds `token_address` in `self.token_address`."""
        numbers = staged.data_ptr(), token_address
        if self._stream is None:  # in Triton's interpreter
            self._addresses.copy_(torch.tensor(numbers))
        else:
            self._numbers.queue(numbers, self._stream)

    def fill(self, inputs: StepInputs) -> None:
        """Apply the plan's admits and block deltas, fill `inputs`, and advance the positions of the plan's rows.

        `inputs` are a room of ours. What is beyond the plan's rows and tokens is padding: in a step of decode rows only
        each row a token at the null slot, else rows without tokens, and tokens without a row. Capturable in a CUDA
        graph.
        """
        room = inputs.num_rows, inputs.num_tokens, int(inputs.decode_only)
        _unpack_kernel[1, 1, 1](self._plan_address, *room, *self._memory, *self._sizes, num_warps=_WARPS)

    def eager(self, plan: StagedPlan) -> StepInputs:
        """`build_inputs` and all before it; tokens of prompts are padded."""
        header = plan.header
        tokens = header.num_tokens
        inputs = self.room(
            rows=header.num_rows,
            decode=header.num_decode,
            prefill=header.num_prefill,
            tokens=padded_tokens(tokens, self._max_tokens) if header.num_prefill else tokens,
            has_exact_rows=True,
        )
        self.point(plan.staged)
        self.fill(inputs)
        if header.num_scores:
            inputs.last_index = torch.cat((inputs.last_index, plan.column("score_index", header.num_scores).long()))
        return inputs

    def point_at_nothing(self) -> None:
        """As `point`, at a plan without rows: all that is filled is padding."""
        self.point(self._nothing)


@triton.jit
def _word(staged, word: tl.constexpr):
    """A word of the header: an int64 whose upper half is 0."""
    return tl.load(staged + 2 * word)


@triton.jit
def _column(staged, word: tl.constexpr):
    """Where a column begins."""
    return staged + tl.load(staged + 2 * word) // 4


@triton.jit(do_not_specialize=["row_room", "token_room", "decode_only", "max_blocks", "null_slot"])
def _unpack_kernel(
    plan_address,  # int64 [1], of a packed plan, int32 [words]
    row_room,
    token_room,
    decode_only,
    table,  # int32 [slots, Param.COUNT]: parameters
    position,  # int64 [slots], advanced
    last_token,  # int64 [slots]
    block_table,  # int32 [slots, max_blocks]
    counts,  # and so on, all written: see StepInputs
    token_ids,
    positions,
    slot_mapping,
    row_slot,
    query_start,
    kv_len,
    last_index,
    max_blocks,
    null_slot,
    page: tl.constexpr,
    search_steps: tl.constexpr,
    block: tl.constexpr,
):
    """One program: what it writes first it reads again."""
    staged = tl.load(plan_address).to(tl.pointer_type(tl.int32))
    lane = tl.arange(0, block)
    words = _word(staged, _NUM_ADMITS) * _PARAMS
    for start in range(0, words, block):
        i = start + lane
        slot = tl.load(_column(staged, _ADMIT_SLOT) + i // _PARAMS, mask=i < words, other=0).to(tl.int64)
        value = tl.load(_column(staged, _ADMIT_PARAMS) + i, mask=i < words, other=0)
        tl.store(table + slot * _PARAMS + i % _PARAMS, value, mask=i < words)
        tl.store(position + slot, value.to(tl.int64), mask=(i < words) & (i % _PARAMS == _COMPUTED))
    deltas = _word(staged, _NUM_BLOCKS)
    for start in range(0, deltas, block):
        i = start + lane
        slot = tl.load(_column(staged, _BLOCK_SLOT) + i, mask=i < deltas, other=0).to(tl.int64)
        index = tl.load(_column(staged, _BLOCK_INDEX) + i, mask=i < deltas, other=0)
        value = tl.load(_column(staged, _BLOCK_ID) + i, mask=i < deltas, other=0)
        tl.store(block_table + slot * max_blocks + index, value, mask=i < deltas)
    tl.debug_barrier()
    plan_rows = _word(staged, _NUM_ROWS)
    rows = tl.where(decode_only != 0, row_room, plan_rows)
    decode = tl.where(decode_only != 0, row_room, _word(staged, _NUM_DECODE))
    tl.store(counts, rows)
    tl.store(counts + 1, decode)
    tl.store(query_start, 0)
    tokens = 0
    for start in range(0, row_room, block):
        row = start + lane
        planned = row < plan_rows
        slot = tl.load(_column(staged, _ROW_SLOT) + row, mask=planned, other=0).to(tl.int64)
        slot = tl.where(planned, slot, null_slot)
        length = tl.load(_column(staged, _ROW_QUERY_LEN) + row, mask=planned, other=0)
        length = tl.where(planned, length, decode_only)
        computed = tl.load(position + slot, mask=planned, other=0)
        # The null slot stays at position 0: it must not outgrow the null block.
        tl.store(position + slot, computed + length, mask=planned)
        stop = tokens + tl.cumsum(length, 0)
        inside = row < row_room
        tl.store(row_slot + row, slot, mask=inside)
        tl.store(query_start + row + 1, stop, mask=inside)
        tl.store(kv_len + row, (computed + length).to(tl.int32), mask=inside)
        tl.store(last_index + row, tl.maximum(stop - 1, 0).to(tl.int64), mask=inside)
        tokens += tl.sum(tl.where(inside, length, 0), 0)
    tl.debug_barrier()
    for start in range(0, token_room, block):
        token = start + lane
        planned = token < tokens
        row = token
        if decode < rows:
            row = tl.zeros_like(token)  # the last one that begins at the token or before
            last = tl.zeros_like(token) + rows - 1
            for _ in range(search_steps):
                middle = (row + last + 1) >> 1
                begun = tl.load(query_start + middle) <= token
                row = tl.where(begun, middle, row)
                last = tl.where(begun, last, middle - 1)
        slot = tl.load(row_slot + row, mask=planned, other=0)
        at = (
            tl.load(kv_len + row, mask=planned, other=0) - tl.load(query_start + row + 1, mask=planned, other=0) + token
        )
        carried = tl.load(last_token + slot, mask=planned & (token < decode), other=0)
        prompt = tl.load(_column(staged, _PREFILL_TOKEN) + token - decode, mask=planned & (token >= decode), other=0)
        value = tl.load(block_table + slot * max_blocks + at // page, mask=planned, other=0).to(tl.int64)
        inside = token < token_room
        tl.store(token_ids + token, carried + prompt, mask=inside)
        tl.store(positions + token, tl.where(planned, at, 0).to(tl.int64), mask=inside)
        tl.store(slot_mapping + token, tl.where(planned, value * page + at % page, 0), mask=inside)
