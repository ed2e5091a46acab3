"""Plans that no scheduler made: the largest step, for sizing the KV cache, and small ones that compile every kernel.

Their slots were never admitted, so all they do happens in the null block. Used before the executor is ready.
"""

from __future__ import annotations

import numpy as np

from ipc.frames import FrameLimits, Param, Plan, PlanFlag

ALL_STAGES = PlanFlag.SAMPLE | PlanFlag.FILTER | PlanFlag.PENALTY | PlanFlag.BIAS | PlanFlag.LOGPROBS | PlanFlag.GRAMMAR


def synthetic_plan(query_lens: list[int], num_decode: int, flags: PlanFlag) -> Plan:
    """A plan with a row of each length over slots 0, 1, ...; the first `num_decode` lengths are 1."""
    empty = np.zeros(0, np.int32)
    return Plan(
        seq=0,
        epoch=0,
        flags=flags,
        num_decode=num_decode,
        row_slot=np.arange(len(query_lens), dtype=np.int32),
        row_query_len=np.array(query_lens, np.int32),
        row_sample=np.ones(len(query_lens), np.int32),
        prefill_token=np.zeros(sum(query_lens[num_decode:]), np.int32),
        block_slot=empty,
        block_index=empty,
        block_id=empty,
        admit_slot=empty,
        admit_params=np.zeros((0, Param.COUNT), np.int32),
        bias_slot=empty,
        bias_index=empty,
        bias_token=empty,
        bias_value=np.zeros(0, np.float32),
        bias_until=empty,
        history_slot=empty,
        history_token=empty,
        history_count=empty,
        grammar_row=empty,
        grammar_word=empty,
    )


def full_step_plan(limits: FrameLimits) -> Plan:
    """The step that needs the most memory: every row and every token, all prefill, all stages of the sampler."""
    rows = min(limits.max_rows, limits.max_tokens)
    share, rest = divmod(limits.max_tokens, rows)
    query_lens = [min(share + (i < rest), limits.max_seq_len) for i in range(rows)]
    plan = synthetic_plan(query_lens, 0, ALL_STAGES)
    plan.grammar_row = np.arange(min(rows, limits.max_grammar_rows) if limits.mask_words else 0, dtype=np.int32)
    plan.grammar_word = np.full(len(plan.grammar_row) * limits.mask_words, -1, np.int32)  # everything is allowed
    return plan


def _tables_plan(tokens: int, limits: FrameLimits) -> Plan:
    """A prompt, and what only some requests bring: bias, a history, scores. All of it is 0 and for the null slot, which
    stays as it was."""
    plan = synthetic_plan([tokens], 0, PlanFlag.BIAS | PlanFlag.PENALTY | PlanFlag.LOGPROBS)
    null, zero = np.array([limits.max_rows], np.int32), np.zeros(1, np.int32)
    plan.admit_slot, plan.admit_params = null, np.zeros((1, Param.COUNT), np.int32)
    plan.bias_slot, plan.bias_index, plan.bias_token = null, zero, zero
    plan.bias_value, plan.bias_until = np.zeros(1, np.float32), zero
    plan.history_slot, plan.history_token, plan.history_count = null, zero, zero
    plan.score_index, plan.score_token = zero, zero
    return plan


def warmup_plans(limits: FrameLimits) -> list[Plan]:
    """Prefill, mixed and decode steps with every stage of the sampler and without; 1, 3 and 16 rows, as Triton compiles
    kernels anew for numbers that are 1 or divisible by 16. Longer chunks too, and as many decode rows as there may be:
    more tokens and more rows take other kernels."""
    lengths = 17, 40, 100, 150
    chunk, middle, longer, long = (max(1, min(n, limits.max_tokens - 2, limits.max_seq_len)) for n in lengths)
    shapes = [
        ([chunk], 0),
        ([1, 1, chunk], 2),
        ([middle], 0),
        ([longer], 0),
        ([long], 0),
        ([1, 1, long], 2),
        ([1], 1),
        ([1, 1, 1], 3),
        ([1] * 16, 16),
    ]
    rows = min(limits.max_rows, limits.max_tokens - long)
    crowds = [([1] * rows, rows), ([1] * (rows - 1) + [long], rows - 1)] if rows > 1 else []
    return (
        [_tables_plan(chunk, limits)]
        + [
            synthetic_plan(query_lens, num_decode, prepare | choice)
            for query_lens, num_decode in shapes
            if len(query_lens) <= limits.max_rows and sum(query_lens) <= limits.max_tokens
            for prepare in (PlanFlag.NONE, PlanFlag.BIAS | PlanFlag.PENALTY | PlanFlag.LOGPROBS)
            for choice in (PlanFlag.NONE, PlanFlag.SAMPLE, PlanFlag.SAMPLE | PlanFlag.FILTER)
        ]
        + [synthetic_plan(query_lens, num_decode, PlanFlag.NONE) for query_lens, num_decode in crowds]
    )
