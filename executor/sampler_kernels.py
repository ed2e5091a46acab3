"""The stages of sampling as Triton kernels. Called by `Sampler` on CUDA; must choose what `sampler_cpu` would choose.

    prepare       logits -> float32 with bias and penalties       (rows, chunks); only if a row asks for them or filters
    threshold     the smallest logit each row's filters keep      (rows); only if a row filters: `threshold_kernels`
    best          scores, noise, argmax of a chunk                (rows, chunks)
    choose        argmax of the chunks, NaN check, carry-over, token counts   (rows)

No shape, launch or branch of the host depends on data, so a step can be captured. A greedy step runs the last two. In
a CUDA graph they find on the device where its tokens go, and return at once if nobody wants them.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from executor.sampler_cpu import MAX_COUNT, MIN_TEMPERATURE, NOISE_MIX, SPLIT_MIX, TOKEN_MIX, UNIT, SlotTables
from executor.threshold_kernels import BLOCK, CHUNK, Summary, filter_threshold, float_param
from ipc.frames import INVALID_TOKEN, MAX_BIAS, Param, PlanFlag

_PARAMS = tl.constexpr(int(Param.COUNT))
_SEED_LOW = tl.constexpr(int(Param.SEED_LOW))
_SEED_HIGH = tl.constexpr(int(Param.SEED_HIGH))
_FEATURES = tl.constexpr(int(Param.FEATURES))
_TEMPERATURE = tl.constexpr(int(Param.TEMPERATURE))
_TOP_K = tl.constexpr(int(Param.TOP_K))
_REPETITION = tl.constexpr(int(Param.REPETITION))
_PRESENCE = tl.constexpr(int(Param.PRESENCE))
_FREQUENCY = tl.constexpr(int(Param.FREQUENCY))
_NUM_BIAS = tl.constexpr(int(Param.NUM_BIAS))
_SAMPLE = tl.constexpr(int(PlanFlag.SAMPLE))
_PENALTY = tl.constexpr(int(PlanFlag.PENALTY))
_BIAS = tl.constexpr(int(PlanFlag.BIAS))
_MAX_BIAS = tl.constexpr(MAX_BIAS)
_INVALID = tl.constexpr(INVALID_TOKEN)
_MAX_COUNT = tl.constexpr(MAX_COUNT)
_MIN_TEMPERATURE = tl.constexpr(MIN_TEMPERATURE)
_TOKEN_MIX_0 = tl.constexpr(TOKEN_MIX[0])
_TOKEN_MIX_1 = tl.constexpr(TOKEN_MIX[1])
_NOISE_MIX_0 = tl.constexpr(NOISE_MIX[0])
_NOISE_MIX_1 = tl.constexpr(NOISE_MIX[1])
_SPLIT_MIX_0 = tl.constexpr(SPLIT_MIX[0])
_SPLIT_MIX_1 = tl.constexpr(SPLIT_MIX[1])
_SPLIT_MIX_2 = tl.constexpr(SPLIT_MIX[2])
_UNIT = tl.constexpr(UNIT)
_NO_INDEX = tl.constexpr(2**31 - 1)


def choose_tokens(
    tables: SlotTables,
    logits: torch.Tensor,  # [rows, vocab], rows may be strided
    row_slot: torch.Tensor,  # int [rows]
    position: torch.Tensor,  # int [rows]
    row_sample: torch.Tensor,  # int32 [rows]
    flags: PlanFlag,
) -> torch.Tensor:
    """int32 [rows]: the chosen token, INVALID_TOKEN where the logits hold a NaN. The contract of `Sampler.sample`."""
    rows = len(logits)
    x, threshold = logits, None
    filters = bool(flags & PlanFlag.SAMPLE and flags & PlanFlag.FILTER)
    if filters or flags & (PlanFlag.BIAS | PlanFlag.PENALTY):
        x, summary = prepare(tables, logits, row_slot, position)
        if filters:
            threshold = filter_threshold(tables, x, summary, row_slot)
    token = torch.empty(rows, dtype=torch.int32, device=logits.device)
    _choose(tables, token, False, x, threshold, row_slot, position, row_sample, flags)
    return token


def choose_greedy(tables: SlotTables, logits: torch.Tensor, row_slot: torch.Tensor, address: torch.Tensor) -> None:
    """The contract of `Sampler.sample_greedy`."""
    _choose(tables, address, True, logits, None, row_slot, None, None, PlanFlag.NONE)


def _choose(
    tables: SlotTables,
    token: torch.Tensor,  # int32 [rows], written; if redirected, int64 [1] with the address of such a column, or 0
    redirected: bool,
    x: torch.Tensor,  # [rows, vocab], rows may be strided
    threshold: torch.Tensor | None,  # float32 [rows]
    row_slot: torch.Tensor,  # int [rows]
    position: torch.Tensor | None,  # int [rows], to sample
    row_sample: torch.Tensor | None,  # int32 [rows], to count tokens
    flags: PlanFlag,
) -> None:
    rows, vocab = x.shape
    chunks = triton.cdiv(vocab, CHUNK)
    best = torch.empty(rows, chunks, dtype=torch.float32, device=x.device)
    index = torch.empty(rows, chunks, dtype=torch.int32, device=x.device)
    _best_kernel[(rows, chunks)](
        token, best, index, x, x.stride(0), threshold, row_slot, position, tables.params, vocab,
        redirected, bool(flags & PlanFlag.SAMPLE), threshold is not None, CHUNK, num_warps=8,
    )  # fmt: skip
    _choose_kernel[(rows,)](
        token, tables.last_token, best, index, row_slot, row_sample, tables.params, tables.token_counts, vocab, chunks,
        redirected, bool(flags & PlanFlag.PENALTY), triton.next_power_of_2(chunks), num_warps=1,
    )  # fmt: skip


def prepare(
    tables: SlotTables, logits: torch.Tensor, row_slot: torch.Tensor, position: torch.Tensor
) -> tuple[torch.Tensor, Summary]:
    """float32 [rows, vocab] with each row's bias and penalties."""
    rows, vocab = logits.shape
    chunks = triton.cdiv(vocab, CHUNK)
    x = torch.empty(rows, vocab, dtype=torch.float32, device=logits.device)
    number = torch.empty(rows, chunks, dtype=torch.int32, device=logits.device)
    least, greatest = torch.empty(2, rows, chunks, dtype=torch.float32, device=logits.device)
    maxima = torch.empty(rows, chunks, CHUNK // BLOCK, dtype=torch.float32, device=logits.device)
    _prepare_kernel[(rows, chunks)](
        x, number, least, greatest, maxima, logits, logits.stride(0), row_slot, position, tables.params,
        tables.bias_token, tables.bias_value, tables.bias_until, tables.token_counts, vocab, CHUNK, BLOCK, num_warps=8,
    )  # fmt: skip
    return x, Summary(number, least, greatest, maxima)


@triton.jit
def _prepare_kernel(
    x_ptr,  # float32 [rows, vocab], written
    number_ptr,  # int32 [rows, chunks], written
    least_ptr,  # float32 [rows, chunks], written
    greatest_ptr,  # float32 [rows, chunks], written
    maxima_ptr,  # float32 [rows, chunks, chunk / block], written
    logits_ptr,  # [rows, vocab]
    logits_stride,
    slot_ptr,  # int [rows]
    position_ptr,  # int [rows]
    params_ptr,  # int32 [slots, Param.COUNT]
    bias_token_ptr,  # int32 [slots, MAX_BIAS]
    bias_value_ptr,  # float32 [slots, MAX_BIAS]
    bias_until_ptr,  # int32 [slots, MAX_BIAS]
    counts_ptr,  # int16 [slots, vocab]
    vocab,
    chunk: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_ptr + row).to(tl.int64)
    token = tl.program_id(1) * chunk + tl.arange(0, chunk)
    inside = token < vocab
    x = tl.load(logits_ptr + row * logits_stride + token, mask=inside, other=0.0).to(tl.float32)
    param = params_ptr + slot * _PARAMS
    features = tl.load(param + _FEATURES)
    if (features & _BIAS) != 0:
        position = tl.load(position_ptr + row)
        for entry in range(tl.load(param + _NUM_BIAS)):
            at = slot * _MAX_BIAS + entry
            if position < tl.load(bias_until_ptr + at):
                x = tl.where(token == tl.load(bias_token_ptr + at), x + tl.load(bias_value_ptr + at), x)
    if (features & _PENALTY) != 0:
        repetition = float_param(param, _REPETITION)
        count = tl.load(counts_ptr + slot * vocab + token, mask=inside, other=0).to(tl.int32)
        x = tl.where(count != 0, tl.where(x > 0, tl.div_rn(x, repetition), x * repetition), x)
        generated = count >> 1
        x -= float_param(param, _FREQUENCY) * generated.to(tl.float32)
        x -= tl.where(generated > 0, float_param(param, _PRESENCE), 0.0)
    tl.store(x_ptr + row * vocab + token, x, mask=inside)
    x = tl.where(inside & (x == x), x, -float("inf"))
    allowed = x > -float("inf")
    at = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(number_ptr + at, tl.sum(allowed.to(tl.int32), 0))
    tl.store(least_ptr + at, tl.min(tl.where(allowed, x, float("inf")), 0))
    maxima = tl.max(tl.reshape(x, [chunk // block, block]), 1)
    tl.store(maxima_ptr + at * (chunk // block) + tl.arange(0, chunk // block), maxima)
    tl.store(greatest_ptr + at, tl.max(maxima, 0))


@triton.jit
def _noise_key(param, position):
    """k0 and k1 of a row, as `sampler_cpu.noise_keys`."""
    low = tl.load(param + _SEED_LOW).to(tl.uint32, bitcast=True).to(tl.uint64)
    high = tl.load(param + _SEED_HIGH).to(tl.uint32, bitcast=True).to(tl.uint64)
    z = (low | (high << 32)) + (position.to(tl.uint64) + 1) * _SPLIT_MIX_0
    z = (z ^ (z >> 30)) * _SPLIT_MIX_1
    z = (z ^ (z >> 27)) * _SPLIT_MIX_2
    z = z ^ (z >> 31)
    return z.to(tl.uint32).to(tl.int32, bitcast=True), (z >> 32).to(tl.uint32).to(tl.int32, bitcast=True)


@triton.jit
def _log_exponential(token, k0, k1):
    """log E = -gumbel, as `sampler_cpu.log_exponential` of `token_hash`."""
    h = token * _TOKEN_MIX_0
    h ^= (h >> 15) & 0x1FFFF
    h *= _TOKEN_MIX_1
    h ^= (h >> 13) & 0x7FFFF
    h = (h ^ k0) * _NOISE_MIX_0
    h ^= h >> 15
    h = (h + k1) * _NOISE_MIX_1
    h ^= h >> 16
    v = (h.to(tl.float32) + 0.5) * _UNIT
    # 1 - v rounds, so a small v, where the winners are, needs the first terms of -log(1 - v) instead.
    series = v * (1.0 + v * (0.5 + v * (0.33333333 + v * 0.25)))
    return tl.log(tl.where(v < 0.015625, series, -tl.log(1.0 - v)))


@triton.jit
def _best_kernel(
    token_ptr,  # only if redirected: int64 [1], 0 = do nothing
    best_ptr,  # float32 [rows, chunks], written: the highest score of the chunk
    index_ptr,  # int32 [rows, chunks], written: its token, the first among equals; INVALID_TOKEN if there is a NaN
    x_ptr,  # [rows, vocab]
    x_stride,
    threshold_ptr,  # float32 [rows]
    slot_ptr,  # int [rows]
    position_ptr,  # int [rows]
    params_ptr,  # int32 [slots, Param.COUNT]
    vocab,
    redirected: tl.constexpr,
    sample: tl.constexpr,
    filtered: tl.constexpr,
    chunk: tl.constexpr,
):
    if redirected:
        address = tl.load(token_ptr)
        if address == 0:
            return
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * chunk + tl.arange(0, chunk)
    inside = token < vocab
    x = tl.load(x_ptr + row * x_stride + token, mask=inside, other=-float("inf")).to(tl.float32)
    nans = tl.max((x != x).to(tl.int32), 0)
    if sample:
        param = params_ptr + tl.load(slot_ptr + row).to(tl.int64) * _PARAMS
        temperature = float_param(param, _TEMPERATURE)
        asks = ((tl.load(param + _FEATURES) & _SAMPLE) != 0) & (tl.load(param + _TOP_K) != 1)
        if asks & (temperature >= _MIN_TEMPERATURE):
            if filtered:
                x = tl.where(x < tl.load(threshold_ptr + row), -float("inf"), x)
            if tl.max(x, 0) > -float("inf"):  # of few logits that are kept, most programs have none
                k0, k1 = _noise_key(param, tl.load(position_ptr + row))
                x = x * (1.0 / temperature) - _log_exponential(token, k0, k1)
    score = tl.where(inside & (x == x), x, -float("inf"))
    best = tl.max(score, 0)
    index = tl.min(tl.where(inside & (score == best), token, _NO_INDEX), 0)
    at = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(best_ptr + at, best)
    tl.store(index_ptr + at, tl.where(nans > 0, _INVALID, index))


@triton.jit
def _choose_kernel(
    token_ptr,  # int32 [rows], written; if redirected, int64 [1] with the address of such a column, 0 = do nothing
    last_token_ptr,  # int64 [slots], written: the carry-over
    best_ptr,  # float32 [rows, chunks]
    index_ptr,  # int32 [rows, chunks]
    slot_ptr,  # int [rows]
    row_sample_ptr,  # int32 [rows]
    params_ptr,  # int32 [slots, Param.COUNT]
    counts_ptr,  # int16 [slots, vocab], updated
    vocab,
    chunks,
    redirected: tl.constexpr,
    count_tokens: tl.constexpr,
    lanes: tl.constexpr,
):
    column_ptr = token_ptr
    if redirected:
        address = tl.load(token_ptr)
        if address == 0:
            return
        column_ptr = address.to(tl.pointer_type(tl.int32))
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, lanes)
    best = tl.load(best_ptr + row * chunks + lane, mask=lane < chunks, other=-float("inf"))
    index = tl.load(index_ptr + row * chunks + lane, mask=lane < chunks, other=_NO_INDEX)
    token = tl.min(tl.where(best == tl.max(best, 0), index, _NO_INDEX), 0)
    token = tl.where(tl.min(index, 0) < 0, _INVALID, token)
    tl.store(column_ptr + row, token)
    slot = tl.load(slot_ptr + row).to(tl.int64)
    # The next step may be queued already and must not index outside the embedding.
    tl.store(last_token_ptr + slot, tl.maximum(token, 0).to(tl.int64))
    if count_tokens:
        asks = (tl.load(params_ptr + slot * _PARAMS + _FEATURES) & _PENALTY) != 0
        if asks & (tl.load(row_sample_ptr + row) != 0) & (token >= 0):
            at = counts_ptr + slot * vocab + token
            tl.store(at, tl.minimum(tl.load(at).to(tl.int32) + 2, _MAX_COUNT).to(tl.int16))
