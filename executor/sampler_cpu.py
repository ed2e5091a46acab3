"""The arithmetic of sampling, and its stages on the CPU. Called by `Sampler`; the oracle of the Triton kernels.

Row parameters are read with numpy, because a small torch operation costs more than it computes; whole rows of logits go
through torch. A stage runs on the rows that ask for it and leaves the others' bits alone. All of it depends on one row
only, never on how rows are batched.

Noise of (seed, position, token), on 32-bit lanes so that the CPU and the GPU agree on every bit of the integers:
    key    output number `position` of SplitMix64 (Steele et al. 2014) started at `seed`: two int32, k0 and k1
    h      two multiply-xorshift rounds of token_hash[token] ^ k0, with k1 added between them: 31 bits
    v      (h + 1/2) / 2**31, strictly inside (0, 1), with the full precision of a float32 near 0
    E      -log(1 - v), exponential; gumbel = -log(E). The likely winners have small v, where v is the most precise
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from ipc.frames import INVALID_TOKEN, Float32, Int32, Int64, Param, PlanFlag

MIN_TEMPERATURE: Final = 1e-5  # below it a row is greedy, as in vLLM: logits / T would leave no room for the noise

MAX_COUNT: Final = 32767  # int16: 16383 times generated, and everything above counts as that


def _signed(word: int) -> int:
    """The int32 with the bits of `word`."""
    return word - (1 << 32) if word >> 31 else word


TOKEN_MIX: Final = (_signed(0x9E3779B1), _signed(0x85EBCA6B))
NOISE_MIX: Final = (_signed(0x7FEB352D), _signed(0x846CA68B))
SPLIT_MIX: Final = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
UNIT: Final = (1.0 - 2.0**-24) / 2.0**31  # maps 2**31, to which the largest h rounds, to just below 1

_NEEDS_FLOAT: Final = PlanFlag.SAMPLE | PlanFlag.FILTER | PlanFlag.PENALTY | PlanFlag.BIAS


@dataclass(frozen=True, slots=True)
class SlotTables:
    """What sampling keeps for each slot, on the device."""

    params: torch.Tensor  # int32 [slots, Param.COUNT]
    bias_token: torch.Tensor  # int32 [slots, MAX_BIAS]; the first NUM_BIAS count
    bias_value: torch.Tensor  # float32 [slots, MAX_BIAS]
    bias_until: torch.Tensor  # int32 [slots, MAX_BIAS]
    token_counts: torch.Tensor  # int16 [slots, vocab], bit 0: in the prompt; count << 1: times generated
    token_hash: torch.Tensor  # int32 [vocab]
    last_token: torch.Tensor  # int64 [slots]: the carry-over, 0 where a row's logits held a NaN


def token_hash(vocab_size: int) -> torch.Tensor:
    """int32 [vocab]: the part of the noise that only the token decides. A bijection, so no two tokens share noise."""
    h = torch.arange(vocab_size, dtype=torch.int32) * TOKEN_MIX[0]
    h ^= (h >> 15) & 0x1FFFF
    h *= TOKEN_MIX[1]
    return h ^ ((h >> 13) & 0x7FFFF)


def choose_tokens(
    tables: SlotTables,
    logits: torch.Tensor,  # [rows, vocab]
    row_slot: torch.Tensor,  # int [rows]
    position: torch.Tensor,  # int [rows]
    row_sample: torch.Tensor,  # int32 [rows]
    flags: PlanFlag,
) -> torch.Tensor:
    """int32 [rows]: the chosen token, INVALID_TOKEN where the logits hold a NaN. The contract of `Sampler.sample`."""
    if not flags & _NEEDS_FLOAT:
        return _carry_over(tables, row_slot, _first_max(logits))
    slot: Int64 = row_slot.numpy()
    at: Int64 = position.numpy()
    params: Int32 = tables.params.numpy()[slot]
    features = params[:, Param.FEATURES] & int(flags)
    x = logits.to(torch.float32, copy=True)
    if flags & PlanFlag.BIAS:
        rows = np.flatnonzero(features & PlanFlag.BIAS)
        _add_bias(tables, x, rows, slot[rows], at[rows], params[rows, Param.NUM_BIAS])
    penalized = np.flatnonzero(features & PlanFlag.PENALTY)
    if len(penalized):
        _penalize(tables, x, penalized, slot[penalized], params[penalized])
    if flags & PlanFlag.SAMPLE:
        _filter_and_perturb(tables, x, at, params, features)
    token = _first_max(x)
    if len(penalized):
        _count(tables, penalized, slot, token.numpy(), row_sample.numpy())
    return _carry_over(tables, row_slot, token)


def _carry_over(tables: SlotTables, row_slot: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """`token`, which the next step of its slot finds as its input."""
    tables.last_token.index_copy_(0, row_slot.long(), token.clamp(min=0).long())
    return token


def _first_max(x: torch.Tensor) -> torch.Tensor:
    best, token = x.max(dim=1)
    return torch.where(best == best, token, INVALID_TOKEN).to(torch.int32)


def _floats(params: Int32, column: Param) -> Float32:
    return params[:, column].copy().view(np.float32)


def _column(values: npt.NDArray[Any]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).unsqueeze(1)


def _add_bias(tables: SlotTables, x: torch.Tensor, rows: Int64, slot: Int64, at: Int64, num_bias: Int32) -> None:
    if not len(rows):
        return
    used = int(num_bias.max())
    applies = (np.arange(used) < num_bias[:, None]) & (at[:, None] < tables.bias_until.numpy()[slot, :used])
    row, entry = np.nonzero(applies)
    token, value = tables.bias_token.numpy()[slot[row], entry], tables.bias_value.numpy()[slot[row], entry]
    # Unbuffered, because a token can stand twice in a table: biased by the user, and forbidden until min_tokens.
    np.add.at(x.numpy(), (rows[row], token), value)


def _penalize(tables: SlotTables, x: torch.Tensor, rows: Int64, slot: Int64, params: Int32) -> None:
    """Repetition: arXiv 1909.05858, section 4.1. Frequency and presence: OpenAI's API reference."""
    repetition, frequency, presence = (
        _column(_floats(params, column)) for column in (Param.REPETITION, Param.FREQUENCY, Param.PRESENCE)
    )
    counts = tables.token_counts[torch.from_numpy(slot)]
    row = torch.from_numpy(rows)
    values = x[row]
    repeated = torch.where(values > 0, values / repetition, values * repetition)
    values = torch.where(counts != 0, repeated, values)
    generated = counts >> 1
    x[row] = values - frequency * generated - presence * (generated > 0)


def _filter_and_perturb(tables: SlotTables, x: torch.Tensor, at: Int64, params: Int32, features: Int32) -> None:
    """Turn the logits of sampled rows into scores whose argmax is the sample; other rows stay as they are."""
    # top_k = 1 is greedy by definition; among tied maxima the noise would choose otherwise.
    sampled = (features & PlanFlag.SAMPLE != 0) & (_floats(params, Param.TEMPERATURE) >= MIN_TEMPERATURE)
    rows = np.flatnonzero(sampled & (params[:, Param.TOP_K] != 1))
    if not len(rows):
        return
    params, features = params[rows], features[rows]
    row = torch.from_numpy(rows)
    scores = x[row]
    temperature = _floats(params, Param.TEMPERATURE)
    filtered = np.flatnonzero(features & PlanFlag.FILTER)
    if len(filtered):
        threshold = np.full(len(rows), -np.inf, np.float32)
        threshold[filtered] = filter_threshold(
            scores.numpy()[filtered],
            temperature[filtered],
            params[filtered, Param.TOP_K],
            _floats(params, Param.TOP_P)[filtered],
            _floats(params, Param.MIN_P)[filtered],
        )
        scores.masked_fill_(scores < _column(threshold), -torch.inf)
    scores *= _column(np.float32(1) / temperature)
    keys = noise_keys(params[:, Param.SEED_LOW], params[:, Param.SEED_HIGH], at[rows])
    scores -= log_exponential(tables.token_hash, torch.from_numpy(keys))
    x[row] = scores


def filter_threshold(
    x: Float32,  # [rows, vocab], before temperature
    temperature: Float32,  # [rows]
    top_k: Int32,  # [rows], 0 = off
    top_p: Float32,  # [rows], 1 = off
    min_p: Float32,  # [rows], 0 = off
) -> Float32:
    """float32 [rows]: the smallest logit that survives; whatever equals it survives too."""
    vocab = x.shape[1]
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):  # of min_p = 0, and of logits without meaning
        descending = np.sort(x, axis=1)[:, ::-1]
        top = descending[:, 0]
        threshold = top + np.log(min_p) * temperature
        last = np.where((top_k <= 0) | (top_k > vocab), vocab, top_k) - 1
        threshold = np.maximum(threshold, descending[np.arange(len(x)), last])
        weight = np.exp((descending - top[:, None]) * (np.float32(1) / temperature)[:, None])
        mass = np.cumsum(np.where(descending >= threshold[:, None], weight, 0), axis=1, dtype=np.float64)
        last = np.minimum((mass < mass[:, -1:] * top_p[:, None]).sum(axis=1), vocab - 1)
        nucleus = np.maximum(threshold, descending[np.arange(len(x)), last])
        kept: Float32 = np.where(top_p < 1, nucleus, threshold)
    return kept


def noise_keys(seed_low: Int32, seed_high: Int32, position: Int64) -> Int32:
    """int32 [rows, 2]: k0 and k1 of each row, the low and the high word of a SplitMix64 output."""
    seed = seed_low.astype(np.uint32).astype(np.uint64) | seed_high.astype(np.uint32).astype(np.uint64) << np.uint64(32)
    z = seed + (position.astype(np.uint64) + np.uint64(1)) * np.uint64(SPLIT_MIX[0])
    z = (z ^ (z >> np.uint64(30))) * np.uint64(SPLIT_MIX[1])
    z = (z ^ (z >> np.uint64(27))) * np.uint64(SPLIT_MIX[2])
    z ^= z >> np.uint64(31)
    low, high = z & np.uint64(0xFFFFFFFF), z >> np.uint64(32)
    return np.stack([low, high], axis=1).astype(np.uint32).view(np.int32)


def log_exponential(hashes: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """float32 [rows, vocab]: log E = -gumbel. hashes: int32 [vocab], of `token_hash`; keys: int32 [rows, 2]."""
    h = hashes ^ keys[:, :1]
    h *= NOISE_MIX[0]
    h ^= h >> 15
    h += keys[:, 1:]
    h *= NOISE_MIX[1]
    h ^= h >> 16  # an arithmetic shift: the sign cancels itself, 31 bits are left
    return h.to(torch.float32).add_(0.5).mul_(UNIT).neg_().log1p_().neg_().log_()


def _count(tables: SlotTables, rows: Int64, slot: Int64, token: Int32, row_sample: Int32) -> None:
    rows = rows[(row_sample[rows] != 0) & (token[rows] != INVALID_TOKEN)]
    counts = tables.token_counts.numpy()
    index = (slot[rows], token[rows])
    counts[index] = np.minimum(counts[index].astype(np.int32) + 2, MAX_COUNT)
