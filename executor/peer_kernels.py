# mypy: ignore-errors
"""Triton kernel that sums rows over the GPUs of one host on its way to the next norm, each writing to the others.

Launched by `executor.peers` only. A program owns one row on every rank: it sends the row to the same program of each
peer and adds up all of them in the order of the ranks, so every rank gets the same bits. A row travels in words of
eight bytes, half of them numbers and half the turn: a word arrives as a whole, so whoever sees the turn in all of them
has the row, and nothing else need be told or asked for.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from executor.layer_kernels import store_normed


@triton.jit
def _numbers(half, kind: tl.constexpr):
    """The numbers in int32 `half`: one of float32, or two of bfloat16, the first one in the low bits; as float32."""
    if kind == tl.float32:
        numbers = half.to(tl.float32, bitcast=True)
    else:
        numbers = tl.interleave((half << 16).to(tl.float32, bitcast=True), (half & -65536).to(tl.float32, bitcast=True))
    return numbers


@triton.jit(do_not_specialize=["words_at", "turns_at", "patience"])
def sum_norm_kernel(
    addresses,  # int64 [size]: the memory of each rank, its own one included
    partial,  # [rows, width], what is summed
    turns,  # int32 [places * rows]: how many times each row was summed
    x,  # [rows, width], updated
    gain,  # [width]
    normed,  # [rows, width]
    eps,
    turns_at,  # where in `turns` the first row of the place is
    words_at,  # bytes into a memory: int64 [sender, max_rows, width * itemsize / 4]
    sender_bytes,
    patience,  # looks at a row before the kernel goes on without its peer; -1: it waits for ever
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
    kind: tl.constexpr = x.dtype.element_ty
    in_word: tl.constexpr = 32 // kind.primitive_bitwidth
    words: tl.constexpr = width // in_word
    word = tl.arange(0, width_pad // in_word)
    sent = word < words
    turn = tl.load(turns + turns_at + row) + 1
    own = tl.load((partial + row * width).to(tl.pointer_type(tl.int32)) + word, mask=sent, other=0)
    message = (own.to(tl.int64) & 0xFFFFFFFF) | (turn.to(tl.int64) << 32)
    for peer in tl.static_range(size):
        if peer != rank:
            theirs = tl.load(addresses + peer) + words_at + rank * sender_bytes
            at = tl.multiple_of(theirs.to(tl.pointer_type(tl.int64)), 16) + row * words + word
            tl.store(at, message, mask=sent)
    lane = tl.arange(0, width_pad)
    inside = lane < width
    at_row = row * width + lane
    total = tl.load(x + at_row, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gain + lane, mask=inside, other=0.0).to(tl.float32)
    summed = tl.zeros([width_pad], tl.float32)
    for peer in tl.static_range(size):
        if peer == rank:
            summed += _numbers(own, kind)
        else:
            mine = tl.load(addresses + rank) + words_at + peer * sender_bytes
            at = tl.multiple_of(mine.to(tl.pointer_type(tl.int64)), 16) + row * words + word
            found = tl.load(at, mask=sent, other=0, volatile=True)
            looks = 0
            while (tl.max((sent & ((found >> 32).to(tl.int32) != turn)).to(tl.int32), 0) != 0) & (looks != patience):
                found = tl.load(at, mask=sent, other=0, volatile=True)
                looks += 1
            summed += _numbers(found.to(tl.int32), kind)
    tl.store(turns + turns_at + row, turn)
    store_normed(total + summed, g, x + at_row, normed + at_row, inside, eps, width)
