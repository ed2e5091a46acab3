"""The smallest logit that each row's filters keep, as Triton kernels: top-k, top-p and min-p without sorting.

Called by `executor.sampler_kernels`; must choose what `sampler_cpu.filter_threshold` would choose.

    probe         what is above each of a few thresholds            (rows, chunks)
    gather        list the logits between the right two of them     (rows, chunks)
    threshold     search the list                                   (rows)
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
_PROBE_BLOCK: Final = 128  # logits it compares at once with all of them
_FEW: Final = 16384  # logits between two thresholds that are listed; more are looked for in the row itself
_SEARCH_BLOCK: Final = 2048  # logits that `threshold` reads at once

_PARAMS = tl.constexpr(int(Param.COUNT))
_FEATURES = tl.constexpr(int(Param.FEATURES))
_TEMPERATURE = tl.constexpr(int(Param.TEMPERATURE))
_TOP_K = tl.constexpr(int(Param.TOP_K))
_TOP_P = tl.constexpr(int(Param.TOP_P))
_MIN_P = tl.constexpr(int(Param.MIN_P))
_FILTER = tl.constexpr(int(PlanFlag.FILTER))
_MIN_TEMPERATURE = tl.constexpr(MIN_TEMPERATURE)
_BRACKET = tl.constexpr(6)
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
        number, mass, x, summary.number, summary.least, summary.greatest, row_slot, tables.params, vocab, CHUNK, lanes,
        _PROBES, _PROBE_BLOCK, num_warps=8,
    )  # fmt: skip
    few = torch.empty(rows, _FEW, dtype=torch.float32, device=x.device)
    found = torch.empty(rows, 2, dtype=torch.int32, device=x.device)
    bracket = torch.empty(rows, 6, dtype=torch.float32, device=x.device)
    _gather_kernel[(rows, chunks)](
        few, found, bracket, x, summary.number, summary.least, summary.greatest, number, mass, row_slot, tables.params,
        vocab, CHUNK, lanes, _PROBES, _FEW, num_warps=4,
    )  # fmt: skip
    threshold = torch.empty(rows, dtype=torch.float32, device=x.device)
    _threshold_kernel[(rows,)](
        threshold, few, found, bracket, x, row_slot, tables.params, vocab, _FEW, _SEARCH_BLOCK, num_warps=8
    )
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
def _range(least_ptr, greatest_ptr, chunks, lanes: tl.constexpr):
    """The least logit of a row above -inf, and the greatest of all."""
    lane = tl.arange(0, lanes)
    least = tl.load(least_ptr + lane, mask=lane < chunks, other=float("inf"))
    greatest = tl.load(greatest_ptr + lane, mask=lane < chunks, other=-float("inf"))
    return tl.min(least, 0), tl.max(greatest, 0)


@triton.jit
def _probes(least, top, probes: tl.constexpr):
    """Thresholds [probes], evenly spaced from near `top` down to `least`."""
    probe = tl.arange(0, probes)
    return tl.where(probe == probes - 1, least, top - (top - least) * ((probe + 1) / probes))


@triton.jit
def _filters(param):
    """Whether a row filters, and its temperature."""
    temperature = float_param(param, _TEMPERATURE)
    return ((tl.load(param + _FEATURES) & _FILTER) != 0) & (temperature >= _MIN_TEMPERATURE), temperature


@triton.jit
def _asks_by_number(param, number_ptr, chunks, lanes: tl.constexpr):
    """Whether a row's k greatest are fewer than its logits above -inf, and how many those are."""
    lane = tl.arange(0, lanes)
    number = tl.sum(tl.load(number_ptr + lane, mask=lane < chunks, other=0), 0)
    top_k = tl.load(param + _TOP_K)
    return (top_k > 0) & (top_k < number), number


@triton.jit
def _probe_kernel(
    probed_number_ptr,  # int32 [rows, chunks, probes], written: how many logits of a chunk are no less than a threshold
    probed_mass_ptr,  # float32 [rows, chunks, probes], written: their mass, see `_measure`; 0 where numbers will do
    x_ptr,  # float32 [rows, vocab]
    number_ptr,  # int32 [rows, chunks]
    least_ptr,  # float32 [rows, chunks]
    greatest_ptr,  # float32 [rows, chunks]
    slot_ptr,  # int [rows]
    params_ptr,  # int32 [slots, Param.COUNT]
    vocab,
    chunk: tl.constexpr,
    lanes: tl.constexpr,
    probes: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    chunks = tl.num_programs(1)
    param = params_ptr + tl.load(slot_ptr + row).to(tl.int64) * _PARAMS
    filters, temperature = _filters(param)
    if filters:
        least, top = _range(least_ptr + row * chunks, greatest_ptr + row * chunks, chunks, lanes)
        threshold = _probes(least, top, probes)[:, None]
        by_number, _ = _asks_by_number(param, number_ptr + row * chunks, chunks, lanes)
        number = tl.zeros([probes, block], tl.int32)
        mass = tl.zeros([probes, block], tl.float32)
        first = tl.program_id(1) * chunk
        for start in range(first, first + chunk, block):
            x = _load_ordered(x_ptr + row * vocab, start + tl.arange(0, block), vocab)[None, :]
            kept = x >= threshold
            number += kept.to(tl.int32)
            if not by_number:
                mass += tl.where(kept, tl.exp2((x - top) * (_LOG2_E / temperature)), 0.0)
        at = (row * chunks + tl.program_id(1)) * probes + tl.arange(0, probes)
        tl.store(probed_number_ptr + at, tl.sum(number, 1))
        tl.store(probed_mass_ptr + at, tl.sum(mass, 1))


@triton.jit
def _gather_kernel(
    few_ptr,  # float32 [rows, most], written: the logits to search, if there are no more
    found_ptr,  # int32 [rows, 2], written: how many those are, -1 = search the row; how many are above -inf
    bracket_ptr,  # float32 [rows, 6], written: least, greatest; what is looked for is in low .. high; base, total
    x_ptr,  # float32 [rows, vocab]
    number_ptr,  # int32 [rows, chunks]
    least_ptr,  # float32 [rows, chunks]
    greatest_ptr,  # float32 [rows, chunks]
    probed_number_ptr,  # int32 [rows, chunks, probes]
    probed_mass_ptr,  # float32 [rows, chunks, probes]
    slot_ptr,  # int [rows]
    params_ptr,  # int32 [slots, Param.COUNT]
    vocab,
    chunk: tl.constexpr,
    lanes: tl.constexpr,
    probes: tl.constexpr,
    most: tl.constexpr,
):
    """Between which probed thresholds a row's search ends: of its k greatest if it asks for them, else of its nucleus.

    Of a nucleus those between are listed: what is above has `base` of the `total` mass. Of the k greatest all down to
    the lower threshold are, since a nucleus may have to be found among them; its total, -1, is to be measured then.
    """
    row = tl.program_id(0).to(tl.int64)
    chunks = tl.num_programs(1)
    param = params_ptr + tl.load(slot_ptr + row).to(tl.int64) * _PARAMS
    filters, temperature = _filters(param)
    if filters:
        lane = tl.arange(0, lanes)
        least, top = _range(least_ptr + row * chunks, greatest_ptr + row * chunks, chunks, lanes)
        by_number, number = _asks_by_number(param, number_ptr + row * chunks, chunks, lanes)
        at = (row * chunks + lane[:, None]) * probes + tl.arange(0, probes)[None, :]
        numbers = tl.load(probed_number_ptr + at, mask=lane[:, None] < chunks, other=0)
        masses = tl.sum(tl.load(probed_mass_ptr + at, mask=lane[:, None] < chunks, other=0.0), 0)
        top_k = tl.load(param + _TOP_K)
        top_p = float_param(param, _TOP_P)
        by_mass = ~by_number & (top_p < 1.0) & (top + tl.log(float_param(param, _MIN_P)) * temperature <= least)
        probe = _probes(least, top, probes)
        total = tl.max(masses, 0)
        reached = tl.where(by_number, tl.sum(numbers, 0) >= top_k, masses >= total * top_p)
        low = tl.maximum(tl.max(tl.where(reached, probe, -float("inf")), 0), least)
        limit = tl.min(tl.where(reached, float("inf"), probe), 0)
        above = tl.max(tl.where(reached[None, :] | by_number, 0, numbers), 1)
        listed = tl.where(lane < chunks, tl.min(tl.where(reached[None, :], numbers, _NO_INDEX), 1) - above, 0)
        few = tl.sum(listed, 0)
        fits = (by_number | by_mass) & (few <= most)
        if fits:
            first = tl.sum(tl.where(lane < tl.program_id(1), listed, 0), 0)
            x = _load_ordered(x_ptr + row * vocab, tl.program_id(1) * chunk + tl.arange(0, chunk), vocab)
            kept = ((x >= low) & (by_number | ~(x >= limit))).to(tl.int32)
            tl.store(few_ptr + row * most + first + tl.cumsum(kept, 0) - 1, x, mask=kept != 0)
        if tl.program_id(1) == 0:
            tl.store(found_ptr + row * 2, tl.where(fits, few, -1))
            tl.store(found_ptr + row * 2 + 1, number)
            bracket = bracket_ptr + row * _BRACKET
            tl.store(bracket, least)
            tl.store(bracket + 1, top)
            tl.store(bracket + 2, low)
            tl.store(bracket + 3, tl.minimum(limit, top))
            tl.store(bracket + 4, tl.where(fits & by_mass, tl.max(tl.where(reached, 0.0, masses), 0), 0.0))
            tl.store(bracket + 5, tl.where(by_mass, total, -1.0))


@triton.jit
def _measure(src, count, mid, top, scale, block: tl.constexpr):
    """Of the `count` logits at `src`: how many are >= mid, their mass, the least of them, the greatest below mid.

    The mass is sum(exp2((x - top) * scale)). It never falls as mid falls, because what is left out adds exact zeros in
    a fixed order.
    """
    number = tl.zeros([block], tl.int32)
    mass = tl.zeros([block], tl.float32)
    least = tl.full([block], float("inf"), tl.float32)
    below = tl.full([block], -float("inf"), tl.float32)
    for start in range(0, count, block):
        x = _load_ordered(src, start + tl.arange(0, block), count)
        kept = x >= mid
        number += kept.to(tl.int32)
        mass += tl.where(kept, tl.exp2((x - top) * scale), 0.0)
        least = tl.minimum(least, tl.where(kept, x, float("inf")))
        below = tl.maximum(below, tl.where(kept, -float("inf"), x))
    return tl.sum(number, 0), tl.sum(mass, 0), tl.min(least, 0), tl.max(below, 0)


@triton.jit
def _threshold_kernel(
    threshold_ptr,  # float32 [rows], written
    few_ptr,  # float32 [rows, most]
    found_ptr,  # int32 [rows, 2]
    bracket_ptr,  # float32 [rows, 6]
    x_ptr,  # float32 [rows, vocab]
    slot_ptr,  # int [rows]
    params_ptr,  # int32 [slots, Param.COUNT]
    vocab,
    most: tl.constexpr,
    block: tl.constexpr,
):
    """Narrow low .. high around the greatest logit t such that what is >= t reaches the target, a number, then a mass.

    Probes go down from high in growing strides until one is too low, and halve the interval from there. An end moves to
    the nearest logit, never to a value between two, so ties end the search, and so does any spread of values.
    """
    row = tl.program_id(0).to(tl.int64)
    param = params_ptr + tl.load(slot_ptr + row).to(tl.int64) * _PARAMS
    threshold = -float("inf")
    filters, temperature = _filters(param)
    if filters:
        bracket = bracket_ptr + row * _BRACKET
        least, top = tl.load(bracket), tl.load(bracket + 1)
        low, high = tl.load(bracket + 2), tl.load(bracket + 3)
        base, total = tl.load(bracket + 4), tl.load(bracket + 5)
        top_k = tl.load(param + _TOP_K)
        top_p = float_param(param, _TOP_P)
        scale = _LOG2_E / temperature
        threshold = tl.maximum(top + tl.log(float_param(param, _MIN_P)) * temperature, least)
        src = x_ptr + row * vocab
        count = vocab
        few = tl.load(found_ptr + row * 2)
        if few >= 0:
            src = few_ptr + row * most
            count = few
        for stage in range(2):
            by_mass = stage == 1
            if (by_mass & (top_p < 1.0)) | (~by_mass & (top_k > 0) & (top_k < tl.load(found_ptr + row * 2 + 1))):
                target = top_k.to(tl.float32)
                if by_mass:
                    if total < 0.0:
                        _, total, low, _ = _measure(src, count, threshold, top, scale, block)
                        high = top
                    target = total * top_p
                stride = 4.0
                while low < high:
                    mid = tl.maximum(low + (high - low) * 0.5, high - stride)
                    mid = tl.where((mid > low) & (mid <= high), mid, high)
                    number, mass, kept, below = _measure(src, count, mid, top, scale, block)
                    measure = tl.where(by_mass, mass + base, number.to(tl.float32))
                    if measure >= target:
                        low = kept
                        high = tl.where(~by_mass & (measure == target), kept, high)  # a lower one only adds
                    else:
                        high = below
                        stride *= 4.0
                threshold = tl.maximum(threshold, low)
    tl.store(threshold_ptr + row, threshold)
