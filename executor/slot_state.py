"""State of every slot, on the device, that outlives a step. Only code on the compute stream touches it.

A slot is the row of one running request. The last slot is the null slot: padding rows of a CUDA graph live there, at
position 0 of the null block, and nothing they do is seen by anyone.
"""

from __future__ import annotations

import torch

from ipc.frames import NULL_BLOCK, FrameLimits


class SlotState:
    """Positions, carry-over tokens and block tables by slot."""

    def __init__(self, limits: FrameLimits, device: torch.device) -> None:
        self.null_slot = limits.max_rows
        self.block_size = limits.block_size
        slots = limits.max_rows + 1
        # int64 [slots], token sampled last: the next step's input, which never leaves the device. The sampler sets it.
        self.last_token = torch.zeros(slots, dtype=torch.int64, device=device)
        # int64 [slots], first position that has not run
        self.position = torch.zeros(slots, dtype=torch.int64, device=device)
        # int32 [slots, max_blocks_per_seq]
        self.block_table = torch.full((slots, limits.max_blocks_per_seq), NULL_BLOCK, dtype=torch.int32, device=device)

    def admit(self, slot: torch.Tensor, computed: torch.Tensor) -> None:
        """Start int64 [admits] slots at position `computed` int32 [admits]."""
        self.position.index_copy_(0, slot, computed.long())

    def set_blocks(self, slot: torch.Tensor, index: torch.Tensor, block: torch.Tensor) -> None:
        """block_table[slot, index] = block, each int32 [deltas]; no (slot, index) occurs twice."""
        flat = slot.long() * self.block_table.shape[1] + index
        self.block_table.view(-1).index_copy_(0, flat, block)

    def set_positions(self, slot: torch.Tensor, position: torch.Tensor) -> None:
        """Rows int64 [rows] have run up to `position` int64 [rows]."""
        self.position.index_copy_(0, slot, position)
