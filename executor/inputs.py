"""What the model sees of one step, on the device. Built on the compute stream from a plan and the slot state."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(slots=True)
class StepInputs:
    """All rows of one step, packed: decode rows first (one token each), then prefill rows.

    The four counts are host numbers known from the plan; everything else is on the device. With a CUDA graph the
    tensors are static and as long as the graph's bucket; padding rows point at the null slot and the null block.
    """

    num_rows: int
    num_decode: int
    num_tokens: int
    max_query_len: int
    max_kv_len: int  # upper bound over the rows, this step's tokens included
    token_ids: torch.Tensor  # int64 [tokens]
    positions: torch.Tensor  # int64 [tokens]
    slot_mapping: torch.Tensor  # int64 [tokens], block * block_size + offset: where each token's K and V go
    row_slot: torch.Tensor  # int64 [rows]
    query_start: torch.Tensor  # int32 [rows + 1], row -> first token
    kv_len: torch.Tensor  # int32 [rows], this step's tokens included; also the position of the token to sample
    last_index: torch.Tensor  # int64 [rows], index of each row's last token: where logits are wanted
    row_sample: torch.Tensor  # int32 [rows], 0 = the row ends inside its prompt
    block_table: torch.Tensor  # int32 [slots, max_blocks_per_seq]; indexed by row_slot
