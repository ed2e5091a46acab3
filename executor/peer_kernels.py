# mypy: ignore-errors
"""Triton kernels of what the GPUs of one host tell each other: rows to be summed on their way to the next norm, and
each one's share of the logits.

Launched by `executor.peers`; `send_tile` is the end of a product in `executor.linear_kernels`. Every rank writes its
rows into the memory of all, its own included, and takes what it finds in the order of the ranks, so every rank gets the
same bits. A row travels in words of eight bytes, half of them numbers and half the turn: a word arrives as a whole,
so whoever sees the turn in all of them has the row, and nothing else need be told or asked for.
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


@triton.jit
def _message(half, turn):
    """Words of the numbers in int32 `half`."""
    return (half.to(tl.int64) & 0xFFFFFFFF) | (turn.to(tl.int64) << 32)


@triton.jit
def _words(addresses, rank, place):
    """Where the words at `place`, in bytes, of a rank's memory are."""
    return tl.multiple_of((tl.load(addresses + rank) + place).to(tl.pointer_type(tl.int64)), 16)


@triton.jit
def _receive(words, inside, turn, patience):
    """The numbers of words of this turn, int32; waits until they are there."""
    found = tl.load(words, mask=inside, other=0, volatile=True)
    looks = 0
    while (tl.max((inside & ((found >> 32).to(tl.int32) != turn)).to(tl.int32), 0) != 0) & (looks != patience):
        found = tl.load(words, mask=inside, other=0, volatile=True)
        looks += 1
    return found.to(tl.int32)


@triton.jit
def send_tile(
    y, rows, first_m, first_n, addresses, turns, turns_at, place,
    width: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr, size: tl.constexpr,
):  # fmt: skip
    """Write y [block_n, block_m], features from `first_n` on of rows from `first_m` on, to where all ranks look for
    this one's rows."""
    in_word: tl.constexpr = 32 // y.dtype.primitive_bitwidth
    if in_word == 1:
        half = tl.trans(y).to(tl.int32, bitcast=True)
    else:
        low, high = tl.split(tl.reshape(tl.trans(y), [block_m, block_n // 2, 2]))
        low, high = low.to(tl.int16, bitcast=True).to(tl.int32), high.to(tl.int16, bitcast=True).to(tl.int32)
        half = (low & 0xFFFF) | (high << 16)
    row = first_m + tl.arange(0, block_m)
    turn = tl.load(turns + turns_at + row, mask=row < rows, other=0) + 1
    message = _message(half, turn[:, None])
    word = first_n // in_word + tl.arange(0, block_n // in_word)
    at = row[:, None] * (width // in_word) + word[None, :]
    inside = tl.broadcast_to((row < rows)[:, None], at.shape)
    for peer in tl.static_range(size):
        tl.store(_words(addresses, peer, place) + at, message, mask=inside)


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
    sends: tl.constexpr,  # the rows are in `partial`; else they were sent by the kernel ahead
    pdl: tl.constexpr,
):
    """x += sum of all ranks' partial rows; normed = x / rms(x) * gain."""
    if pdl:
        if sends:
            gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    kind: tl.constexpr = x.dtype.element_ty
    in_word: tl.constexpr = 32 // kind.primitive_bitwidth
    words: tl.constexpr = width // in_word
    word = tl.arange(0, width_pad // in_word)
    sent = word < words
    at = row * words + word
    turn = tl.load(turns + turns_at + row) + 1
    if sends:
        own = tl.load((partial + row * width).to(tl.pointer_type(tl.int32)) + word, mask=sent, other=0)
        for peer in tl.static_range(size):
            tl.store(_words(addresses, peer, words_at + rank * sender_bytes) + at, _message(own, turn), mask=sent)
    lane = tl.arange(0, width_pad)
    inside = lane < width
    at_row = row * width + lane
    total = tl.load(x + at_row, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gain + lane, mask=inside, other=0.0).to(tl.float32)
    summed = tl.zeros([width_pad], tl.float32)
    for peer in tl.static_range(size):
        mine = _words(addresses, rank, words_at + peer * sender_bytes) + at
        summed += _numbers(_receive(mine, sent, turn, patience), kind)
    tl.store(turns + turns_at + row, turn)
    store_normed(total + summed, g, x + at_row, normed + at_row, inside, eps, width)
    if pdl and not sends:
        gdc_wait()  # the kernel behind must not begin before the one ahead has ended


@triton.jit(do_not_specialize=["turns_at", "words_at", "patience"])
def gather_kernel(
    addresses,  # int64 [size]: the memory of each rank, its own one included
    turns,  # int32, from `turns_at` on [pieces, most rows]: how often each piece of a row was gathered, all alike
    out,  # [rows, features]
    features,  # of all ranks together; what shares hold beyond is dropped
    turns_at,
    most_rows,
    words_at,  # bytes into a memory: int64 [sender, most rows, share * itemsize / 4]
    sender_bytes,
    patience,  # as in `sum_norm_kernel`
    rank: tl.constexpr,
    size: tl.constexpr,
    share: tl.constexpr,
    block: tl.constexpr,
    pdl: tl.constexpr,
):
    """out = the shares of all ranks side by side, which the kernel ahead of each has sent. A program has one piece of
    each rank's share of a row."""
    if pdl:
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    kind: tl.constexpr = out.dtype.element_ty
    in_word: tl.constexpr = 32 // kind.primitive_bitwidth
    words: tl.constexpr = share // in_word
    tl.static_assert(words % 16 == 0)
    length = tl.cdiv(words, tl.num_programs(1) * 16) * 16
    first = tl.multiple_of(tl.program_id(1) * length, 16)
    last = tl.multiple_of(tl.minimum(first + length, words), 16)
    counter = turns + turns_at + tl.program_id(1) * most_rows + row
    turn = tl.load(counter) + 1
    for sender in tl.static_range(size):
        mine = _words(addresses, rank, words_at + sender * sender_bytes) + row * words
        for start in range(first, last, block):
            word = start + tl.arange(0, block)
            numbers = _numbers(_receive(mine + word, word < last, turn, patience), kind)
            lane = start * in_word + tl.arange(0, block * in_word)
            column = sender * share + lane
            inside = (lane < last * in_word) & (column < features)
            tl.store(out + row * features + column, numbers.to(kind), mask=inside)
    tl.store(counter, turn)
    if pdl:
        gdc_wait()  # as above
