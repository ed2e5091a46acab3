# mypy: ignore-errors
"""Triton kernel that sums rows over the GPUs of one host, each reading the others' memory, on its way to the next norm.

Launched by `executor.peers` only. A program owns one row on every rank: it tells the same program of each peer that the
row is there, waits for theirs, and adds up all of them in the order of the ranks, so every rank gets the same bits.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from executor.layer_kernels import store_normed


@triton.jit(do_not_specialize=["partial_at", "flags_at", "patience"])
def sum_norm_kernel(
    addresses,  # int64 [size]: the memory of each rank, its own one included
    x,  # [rows, width], updated
    gain,  # [width]
    normed,  # [rows, width]
    eps,
    partial_at,  # bytes into the memory: [rows, width], what is summed
    flags_at,  # bytes into the memory: int32 [rows, size], how many times each rank has shown this row here
    patience,  # looks at a flag before the kernel goes on without its peer; -1: it waits for ever
    rank: tl.constexpr,
    size: tl.constexpr,
    width: tl.constexpr,
    width_pad: tl.constexpr,
    pdl: tl.constexpr,
):
    """x += sum of all ranks' partial rows; normed = x / rms(x) * gain."""
    if pdl:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    kind = x.dtype.element_ty
    mine = (tl.load(addresses + rank) + flags_at).to(tl.pointer_type(tl.int32)) + row * size
    turn = tl.load(mine + rank) + 1
    tl.store(mine + rank, turn)
    for peer in tl.static_range(size):
        if peer != rank:
            theirs = (tl.load(addresses + peer) + flags_at).to(tl.pointer_type(tl.int32)) + row * size
            tl.atomic_xchg(theirs + rank, turn, sem="release", scope="sys")
    lane = tl.arange(0, width_pad)
    inside = lane < width
    at = row * width + lane
    total = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gain + lane, mask=inside, other=0.0).to(tl.float32)
    for peer in tl.static_range(size):
        if peer != rank:
            looks = 0
            # Turns may wrap around: their difference says who is ahead.
            while (tl.atomic_add(mine + peer, 0, sem="acquire", scope="sys") - turn < 0) & (looks != patience):
                looks += 1
    tl.debug_barrier()
    summed = tl.zeros([width_pad], tl.float32)
    for peer in tl.static_range(size):
        # Said to be aligned, or rows would be read an element at a time.
        partial = tl.multiple_of((tl.load(addresses + peer) + partial_at).to(tl.pointer_type(kind)), 16)
        summed += tl.load(partial + at, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float32)
    store_normed(total + summed, g, x + at, normed + at, inside, eps, width)
