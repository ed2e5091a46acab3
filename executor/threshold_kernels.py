"""The smallest logit that each row's filters keep, as Triton kernels: top-k, top-p and min-p without sorting.

Called by `executor.sampler_kernels`; must choose what `sampler_cpu.filter_threshold` would choose.

    probe         what is above a few thresholds                       (rows, chunks)
    threshold     the range between two of them, searched to its end   (rows)
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import triton
import triton.language as tl

from executor.sampler_cpu import MIN_TEMPERATURE, SlotTables
from ipc.frames import Param, PlanFlag

CHUNK: Final = 4096  # logits of one program of `probe`
_PROBES: Final = 32  # thresholds that `probe` tries for each row
_SEARCH_BLOCK: Final = 8192  # logits `threshold` reads at once; so few candidates need no further pass over the row
_FEW_BLOCK: Final = 2048  # candidates it reads at once

_PARAMS = tl.constexpr(int(Param.COUNT))
_FEATURES = tl.constexpr(int(Param.FEATURES))
_TEMPERATURE = tl.constexpr(int(Param.TEMPERATURE))
_TOP_K = tl.constexpr(int(Param.TOP_K))
_TOP_P = tl.constexpr(int(Param.TOP_P))
_MIN_P = tl.constexpr(int(Param.MIN_P))
_FILTER = tl.constexpr(int(PlanFlag.FILTER))
_MIN_TEMPERATURE = tl.constexpr(MIN_TEMPERATURE)
_LOG2_E = tl.constexpr(1.4426950408889634)
_NO_INDEX = tl.constexpr(2**31 - 1)


@dataclass(frozen=True, slots=True)
class Summary:
    """What `prepare` saw of each row; NaN counts as -inf."""

    number: torch.Tensor  # int32 [rows, chunks]: logits above -inf
    least: torch.Tensor  # float32 [rows, chunks], the least of those
    greatest: torch.Tensor  # float32 [rows, chunks], the greatest


def filter_threshold(tables: SlotTables, x: torch.Tensor, summary: Summary, row_slot: torch.Tensor) -> torch.Tensor:
    """float32 [rows]: the smallest logit of x [rows, vocab] that each row's filters keep; -inf where it has none."""
    rows, vocab = x.shape
    chunks = summary.number.shape[1]
    lanes = triton.next_power_of_2(chunks)
    number = torch.empty(rows, chunks, _PROBES, dtype=torch.int32, device=x.device)
    mass = torch.empty(rows, chunks, _PROBES, dtype=torch.float32, device=x.device)
    _probe_kernel[(rows, chunks)](
        number, mass, x, summary.least, summary.greatest, row_slot, tables.params, vocab, CHUNK, lanes, _PROBES,
        num_warps=8,
    )  # fmt: skip
    threshold = torch.empty(rows, dtype=torch.float32, device=x.device)
    few = torch.empty(rows, _SEARCH_BLOCK, dtype=x.dtype, device=x.device)
    _threshold_kernel[(rows,)](
        threshold, few, x, summary.number, summary.least, summary.greatest, number, mass, row_slot, tables.params,
        vocab, chunks, lanes, _PROBES, _SEARCH_BLOCK, _FEW_BLOCK, num_warps=16,
    )  # fmt: skip
    return threshold


@triton.jit
def float_param(param, column):
    return tl.load(param + column).to(tl.float32, bitcast=True)


@triton.jit
def _load_ordered(src, token, count):
    """Logits as float32, with -inf for NaN and past the end, so that every comparison has an answer."""
    x = tl.load(src + token, mask=token < count, other=-float("inf")).to(tl.float32)
    return tl.where(x == x, x, -float("inf"))


@triton.jit
def _probes(low, top, probes: tl.constexpr):
    """Thresholds [probes], evenly spaced from near `top` down to `low`."""
    probe = tl.arange(0, probes)
    return tl.where(probe == probes - 1, low, top - (top - low) * ((probe + 1) / probes))


@triton.jit
def _probe_kernel(
    number_ptr,  # int32 [rows, chunks, probes], written: how many logits of the chunk are no less than the threshold
    mass_ptr,  # float32 [rows, chunks, probes], written: their mass, see `_measure`
    x_ptr,  # float32 [rows, vocab]
    least_ptr,  # float32 [rows, chunks]
    greatest_ptr,  # float32 [rows, chunks]
    slot_ptr,  # int [rows]
    params_ptr,  # int32 [slots, Param.COUNT]
    vocab,
    chunk: tl.constexpr,
    lanes: tl.constexpr,
    probes: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    chunks = tl.num_programs(1)
    param = params_ptr + tl.load(slot_ptr + row).to(tl.int64) * _PARAMS
    temperature = float_param(param, _TEMPERATURE)
    if ((tl.load(param + _FEATURES) & _FILTER) != 0) & (temperature >= _MIN_TEMPERATURE):
        low, top = _range(least_ptr + row * chunks, greatest_ptr + row * chunks, chunks, lanes)
        threshold = _probes(low, top, probes)
        x = _load_ordered(x_ptr + row * vocab, tl.program_id(1) * chunk + tl.arange(0, chunk), vocab)
        weight = tl.exp2((x - top) * (_LOG2_E / temperature))
        probe = tl.arange(0, probes)
        number = tl.zeros([probes], tl.int32)
        mass = tl.zeros([probes], tl.float32)
        for i in range(probes):
            kept = x >= tl.sum(tl.where(probe == i, threshold, 0.0), 0)
            number += tl.where(probe == i, tl.sum(kept.to(tl.int32), 0), 0)
            mass += tl.where(probe == i, tl.sum(tl.where(kept, weight, 0.0), 0), 0.0)
        at = (row * chunks + tl.program_id(1)) * probes + probe
        tl.store(number_ptr + at, number)
        tl.store(mass_ptr + at, mass)


@triton.jit
def _range(least_ptr, greatest_ptr, chunks, lanes: tl.constexpr):
    """The least logit of a row above -inf, and the greatest of all."""
    lane = tl.arange(0, lanes)
    least = tl.load(least_ptr + lane, mask=lane < chunks, other=float("inf"))
    greatest = tl.load(greatest_ptr + lane, mask=lane < chunks, other=-float("inf"))
    return tl.min(least, 0), tl.max(greatest, 0)


@triton.jit
def _measure(src, count, mid, top, scale, by_mass: tl.constexpr, block: tl.constexpr):
    """Of the `count` logits at `src`: how many are >= mid, their measure, the least of them, the greatest below mid.

    The measure is their number, or the mass sum(exp2((x - top) * scale)). It never falls as mid falls, because what is
    left out adds exact zeros in a fixed order.
    """
    number = tl.zeros([block], tl.int32)
    mass = tl.zeros([block], tl.float32)
    least = tl.full([block], float("inf"), tl.float32)
    below = tl.full([block], -float("inf"), tl.float32)
    for start in range(0, count, block):
        x = _load_ordered(src, start + tl.arange(0, block), count)
        kept = x >= mid
        number += kept.to(tl.int32)
        if by_mass:
            mass += tl.where(kept, tl.exp2((x - top) * scale), 0.0)
        least = tl.minimum(least, tl.where(kept, x, float("inf")))
        below = tl.maximum(below, tl.where(kept, -float("inf"), x))
    total = tl.sum(number, 0)
    if by_mass:
        measure = tl.sum(mass, 0)
    else:
        measure = total.to(tl.float32)
    return total, measure, tl.min(least, 0), tl.max(below, 0)


@triton.jit
def _search(
    src, count, low, high, number, enough, base, target, top, scale, by_mass: tl.constexpr, block: tl.constexpr
):  # fmt: skip
    """Narrow [low, high] around the greatest logit t at `src` such that base + measure(x >= t) >= target.

    `number` logits are >= low. Ends when low is t, or when no more than `enough` are left. Returns low, high, number.
    Probes go down from high in growing strides until one is too low, and halve the interval from there. An end moves to
    the nearest logit, never to a value between two, so ties end the search, and so does any spread of values.
    """
    stride = 4.0
    while (low < high) & (number > enough):
        mid = tl.maximum(low + (high - low) * 0.5, high - stride)
        mid = tl.where((mid > low) & (mid <= high), mid, high)
        kept, measure, least, below = _measure(src, count, mid, top, scale, by_mass, block)
        measure += base
        if measure >= target:
            low = least
            number = kept
            if not by_mass:
                high = tl.where(measure == target, least, high)  # as many as wanted: a lower t only adds
        else:
            high = below
            stride *= 4.0
    return low, high, number


@triton.jit
def _gather(dst, src, count, low, limit, block: tl.constexpr):
    """Copy the logits in [low, limit), no more than `block`, to `dst`, where this program may read them afterwards.

    A limit of NaN is none. Returns how many there are.
    """
    number = 0
    for start in range(0, count, block):
        x = _load_ordered(src, start + tl.arange(0, block), count)
        kept = ((x >= low) & ~(x >= limit)).to(tl.int32)
        tl.store(dst + number + tl.cumsum(kept, 0) - 1, x, mask=kept != 0)
        number += tl.sum(kept, 0)
    tl.debug_barrier()
    return number


@triton.jit
def _greatest(
    row_ptr, vocab, few_ptr, few, low, high, number, target, top, scale, by_mass: tl.constexpr, block: tl.constexpr,
    few_block: tl.constexpr,
):  # fmt: skip
    """The greatest t in [low, high] such that measure(x >= t) >= target; `number` logits are >= low.

    The row is read until no more than `block` candidates are left. They go to `few_ptr`, and the search goes on there.
    `few` is how many it holds already, 0 = none. Returns t and the new `few`.
    """
    if few == 0:
        low, high, number = _search(row_ptr, vocab, low, high, number, block, 0.0, target, top, scale, by_mass, block)
        if number <= block:
            few = _gather(few_ptr, row_ptr, vocab, low, float("nan"), block)
    low, high, number = _search(few_ptr, few, low, high, number, 0, 0.0, target, top, scale, by_mass, few_block)
    return low, few


@triton.jit
def _probed(number, mass, measure, threshold, target):
    """Of probed thresholds that rise in what they keep: the highest one whose measure reaches the target, how many it
    keeps; the one above it, and how many and which mass that keeps."""
    reached = measure >= target
    low = tl.max(tl.where(reached, threshold, -float("inf")), 0)
    above = tl.min(tl.where(reached, float("inf"), threshold), 0)
    kept = tl.min(tl.where(reached, number, _NO_INDEX), 0)
    return low, kept, above, tl.max(tl.where(reached, 0, number), 0), tl.max(tl.where(reached, 0.0, mass), 0)


@triton.jit
def _threshold_kernel(
    threshold_ptr,  # float32 [rows], written
    few_ptr,  # float32 [rows, block], scratch
    x_ptr,  # float32 [rows, vocab]
    number_ptr,  # int32 [rows, chunks]
    least_ptr,  # float32 [rows, chunks]
    greatest_ptr,  # float32 [rows, chunks]
    probed_number_ptr,  # int32 [rows, chunks, probes]
    probed_mass_ptr,  # float32 [rows, chunks, probes]
    slot_ptr,  # int [rows]
    params_ptr,  # int32 [slots, Param.COUNT]
    vocab,
    chunks,
    lanes: tl.constexpr,
    probes: tl.constexpr,
    block: tl.constexpr,
    few_block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    param = params_ptr + tl.load(slot_ptr + row).to(tl.int64) * _PARAMS
    threshold = -float("inf")
    temperature = float_param(param, _TEMPERATURE)
    if ((tl.load(param + _FEATURES) & _FILTER) != 0) & (temperature >= _MIN_TEMPERATURE):
        row_ptr = x_ptr + row * vocab
        few_ptr += row * block
        top_k = tl.load(param + _TOP_K)
        top_p = float_param(param, _TOP_P)
        scale = _LOG2_E / temperature
        lane = tl.arange(0, lanes)
        number = tl.sum(tl.load(number_ptr + row * chunks + lane, mask=lane < chunks, other=0), 0)
        least, top = _range(least_ptr + row * chunks, greatest_ptr + row * chunks, chunks, lanes)
        probe = _probes(least, top, probes)
        at = (row * chunks + lane[:, None]) * probes + tl.arange(0, probes)[None, :]
        numbers = tl.sum(tl.load(probed_number_ptr + at, mask=lane[:, None] < chunks, other=0), 0)
        masses = tl.sum(tl.load(probed_mass_ptr + at, mask=lane[:, None] < chunks, other=0.0), 0)
        low = least
        threshold = top + tl.log(float_param(param, _MIN_P)) * temperature
        few = 0
        if (top_k > 0) & (top_k < number):
            target = top_k.to(tl.float32)
            low, number, limit, _, _ = _probed(numbers, masses, numbers, probe, top_k)
            low, few = _greatest(
                row_ptr, vocab, few_ptr, few, low, tl.minimum(limit, top), number, target, top, scale, False, block,
                few_block,
            )  # fmt: skip
        threshold = tl.maximum(threshold, low)
        if top_p < 1.0:
            if (few == 0) & (threshold == least):
                target = tl.max(masses, 0) * top_p
                low, number, limit, more, base = _probed(numbers, masses, masses, probe, target)
                low = tl.maximum(low, least)
                if number - more <= block:
                    few = _gather(few_ptr, row_ptr, vocab, low, limit, block)
                    low, _, _ = _search(
                        few_ptr, few, low, tl.minimum(limit, top), few, 0, base, target, top, scale, True, few_block
                    )
                else:
                    low, few = _greatest(
                        row_ptr, vocab, few_ptr, few, low, tl.minimum(limit, top), number, target, top, scale, True,
                        block, few_block,
                    )  # fmt: skip
            else:
                if few == 0:
                    number, mass, low, _ = _measure(row_ptr, vocab, threshold, top, scale, True, block)
                else:
                    number, mass, low, _ = _measure(few_ptr, few, threshold, top, scale, True, few_block)
                low, few = _greatest(
                    row_ptr, vocab, few_ptr, few, low, top, number, mass * top_p, top, scale, True, block, few_block
                )
            threshold = tl.maximum(threshold, low)
    tl.store(threshold_ptr + row, threshold)
