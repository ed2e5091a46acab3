"""The slot table: a running request's hot state, as numpy columns indexed by slot, so a step costs no per-request loop.

[0, computed)          planned: K and V are written, or will be by a plan in flight
[computed, known)      tokens the scheduler has but has not planned: the rest of the prompt
known .. computed      (while decoding) sampled on the GPU, their values not here yet
[.., limit)            the request may grow to this many tokens
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ipc.frames import FrameLimits
from scheduler.request import Request, State


class SlotTable:
    """Columns over slots, and `running`: the occupied slots in order of admission."""

    def __init__(self, limits: FrameLimits) -> None:
        n = limits.max_rows
        self.block_size = limits.block_size
        self.running = np.empty(0, np.int32)
        self.computed = np.zeros(n, np.int32)
        self.known = np.zeros(n, np.int32)
        self.prefill_end = np.zeros(n, np.int32)  # tokens known at admission; from here on rows carry over on the GPU
        self.limit = np.zeros(n, np.int32)
        self.num_blocks = np.zeros(n, np.int32)
        self.registered = np.zeros(n, np.int32)  # leading blocks whose hashes are in the prefix index
        self.generation = np.zeros(n, np.int64)  # counts owners: a result for an earlier one is dropped
        self.features = np.zeros(n, np.int32)  # PlanFlag
        self.eos_stops = np.zeros(n, np.bool_)
        self.constrained = np.zeros(n, np.bool_)  # has a grammar
        self.runnable = np.zeros(n, np.bool_)  # False while the mask of its next token is awaited
        self.has_stop_ids = np.zeros(n, np.bool_)
        self.num_logprobs = np.zeros(n, np.int32)
        self.peer = np.zeros(n, np.int32)
        self.request_id = np.zeros(n, np.int64)
        self.last_token_ns = np.zeros(n, np.int64)  # 0: none yet
        self.tokens = np.zeros((n, limits.max_seq_len), np.int32)
        self.block_table = np.zeros((n, limits.max_blocks_per_seq), np.int32)
        self.ones = np.ones(n, np.int32)  # what decode rows have in common; never written to
        self.request: list[Request | None] = [None] * n
        # How many occupied slots prefill, have a grammar, have stop ids: most steps have none and need not look.
        self.num_prefilling = self.num_constrained = self.num_with_stop_ids = 0
        self._free = list(range(n - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def occupy(self, request: Request, blocks: list[int], computed: int) -> int:
        """Give `request` a slot whose first `computed` tokens are in `blocks` already; returns the slot."""
        slot = self._free.pop()
        known = len(request.tokens)
        self.tokens[slot, :known] = request.tokens
        self.block_table[slot, : len(blocks)] = blocks
        self.computed[slot] = computed
        self.known[slot] = self.prefill_end[slot] = known
        self.limit[slot] = request.limit
        self.num_blocks[slot] = len(blocks)
        self.registered[slot] = computed // self.block_size
        self.features[slot] = int(request.features)
        self.constrained[slot] = bool(request.grammar)
        self.num_constrained += bool(request.grammar)
        self.num_with_stop_ids += bool(request.stop_ids)
        self.num_prefilling += computed < known
        self.runnable[slot] = True
        self.eos_stops[slot] = not request.params.ignore_eos or bool(request.grammar)  # nothing follows its end
        self.has_stop_ids[slot] = bool(request.stop_ids)
        self.num_logprobs[slot] = request.params.logprobs
        self.peer[slot] = request.peer
        self.request_id[slot] = request.request_id
        self.last_token_ns[slot] = request.last_token_ns
        self.request[slot] = request
        self.running = np.append(self.running, np.int32(slot))
        request.state, request.slot = State.RUNNING, slot
        return slot

    def advance(self, slot: npt.NDArray[np.int32], tokens: npt.NDArray[np.int32], num_decode: int) -> None:
        """A plan runs so many tokens [rows] of these slots [rows], decode rows first."""
        self.computed[slot] += tokens
        if len(slot) > num_decode:
            prefill = slot[num_decode:]
            self.num_prefilling -= int(np.count_nonzero(self.computed[prefill] >= self.prefill_end[prefill]))

    def vacate(self, slot: int) -> list[int]:
        """Take the slot from its request, whose tokens go back to its record; returns the blocks to release.

        Results in flight for this slot belong to an earlier generation from now on.
        """
        request = self.request[slot]
        assert request is not None, f"slot {slot} is not occupied"
        request.tokens = self.tokens[slot, : self.known[slot]].copy()
        request.last_token_ns = int(self.last_token_ns[slot])
        request.slot = -1
        self.request[slot] = None
        self.generation[slot] += 1
        self.num_constrained -= bool(self.constrained[slot])
        self.num_with_stop_ids -= bool(self.has_stop_ids[slot])
        self.num_prefilling -= bool(self.computed[slot] < self.prefill_end[slot])
        self.running = self.running[self.running != slot]
        self._free.append(slot)
        blocks: list[int] = self.block_table[slot, : self.num_blocks[slot]].tolist()
        return blocks
