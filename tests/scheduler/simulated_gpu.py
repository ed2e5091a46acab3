"""An executor that computes a hash instead of a model, with real paged memory, so that a misplaced token shows.

It checks what no model could: that a decode row finds its carry-over, and that no cached block is written again.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ipc.frames import FrameLimits, Param, Plan, read_plan, write_plan
from ipc.results import Result

VOCAB = 29
EOS = 0


def _digest(tokens: list[int]) -> int:
    digest = 1469598103
    for token in tokens:
        digest = ((digest ^ (token + 7)) * 16777619) & 0xFFFFFFFF
    return digest >> 8


def next_token(context: list[int], allowed: Sequence[int] = range(VOCAB)) -> int:
    """The model: the next token is a function of the whole context; about one in 29 is the end of the sequence."""
    return allowed[_digest(context) % len(allowed)]


def allowed_tokens(grammar: str, output: list[int]) -> Sequence[int]:
    """A grammar: what may come next is a function of all that came, and seldom the end of the sequence."""
    if not grammar:
        return range(VOCAB)
    digest = _digest([*grammar.encode(), *output])
    return [token for token in range(VOCAB) if (digest >> token % 16) % 7 == 0] or [EOS]


def sequential_oracle(
    prompt: list[int], max_tokens: int, stop_ids: frozenset[int] = frozenset(), grammar: str = ""
) -> list[int]:
    """What a request must produce, computed alone and in order."""
    context, output = list(prompt), list[int]()
    while len(output) < max_tokens:
        token = next_token(context, allowed_tokens(grammar, output))
        context.append(token)
        output.append(token)
        if token == EOS or token in stop_ids:
            break
    return output


class SimulatedGpu:
    """Device memory of one executor life; `run` executes plans strictly in the order given."""

    def __init__(self, limits: FrameLimits, num_blocks: int) -> None:
        self.block_size = limits.block_size
        self.kv: list[list[int | None]] = [[None] * limits.block_size for _ in range(num_blocks)]
        self.block_table = np.zeros((limits.max_rows, limits.max_blocks_per_seq), np.int32)
        self.position = [0] * limits.max_rows
        self.last_token: list[int | None] = [None] * limits.max_rows
        self._payload = np.zeros(limits.plan_bytes, np.uint8)

    def run(self, plan: Plan, cached_blocks: set[int]) -> Result:
        """`cached_blocks`: those in the prefix index when the plan was made; none may be written."""
        write_plan(self._payload, plan)
        plan = read_plan(self._payload)
        for slot, params in zip(plan.admit_slot.tolist(), plan.admit_params, strict=True):
            self.position[slot], self.last_token[slot] = int(params[Param.COMPUTED]), None
        self.block_table[plan.block_slot, plan.block_index] = plan.block_id
        tokens, prefill = [], plan.prefill_token.tolist()
        ran: list[tuple[int, int]] = []  # slot and position of each token of the step
        for row, (slot, n) in enumerate(zip(plan.row_slot.tolist(), plan.row_query_len.tolist(), strict=True)):
            if row < plan.num_decode:
                assert n == 1 and self.last_token[slot] is not None, "a decode row without a carry-over"
                row_tokens = [self.last_token[slot]]
            else:
                assert n >= 1, "a row without tokens has no logits"
                row_tokens, prefill = prefill[:n], prefill[n:]
            for token in row_tokens:
                block, offset = self._locate(slot, self.position[slot])
                assert block not in cached_blocks, "a cached block was written again"
                assert block != 0, "the null block was written"
                self.kv[block][offset] = token
                ran.append((slot, self.position[slot]))
                self.position[slot] += 1
        words = plan.grammar_word.reshape(-1, 1)  # VOCAB is below 32
        masks = dict(zip(plan.grammar_row.tolist(), words.tolist(), strict=True))
        for row, (slot, sample) in enumerate(zip(plan.row_slot.tolist(), plan.row_sample.tolist(), strict=True)):
            if sample:  # all writes of a step come before its reads, as in every layer of a model
                context = [self._read(slot, p) for p in range(self.position[slot])]
                allowed = [t for t in range(VOCAB) if masks[row][0] >> t & 1] if row in masks else range(VOCAB)
                self.last_token[slot] = next_token(context, allowed)
            tokens.append(self.last_token[slot] if sample else 1)
        predicted = []
        for index, token in zip(plan.score_index.tolist(), plan.score_token.tolist(), strict=True):
            slot, position = ran[index]
            predicted.append(next_token([self._read(slot, p) for p in range(position + 1)]))
            tokens.append(token)
        logprob = np.zeros(len(tokens), np.float32)  # the token predicted there stands in for a probability
        logprob[plan.num_rows :] = predicted
        token_column = np.array(tokens, np.int32)
        device_ns = plan.seq // 30 % 2 * 9_000_000  # short and long steps, so that an automatic depth changes
        return Result(plan.seq, plan.epoch, device_ns, 0, 0, False, token_column, logprob, None, None, None)

    def _locate(self, slot: int, position: int) -> tuple[int, int]:
        return int(self.block_table[slot, position // self.block_size]), position % self.block_size

    def _read(self, slot: int, position: int) -> int:
        block, offset = self._locate(slot, position)
        token = self.kv[block][offset]
        assert token is not None, "memory was read that no plan wrote"
        return token
