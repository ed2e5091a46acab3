"""What the model sees of one step, on the device. Built on the compute stream from a plan and the slot state.

Called by the step runner. `apply_slots` and `build_inputs` are for the CPU, and say what `executor.unpack_kernel` does
on CUDA. Must never read a device value on the host: all shapes follow from the plan's header, which the host reads from
the ring slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from executor.sampler import GrammarMask, Sampler
from executor.slot_state import SlotState
from ipc.frames import PLAN_COLUMNS, Bytes, Param, PlanFlag, PlanWord, plan_words

_LOGPROBS: Final = int(PlanFlag.LOGPROBS)
OFFSET_WORD: Final = {name: int(PlanWord.OFFSETS) + i for i, name in enumerate(PLAN_COLUMNS)}


@dataclass(slots=True)
class StepInputs:
    """All rows of one step, packed: decode rows first (one token each), then prefill rows.

    The four numbers are known to the host from the plan; everything else is on the device. With a CUDA graph the
    numbers are what it has room for, the tensors are static and as long as that, and `counts` says what is in them;
    padding rows point at the null slot, padding tokens at the null block. Without one, only tokens are padded.
    """

    num_rows: int
    num_decode: int
    num_prefill: int  # rows
    num_tokens: int
    counts: torch.Tensor  # int32 [2], rows and decode rows: what kernels go by
    token_ids: torch.Tensor  # int64 [tokens]
    positions: torch.Tensor  # int64 [tokens]
    slot_mapping: torch.Tensor  # int64 [tokens], block * block_size + offset: where each token's K and V go
    row_slot: torch.Tensor  # int64 [rows]
    query_start: torch.Tensor  # int32 [rows + 1], row -> first token
    kv_len: torch.Tensor  # int32 [rows], this step's tokens included; also the position of the token to sample
    last_index: (
        torch.Tensor
    )  # int64 [rows + scores], each row's last token, and each scored one: where logits are wanted
    block_table: torch.Tensor  # int32 [slots, max_blocks_per_seq]; indexed by row_slot
    has_exact_rows: bool = True  # the three numbers of rows are what there is, not what there is room for

    @property
    def decode_only(self) -> bool:
        return self.num_decode == self.num_tokens


@dataclass(slots=True)
class PlanHeader:
    """The counts and offsets of a packed plan, as Python numbers."""

    words: Sequence[int]  # by PlanWord

    @classmethod
    def read(cls, payload: Bytes) -> PlanHeader:
        return cls(plan_words(payload))

    @property
    def flags(self) -> int:
        """PlanFlag bits: on the launch thread a flag enum costs more than all else that is read here."""
        return self.words[PlanWord.FLAGS]

    @property
    def has_logprobs(self) -> bool:
        return self.flags & _LOGPROBS != 0

    @property
    def num_rows(self) -> int:
        return self.words[PlanWord.NUM_ROWS]

    @property
    def num_scores(self) -> int:
        return self.words[PlanWord.NUM_SCORES]

    @property
    def num_decode(self) -> int:
        return self.words[PlanWord.NUM_DECODE]

    @property
    def num_prefill(self) -> int:
        return self.words[PlanWord.NUM_ROWS] - self.words[PlanWord.NUM_DECODE]

    @property
    def num_tokens(self) -> int:
        return self.words[PlanWord.NUM_DECODE] + self.words[PlanWord.NUM_PREFILL_TOKENS]


@dataclass(slots=True)
class StagedPlan:
    """A plan whose bytes are on the device."""

    header: PlanHeader
    staged: torch.Tensor  # uint8 [at least TOTAL_BYTES]

    def column(self, name: str, count: int) -> torch.Tensor:
        """View of an int32 column [count]."""
        offset = self.header.words[OFFSET_WORD[name]]
        return self.staged[offset : offset + 4 * count].view(torch.int32)

    @property
    def counts(self) -> torch.Tensor:
        """int32 [2], rows and decode rows."""
        first = 8 * PlanWord.NUM_ROWS
        return self.staged[first : first + 16].view(torch.int64).int()


def apply_slots(plan: StagedPlan, state: SlotState, sampler: Sampler) -> None:
    """Bring slots up to date: positions and parameters of admitted ones, block tables."""
    words, column = plan.header.words, plan.column
    if admits := words[PlanWord.NUM_ADMITS]:
        admit_slot = column("admit_slot", admits).long()
        admit_params = column("admit_params", admits * Param.COUNT).view(admits, Param.COUNT)
        state.admit(admit_slot, admit_params[:, Param.COMPUTED])
        sampler.admit(admit_slot, admit_params)
    if count := words[PlanWord.NUM_BLOCKS]:
        state.set_blocks(column("block_slot", count), column("block_index", count), column("block_id", count))


def apply_tables(plan: StagedPlan, sampler: Sampler) -> None:
    """Bring what only some requests ask for up to date: token histories and bias rows. Most steps have none."""
    words, column = plan.header.words, plan.column
    if history := words[PlanWord.NUM_HISTORY]:
        sampler.set_history(
            column("admit_slot", words[PlanWord.NUM_ADMITS]),
            column("history_slot", history),
            column("history_token", history),
            column("history_count", history),
        )
    if bias := words[PlanWord.NUM_BIAS]:
        sampler.set_bias(
            column("bias_slot", bias),
            column("bias_index", bias),
            column("bias_token", bias),
            column("bias_value", bias).view(torch.float32),
            column("bias_until", bias),
        )


def grammar_mask(plan: StagedPlan) -> GrammarMask | None:
    """What the plan's grammars allow; None if no row has one."""
    words = plan.header.words
    rows, count = words[PlanWord.NUM_GRAMMAR_ROWS], words[PlanWord.NUM_GRAMMAR_WORDS]
    if not rows:
        return None
    return GrammarMask(plan.column("grammar_row", rows), plan.column("grammar_word", count).view(rows, -1))


def build_inputs(plan: StagedPlan, state: SlotState) -> StepInputs:
    """Inputs of a step as its plan says; advances the position of its rows."""
    header = plan.header
    rows, num_decode, num_tokens = header.num_rows, header.num_decode, header.num_tokens
    row_slot = plan.column("row_slot", rows)  # [rows]
    if rows == num_decode:
        return build_decode_inputs(row_slot, state)
    device = row_slot.device
    row_slot = row_slot.long()
    query_len = plan.column("row_query_len", rows)  # [rows]
    query_start = torch.zeros(rows + 1, dtype=torch.int32, device=device)
    torch.cumsum(query_len, 0, dtype=torch.int32, out=query_start[1:])
    token_row = torch.repeat_interleave(query_len.long(), output_size=num_tokens)  # [tokens], token -> row
    position = state.position[row_slot]  # [rows]
    token_ids = plan.column("prefill_token", num_tokens - num_decode).long()
    if num_decode:
        token_ids = torch.cat((state.last_token[row_slot[:num_decode]], token_ids))
    offset = torch.arange(num_tokens, device=device) - query_start[token_row]  # [tokens], within the row's chunk
    positions = position[token_row] + offset
    kv_len = position + query_len
    state.set_positions(row_slot, kv_len)
    last_index = (query_start[1:] - 1).long()
    if header.num_scores:
        last_index = torch.cat((last_index, plan.column("score_index", header.num_scores).long()))
    return StepInputs(
        num_rows=rows,
        num_decode=num_decode,
        num_prefill=header.num_prefill,
        num_tokens=num_tokens,
        counts=plan.counts,
        token_ids=token_ids,
        positions=positions,
        slot_mapping=_slot_mapping(state, row_slot[token_row], positions),
        row_slot=row_slot,
        query_start=query_start,
        kv_len=kv_len.int(),
        last_index=last_index,
        block_table=state.block_table,
    )


def build_decode_inputs(row_slot: torch.Tensor, state: SlotState) -> StepInputs:
    """Inputs of a step of decode rows only, int32 [rows]; advances their positions. Capturable in a CUDA graph.

    Each row's input token is gathered from `last_token[slot]`: the carry-over, which the host has never seen.
    """
    rows = len(row_slot)
    slot = row_slot.long()
    position = state.position[slot]  # [rows]
    kv_len = position + 1
    state.set_positions(slot, kv_len)
    index = torch.arange(rows + 1, device=slot.device)
    return StepInputs(
        num_rows=rows,
        num_decode=rows,
        num_prefill=0,
        num_tokens=rows,
        counts=torch.full((2,), rows, dtype=torch.int32, device=slot.device),
        token_ids=state.last_token[slot],
        positions=position,
        slot_mapping=_slot_mapping(state, slot, position),
        row_slot=slot,
        query_start=index.int(),
        kv_len=kv_len.int(),
        last_index=index[:rows],
        block_table=state.block_table,
    )


def _slot_mapping(state: SlotState, slot: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Where K and V of tokens at `position` int64 [n] of `slot` int64 [n] go, int64 [n]."""
    block = torch.div(position, state.block_size, rounding_mode="floor")
    return state.block_table[slot, block] * state.block_size + position - block * state.block_size
