# mypy: ignore-errors
"""Triton kernel that cuts the decode rows of a step into work items. Launched by `executor.attention.triton`, once a
step; what it lists is read by `decode_kernel` in every layer.
"""

import triton
import triton.language as tl

# What a work item is, int32 each: one chunk of a row. A list ends with a row of -1.
ITEM_WORDS = 8
_ROW = tl.constexpr(0)
_SLOT = tl.constexpr(1)  # of the row
_LENGTH = tl.constexpr(2)  # of the row, this step's token included
_START = tl.constexpr(3)  # first token of the chunk
_STOP = tl.constexpr(4)
_PIECE = tl.constexpr(5)  # where its partial result goes
_FIRST = tl.constexpr(6)  # where those of the row begin
_SPLITS = tl.constexpr(7)  # how many they are
_WORDS = tl.constexpr(ITEM_WORDS)


@triton.jit
def _store_item(items, index, row, slot, length, start, stop, piece, first, splits, mask):
    at = items + index * _WORDS
    tl.store(at + _ROW, row, mask=mask)
    tl.store(at + _SLOT, slot, mask=mask)
    tl.store(at + _LENGTH, length, mask=mask)
    tl.store(at + _START, start, mask=mask)
    tl.store(at + _STOP, stop, mask=mask)
    tl.store(at + _PIECE, piece, mask=mask)
    tl.store(at + _FIRST, first, mask=mask)
    tl.store(at + _SPLITS, splits, mask=mask)


@triton.jit
def load_item(items, index, room):
    at = items + index * _WORDS
    inside = index < room
    return (
        tl.load(at + _ROW, mask=inside, other=-1),
        tl.load(at + _SLOT, mask=inside, other=0),
        tl.load(at + _LENGTH, mask=inside, other=0),
        tl.load(at + _START, mask=inside, other=0),
        tl.load(at + _STOP, mask=inside, other=0),
        tl.load(at + _PIECE, mask=inside, other=0),
        tl.load(at + _FIRST, mask=inside, other=0),
        tl.load(at + _SPLITS, mask=inside, other=0),
    )


@triton.jit
def _has_rest(span, chunk, row, rows):
    """Whether chunks leave something of a row. A row without keys is one empty item, which writes its zeros."""
    return (span % chunk != 0) | ((span == 0) & (row < rows))


@triton.jit
def _chunk_tokens(span, rows, slots, block_n: tl.constexpr, min_chunk: tl.constexpr, overhead: tl.constexpr):
    """The one of some candidates with the shortest estimated makespan on `slots` programs that share the bandwidth.

    An item costs its tokens plus `overhead`; the last program runs faster, but not with all of the others' share.
    """
    longest = tl.max(span, 0)
    total = tl.sum(span, 0)
    i = tl.arange(0, 32)
    step = i >> 1
    parts = ((2 + (step & 1)) << (step >> 1)) >> 1  # 1, 1, 2, 3, 4, 6, 8, 12, ... 128, 192
    low = tl.maximum(total // slots, min_chunk)
    between = low + tl.maximum(longest - low, 0) * step // 15
    candidate = tl.where((i & 1) == 0, tl.cdiv(longest, parts), between)
    candidate = tl.maximum(tl.cdiv(candidate, block_n) * block_n, min_chunk)  # [32]
    wholes = span[None, :] // candidate[:, None]  # [32, rows]
    whole = tl.sum(wholes, 1)
    items = tl.sum(tl.where(wholes * candidate[:, None] < span[None, :], wholes + 1, wholes), 1)
    even = (total + overhead * items) // slots
    path = tl.maximum(tl.cdiv(whole, slots) * (candidate + overhead), tl.minimum(candidate, longest) + overhead)
    # Rather pieces of one length than others that cost the same.
    cost = tl.maximum(even, path * 4 // 5) + (i & 1)
    # Whole rows always fit.
    cost = tl.where((items <= rows + 2 * slots) | (i == 0), cost, 2147483647)
    return tl.max(tl.where(cost == tl.min(cost, 0), candidate, 0), 0)


@triton.jit
def split_kernel(
    kv_len,  # [rows]
    row_slot,  # [rows]
    counts,  # [2] rows, decode rows, which come first
    items,  # [room, ITEM_WORDS], written
    room,
    slots,
    window,
    rows_pad: tl.constexpr,
    rank_block: tl.constexpr,
    block_n: tl.constexpr,
    min_chunk: tl.constexpr,
    overhead: tl.constexpr,
):
    """Cut the decode rows of a step into work items of one chunk each, the longest first.

    Every program finds the same chunk and places the remainders of `rank_block` rows; the first one does all else.
    """
    rows = tl.load(counts + 1)
    row = tl.arange(0, rows_pad)
    length = tl.load(kv_len + row, mask=row < rows, other=0)
    span = tl.minimum(length, window)
    chunk = _chunk_tokens(span, rows, slots, block_n, min_chunk, overhead)
    whole = span // chunk
    wholes = tl.sum(whole, 0)
    if tl.program_id(0) == 0:
        slot = tl.load(row_slot + row, mask=row < rows, other=0).to(tl.int32)
        splits = whole + _has_rest(span, chunk, row, rows).to(tl.int32)
        first = tl.cumsum(splits, 0) - splits
        place = tl.cumsum(whole, 0) - whole
        for piece in range(0, tl.max(whole, 0)):
            start = length - span + piece * chunk
            _store_item(
                items, place + piece, row, slot, length, start, start + chunk, first + piece, first, splits,
                piece < whole,
            )  # fmt: skip
        for start in range(tl.sum(splits, 0), room, rows_pad):
            tl.store(items + (start + row) * _WORDS + _ROW, -1, mask=start + row < room)
    # The longest remainders start first, so that those which end last are short.
    own = tl.program_id(0) * rank_block + tl.arange(0, rank_block)
    own_length = tl.load(kv_len + own, mask=own < rows, other=0)
    own_span = tl.minimum(own_length, window)
    own_whole = own_span // chunk
    left = own_span - own_whole * chunk
    place = wholes + tl.zeros_like(own)
    first = tl.zeros_like(own)
    for begin in range(0, rows, rank_block):
        other = begin + tl.arange(0, rank_block)
        other_span = tl.minimum(tl.load(kv_len + other, mask=other < rows, other=0), window)
        other_rest = _has_rest(other_span, chunk, other, rows).to(tl.int32)
        other_left = other_span % chunk
        before = other[None, :] < own[:, None]
        longer = (other_left[None, :] > left[:, None]) | ((other_left[None, :] == left[:, None]) & before)
        place += tl.sum(tl.where(longer, other_rest[None, :], 0), 1)
        first += tl.sum(tl.where(before, (other_span // chunk + other_rest)[None, :], 0), 1)
    slot = tl.load(row_slot + own, mask=own < rows, other=0).to(tl.int32)
    _store_item(
        items, place, own, slot, own_length, own_length - left, own_length, first + own_whole, first, own_whole + 1,
        _has_rest(own_span, chunk, own, rows),
    )  # fmt: skip
