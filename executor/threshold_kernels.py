"""The smallest logit that each row's filters keep, as Triton kernels: top-k, top-p and min-p without sorting.

Called by `executor.sampler_kernels`; must choose what `sampler_cpu.filter_threshold` would choose.

    probe         what is above each of a few thresholds            (rows, chunks)
    gather        list the logits between the right two of them     (rows, chunks)
    threshold     search the list                                   (rows)

A row that asks for few logits is not probed: its k greatest are in blocks whose maxima are among the k greatest maxima,
so that gather lists those blocks.
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
BLOCK: Final = 32  # logits whose greatest is kept
_PROBES: Final = 32  # thresholds that `probe` tries for each row
_PROBE_BLOCK: Final = 64  # logits it compares at once with all of them
_FEW: Final = 16384  # logits between two thresholds that are listed; more are looked for in the row itself
_HELD: Final = 4096  # logits that `threshold` reads at once; if they are all, it keeps them in registers

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
_BLOCK = tl.constexpr(BLOCK)
_TRIES = tl.constexpr(64)


@dataclass(frozen=True, slots=True)
class Summary:
    """What `prepare` saw of each row; NaN counts as -inf."""

    number: torch.Tensor  # int32 [rows, chunks]: logits above -inf
    least: torch.Tensor  # float32 [rows, chunks], the least of those
    greatest: torch.Tensor  # float32 [rows, chunks], the greatest
    maxima: torch.Tensor  # float32 [rows, chunks, CHUNK / BLOCK], the greatest of each block


def filter_threshold(tables: SlotTables, x: torch.Tensor, summary: Summary, row_slot: torch.Tensor) -> torch.Tensor:
    """float32 [rows]: the smallest logit of x [rows, vocab] that each row's filters keep; -inf where it has none."""
    rows, vocab = x.shape
    chunks = summary.number.shape[1]
    lanes = triton.next_power_of_2(chunks)
    number = torch.empty(rows, chunks, _PROBES, dtype=torch.int32, device=x.device)
    mass = torch.empty(rows, chunks, _PROBES, dtype=torch.float32, device=x.device)
    _probe_kernel[(rows, chunks)](
        number, mass, x, summary.number, summary.least, summary.greatest, row_slot, tables.params, vocab, CHUNK, lanes,
        _PROBES, _PROBE_BLOCK, _HELD, num_warps=8,
    )  # fmt: skip
    few = torch.empty(rows, _FEW, dtype=torch.float32, device=x.device)
    blocks = torch.empty(rows, _HELD // BLOCK, dtype=torch.int32, device=x.device)
    found = torch.empty(rows, 2, dtype=torch.int32, device=x.device)
    bracket = torch.empty(rows, 6, dtype=torch.float32, device=x.device)
    _gather_kernel[(rows, chunks)](
        few, blocks, found, bracket, x, summary.number, summary.least, summary.greatest, summary.maxima, number, mass,
        row_slot, tables.params, vocab, CHUNK, lanes, _PROBES, _FEW, _HELD, num_warps=4,
    )  # fmt: skip
    threshold = torch.empty(rows, dtype=torch.float32, device=x.device)
    _threshold_kernel[(rows,)](
        threshold, few, blocks, found, bracket, x, row_slot, tables.params, vocab, _FEW, _HELD, num_warps=8
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
def _asks_for_few(param, held: tl.constexpr):
    """Whether a row's k greatest are no more than the blocks that can be held."""
    top_k = tl.load(param + _TOP_K)
    return (top_k > 0) & (top_k <= held // _BLOCK)


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
    held: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    chunks = tl.num_programs(1)
    param = params_ptr + tl.load(slot_ptr + row).to(tl.int64) * _PARAMS
    filters, temperature = _filters(param)
    if filters & ~_asks_for_few(param, held):
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
    block_ptr,  # int32 [rows, held / BLOCK], written if a row asks for few: the blocks to search
    found_ptr,  # int32 [rows, 2], written: how many logits those are, -1 = search the row; how many are above -inf
    bracket_ptr,  # float32 [rows, 6], written: least, greatest; what is looked for is in low .. high; base, total
    x_ptr,  # float32 [rows, vocab]
    number_ptr,  # int32 [rows, chunks]
    least_ptr,  # float32 [rows, chunks]
    greatest_ptr,  # float32 [rows, chunks]
    maxima_ptr,  # float32 [rows, chunks, chunk / BLOCK]
    probed_number_ptr,  # int32 [rows, chunks, probes]
    probed_mass_ptr,  # float32 [rows, chunks, probes]
    slot_ptr,  # int [rows]
    params_ptr,  # int32 [slots, Param.COUNT]
    vocab,
    chunk: tl.constexpr,
    lanes: tl.constexpr,
    probes: tl.constexpr,
    most: tl.constexpr,
    held: tl.constexpr,
):
    """Between which thresholds a row's search ends: of its k greatest if it asks for them, else of its nucleus.

    Of a nucleus the logits between them are listed: what is above has `base` of the `total` mass. Of the k greatest all
    down to the lower threshold are, since a nucleus may have to be found among them; its total, -1, is to be measured
    then. If they are few, blocks are listed that hold all those.
    """
    row = tl.program_id(0).to(tl.int64)
    chunks = tl.num_programs(1)
    param = params_ptr + tl.load(slot_ptr + row).to(tl.int64) * _PARAMS
    filters, temperature = _filters(param)
    if filters:
        least, top = _range(least_ptr + row * chunks, greatest_ptr + row * chunks, chunks, lanes)
        by_number, number = _asks_by_number(param, number_ptr + row * chunks, chunks, lanes)
        top_k = tl.load(param + _TOP_K)
        found = found_ptr + row * 2
        bracket = bracket_ptr + row * _BRACKET
        if _asks_for_few(param, held):
            if tl.program_id(1) == 0:
                blocks = chunks * (chunk // _BLOCK)
                maxima = maxima_ptr + row * blocks
                room: tl.constexpr = held // _BLOCK
                pad: tl.constexpr = lanes * (chunk // _BLOCK)
                low, few = _list_blocks(block_ptr + row * room, maxima, blocks, top_k, least, top, room, pad)
                _store_bracket(found, bracket, few, number, least, top, low, top, 0.0, -1.0)
        else:
            lane = tl.arange(0, lanes)
            at = (row * chunks + lane[:, None]) * probes + tl.arange(0, probes)[None, :]
            numbers = tl.load(probed_number_ptr + at, mask=lane[:, None] < chunks, other=0)
            masses = tl.sum(tl.load(probed_mass_ptr + at, mask=lane[:, None] < chunks, other=0.0), 0)
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
                few = tl.where(fits, few, -1)
                base = tl.where(fits & by_mass, tl.max(tl.where(reached, 0.0, masses), 0), 0.0)
                total = tl.where(by_mass, total, -1.0)
                _store_bracket(found, bracket, few, number, least, top, low, tl.minimum(limit, top), base, total)


@triton.jit
def _list_blocks(block_ptr, maxima_ptr, blocks, top_k, least, top, room: tl.constexpr, pad: tl.constexpr):
    """List the blocks that hold a logit no less than a bound which `top_k` <= room of them reach, or all of them.

    Returns that bound, and how many logits the blocks have, -1 if there are more than `room`.
    """
    at = tl.arange(0, pad)
    maxima = tl.load(maxima_ptr + at, mask=at < blocks, other=-float("inf"))
    low, high = least, top
    number = tl.sum((maxima >= low).to(tl.int32), 0)
    stride = 4.0
    tries = 0
    while (number > room) & (tries < _TRIES):
        mid = tl.maximum(low + (high - low) * 0.5, high - stride)
        reach = tl.sum((maxima >= mid).to(tl.int32), 0)
        if reach >= top_k:
            low = mid
            number = reach
        else:
            high = mid
            stride *= 4.0
        tries += 1
    kept = (maxima >= low) & (number <= room)
    tl.store(block_ptr + tl.cumsum(kept.to(tl.int32), 0) - 1, at, mask=kept)
    return low, tl.where(number <= room, number * _BLOCK, -1)


@triton.jit
def _store_bracket(found_ptr, bracket_ptr, few, number, least, top, low, high, base, total):
    tl.store(found_ptr, few)
    tl.store(found_ptr + 1, number)
    tl.store(bracket_ptr, least)
    tl.store(bracket_ptr + 1, top)
    tl.store(bracket_ptr + 2, low)
    tl.store(bracket_ptr + 3, high)
    tl.store(bracket_ptr + 4, base)
    tl.store(bracket_ptr + 5, total)


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
def _measure_held(x, weight, mid):
    """As `_measure`, of logits x [held] whose mass is `weight`."""
    kept = x >= mid
    number = tl.sum(kept.to(tl.int32), 0)
    mass = tl.sum(tl.where(kept, weight, 0.0), 0)
    least = tl.min(tl.where(kept, x, float("inf")), 0)
    below = tl.max(tl.where(kept, -float("inf"), x), 0)
    return number, mass, least, below


@triton.jit
def _narrow(x, weight, is_held, src, count, low, high, target, base, by_mass, top, scale, held: tl.constexpr):
    """The greatest logit t in low .. high such that what is >= t reaches `target`, a number or, with `base`, a mass.

    Probes go down from high in growing strides until one is too low. From there two of three lie where a straight line
    through the measures of both ends meets the target, and the third halves the interval. An end moves to the nearest
    logit, never to a value between two, so ties end the search, and so does any spread of values.
    """
    reached, missed, beyond = target, -float("inf"), high  # until both ends are measured, the line ends at low
    stride = 4.0
    turn = 0
    while low < high:
        mid = tl.maximum(low + (high - low) * 0.5, high - stride)
        line = tl.minimum(low + (beyond - low) * ((reached - target) / (reached - missed)), high)
        mid = tl.where((line > low) & (turn % 3 < 2), line, mid)
        mid = tl.where((mid > low) & (mid <= high), mid, high)
        turn += 1
        if is_held:
            number, mass, kept, below = _measure_held(x, weight, mid)
        else:
            number, mass, kept, below = _measure(src, count, mid, top, scale, held)
        measure = tl.where(by_mass, mass + base, number.to(tl.float32))
        if measure >= target:
            reached = measure
            low = kept
            high = tl.where(~by_mass & (measure == target), kept, high)  # a lower one only adds
        else:
            missed = measure
            beyond = mid
            high = below
            stride *= 4.0
    return low


@triton.jit
def _threshold_kernel(
    threshold_ptr,  # float32 [rows], written
    few_ptr,  # float32 [rows, most]
    block_ptr,  # int32 [rows, held / BLOCK]
    found_ptr,  # int32 [rows, 2]
    bracket_ptr,  # float32 [rows, 6]
    x_ptr,  # float32 [rows, vocab]
    slot_ptr,  # int [rows]
    params_ptr,  # int32 [slots, Param.COUNT]
    vocab,
    most: tl.constexpr,
    held: tl.constexpr,
):
    """Of each row the k greatest, if it asks for them, then the nucleus, over what was gathered."""
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
        few = tl.load(found_ptr + row * 2)
        lies_in_blocks = _asks_for_few(param, held) & (few >= 0)
        is_held = (few >= 0) & (few <= held)
        at = tl.arange(0, held)
        src = x_ptr + row * vocab
        count = vocab
        if lies_in_blocks:
            block = tl.load(block_ptr + row * (held // _BLOCK) + at // _BLOCK, mask=at < few, other=vocab)
            x = _load_ordered(src, block * _BLOCK + at % _BLOCK, vocab)
        else:
            if few >= 0:
                src = few_ptr + row * most
                count = few
            x = _load_ordered(src, at, tl.where(is_held, few, 0))
        weight = tl.exp2((x - top) * scale)
        for stage in range(2):
            by_mass = stage == 1
            if (by_mass & (top_p < 1.0)) | (~by_mass & (top_k > 0) & (top_k < tl.load(found_ptr + row * 2 + 1))):
                target = top_k.to(tl.float32)
                if by_mass:
                    if total < 0.0:
                        if is_held:
                            _, total, low, _ = _measure_held(x, weight, threshold)
                        else:
                            _, total, low, _ = _measure(src, count, threshold, top, scale, held)
                        high = top
                    target = total * top_p
                low = _narrow(x, weight, is_held, src, count, low, high, target, base, by_mass, top, scale, held)
                threshold = tl.maximum(threshold, low)
    tl.store(threshold_ptr + row, threshold)
