# mypy: ignore-errors
"""Triton kernels over paged keys and values. Launched by `executor.attention.triton` only.

Pages are [blocks, page, kv_heads, dim], contiguous; a row's are at block_table[row_slot[row]]. Every length is read on
the device, so a launch is the same for any lengths and can be part of a CUDA graph. Dimensions that are not a
power of two are padded with masked lanes. Arguments that change from step to step are not specialized, so nothing is
compiled while serving. Lanes outside a row read page 0 or the tail of a page, whose values are finite.
Softmax runs on base-2 exponentials: `scale` holds the attention scale times log2(e), or log2(e) alone with a soft-cap.
"""

import triton
import triton.language as tl

from executor.attention.heads import finite

NEVER = tl.constexpr(-1.0e30)  # a score that no key reaches; not -inf, whose difference with itself is NaN
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_lanes(pointer, lanes, dim: tl.constexpr, padded: tl.constexpr):
    """A tile of `dim` of `padded` lanes along its last axis; `lanes` broadcasts over the others."""
    if dim == padded:
        return tl.load(pointer)
    return tl.load(pointer, mask=lanes < dim, other=0.0)


@triton.jit
def write_kv_kernel(
    key,
    value,
    k_cache,
    v_cache,
    slot_mapping,  # [tokens]
    key_token,
    key_head,
    value_token,
    value_head,
    kv_heads: tl.constexpr,
    k_dim: tl.constexpr,
    v_dim: tl.constexpr,
    heads_pad: tl.constexpr,
    k_pad: tl.constexpr,
    v_pad: tl.constexpr,
):
    """One program stores all heads of one token."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token)
    head = tl.arange(0, heads_pad)[:, None]
    k_lane = tl.arange(0, k_pad)[None, :]
    v_lane = tl.arange(0, v_pad)[None, :]
    k_ok = (head < kv_heads) & (k_lane < k_dim)
    v_ok = (head < kv_heads) & (v_lane < v_dim)
    k = tl.load(key + token * key_token + head * key_head + k_lane, mask=k_ok, other=0.0)
    v = tl.load(value + token * value_token + head * value_head + v_lane, mask=v_ok, other=0.0)
    tl.store(k_cache + (slot * kv_heads + head) * k_dim + k_lane, finite(k), mask=k_ok)
    tl.store(v_cache + (slot * kv_heads + head) * v_dim + v_lane, finite(v), mask=v_ok)


@triton.jit
def capped(scores, cap, cap_scale, has_softcap: tl.constexpr):
    """Products of queries and keys, soft-capped if asked; still to be multiplied by `scale`."""
    if has_softcap:
        # tanh(x) = 1 - 2 / (exp(2x) + 1), which saturates where exp overflows
        scores = cap * (1.0 - 2.0 / (tl.exp2(scores * (cap_scale * 2.0 * LOG2E)) + 1.0))
    return scores


@triton.jit
def _accumulate(scores, v, scale, top, denominator, acc, precision: tl.constexpr):
    """One step of the online softmax; `top` is the running maximum in base-2 units."""
    new_top = tl.maximum(top, tl.max(scores, 1) * scale)
    p = tl.exp2(scores * scale - new_top[:, None])
    keep = tl.exp2(top - new_top)
    denominator = denominator * keep + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * keep[:, None], input_precision=precision)
    return new_top, denominator, acc


@triton.jit(do_not_specialize=["room"])
def tiles_kernel(
    query_start,  # [rows + 1]
    counts,  # [2] rows, decode rows, which come first
    tiles,  # [2, room]: row, and which tile of the row; row -1 where there is none
    room,
    tile_tokens: tl.constexpr,
    rows_pad: tl.constexpr,
    block: tl.constexpr,
):
    """List the tiles of all prefill rows, row by row, the last of a row first: they see most keys. A program a row."""
    rows = tl.load(counts)
    decode = tl.load(counts + 1)
    row = decode + tl.program_id(0)
    other = tl.arange(0, rows_pad)
    is_prefill = (other >= decode) & (other < rows)
    length = tl.load(query_start + other + 1, mask=is_prefill, other=0)
    length -= tl.load(query_start + other, mask=is_prefill, other=0)
    needed = (length + tile_tokens - 1) // tile_tokens
    first = tl.sum(tl.where(other < row, needed, 0), 0)
    own = tl.sum(tl.where(other == row, needed, 0), 0)
    for start in range(0, own, block):
        i = start + tl.arange(0, block)
        tl.store(tiles + first + i, row + tl.zeros_like(i), mask=i < own)
        tl.store(tiles + room + first + i, own - 1 - i, mask=i < own)
    if tl.program_id(0) == 0:
        for start in range(tl.sum(needed, 0), room, block):
            i = start + tl.arange(0, block)
            tl.store(tiles + i, tl.full([block], -1, tl.int32), mask=i < room)


@triton.jit
def prefill_kernel(
    query,
    k_cache,
    v_cache,
    block_table,
    row_slot,  # [rows]
    kv_len,  # [rows]
    query_start,  # [rows + 1]
    tiles,  # [2, as many as programs]
    sinks,  # [q_heads]
    out,  # [tokens, q_heads, v_dim]
    scale,
    cap,
    cap_scale,
    window,
    query_token,
    query_head,
    table_row,
    kv_heads: tl.constexpr,
    group: tl.constexpr,
    k_dim: tl.constexpr,
    v_dim: tl.constexpr,
    k_pad: tl.constexpr,
    v_pad: tl.constexpr,
    page: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    has_window: tl.constexpr,
    has_softcap: tl.constexpr,
    has_sinks: tl.constexpr,
    precision: tl.constexpr,
):
    """Causal attention of a row's new tokens over all its pages, the new ones included. A program a tile and KV head.

    The query heads of one KV head share a tile: block_m // group tokens of `group` heads each.
    """
    tile_tokens: tl.constexpr = block_m // group
    row = tl.load(tiles + tl.program_id(0))
    head = tl.program_id(1)
    first_token = tl.load(tiles + tl.num_programs(0) + tl.program_id(0)) * tile_tokens
    if row >= 0:
        first_query = tl.load(query_start + row)
        num_queries = tl.load(query_start + row + 1) - first_query
        length = tl.load(kv_len + row)
        lane_m = tl.arange(0, block_m)
        lane_n = tl.arange(0, block_n)
        lane_k = tl.arange(0, k_pad)
        lane_v = tl.arange(0, v_pad)
        token = first_token + lane_m // group
        q_head = head * group + lane_m % group
        in_tile = (lane_m < tile_tokens * group) & (token < num_queries)
        place_q = (first_query + token).to(tl.int64)
        q = tl.load(
            query + (place_q * query_token + q_head * query_head)[:, None] + lane_k[None, :],
            mask=in_tile[:, None] & (lane_k < k_dim)[None, :],
            other=0.0,
        )
        position = length - num_queries + token
        low = length - num_queries + first_token
        stop = tl.minimum(low + tile_tokens, length)
        start = 0
        unmasked = (low + 1) // block_n * block_n
        if has_window:
            start = tl.maximum(low + 1 - window, 0) // block_n * block_n
            unmasked = start
        top = tl.full([block_m], NEVER, tl.float32)
        denominator = tl.zeros([block_m], tl.float32)
        if has_sinks:
            top = tl.load(sinks + q_head, mask=in_tile, other=0.0).to(tl.float32) * LOG2E
            denominator += 1.0
        acc = tl.zeros([block_m, v_pad], tl.float32)
        table = block_table + tl.load(row_slot + row) * table_row
        block = tl.load(table + (start + lane_n) // page, mask=start + lane_n < stop, other=0)
        for first in tl.range(start, unmasked, block_n):
            key = first + lane_n
            place = (block.to(tl.int64) * page + key % page) * kv_heads + head
            ahead = key + block_n
            block = tl.load(table + ahead // page, mask=ahead < stop, other=0)
            k = load_lanes(k_cache + place[:, None] * k_dim + lane_k[None, :], lane_k[None, :], k_dim, k_pad)
            v = load_lanes(v_cache + place[:, None] * v_dim + lane_v[None, :], lane_v[None, :], v_dim, v_pad)
            scores = capped(tl.dot(q, tl.trans(k), input_precision=precision), cap, cap_scale, has_softcap)
            top, denominator, acc = _accumulate(scores, v, scale, top, denominator, acc, precision)
        for first in tl.range(unmasked, stop, block_n):
            key = first + lane_n
            block = tl.load(table + key // page, mask=key < stop, other=0)
            place = (block.to(tl.int64) * page + key % page) * kv_heads + head
            k = load_lanes(k_cache + place[:, None] * k_dim + lane_k[None, :], lane_k[None, :], k_dim, k_pad)
            v = load_lanes(v_cache + place[:, None] * v_dim + lane_v[None, :], lane_v[None, :], v_dim, v_pad)
            scores = capped(tl.dot(q, tl.trans(k), input_precision=precision), cap, cap_scale, has_softcap)
            visible = key[None, :] <= position[:, None]
            if has_window:
                visible = visible & (key[None, :] > position[:, None] - window)
            scores = tl.where(visible, scores, NEVER)
            top, denominator, acc = _accumulate(scores, v, scale, top, denominator, acc, precision)
        place_out = (place_q * (kv_heads * group) + q_head)[:, None] * v_dim + lane_v[None, :]
        result = (acc / denominator[:, None]).to(out.dtype.element_ty)
        tl.store(out + place_out, result, mask=in_tile[:, None] & (lane_v < v_dim)[None, :])
