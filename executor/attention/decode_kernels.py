# mypy: ignore-errors
"""Triton kernel of split-KV decode: attend to one work item after the other, join the pieces of a row. Launched by
`executor.attention.triton`.

See `executor.attention.kernels` for how pages lie and what arguments mean.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from executor.attention.heads import finite, load_turned
from executor.attention.kernels import LOG2E, NEVER, capped, load_lanes
from executor.attention.work_kernels import load_item


@triton.jit
def _join(
    partial, partial_lse, first, splits, head, sinks, out,
    q_heads: tl.constexpr, group: tl.constexpr, group_pad: tl.constexpr, v_dim: tl.constexpr, v_pad: tl.constexpr,
    tile: tl.constexpr, has_sinks: tl.constexpr,
):  # fmt: skip
    """Store a row's heads of one KV head: the pieces first .. first + splits, always added in this order."""
    lane_g = tl.arange(0, group_pad)
    lane_v = tl.arange(0, v_pad)
    q_head = head * group + lane_g
    in_group = lane_g < group
    top = tl.full([group_pad], NEVER, tl.float32)
    denominator = tl.zeros([group_pad], tl.float32)
    if has_sinks:
        top = tl.load(sinks + q_head, mask=in_group, other=0.0).to(tl.float32) * LOG2E
        denominator += 1.0
    acc = tl.zeros([group_pad, v_pad], tl.float32)
    for start in range(0, splits, tile):
        split = start + tl.arange(0, tile)
        piece = (first + split)[:, None] * q_heads + q_head[None, :]
        stored = (split < splits)[:, None] & in_group[None, :]
        lse = tl.load(partial_lse + piece, mask=stored, other=NEVER, cache_modifier=".cg")
        x = tl.load(
            partial + piece[:, :, None] * v_dim + lane_v[None, None, :],
            mask=stored[:, :, None] & (lane_v < v_dim)[None, None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        new_top = tl.maximum(top, tl.max(lse, 0))
        keep = tl.exp2(top - new_top)
        weight = tl.exp2(lse - new_top[None, :])
        acc = acc * keep[:, None] + tl.sum(x * weight[:, :, None], 0)
        denominator = denominator * keep + tl.sum(weight, 0)
        top = new_top
    result = acc / denominator[:, None]
    tl.store(
        out + q_head[:, None] * v_dim + lane_v[None, :],
        result.to(out.dtype.element_ty),
        mask=in_group[:, None] & (lane_v < v_dim)[None, :],
    )


@triton.jit
def _load_blocks(
    table, first, stop, lane_n, page: tl.constexpr, block_n: tl.constexpr, scalar_blocks: tl.constexpr
):  # fmt: skip
    """Block numbers of the tokens first .. first + block_n of a row: of each, or of both halves if `scalar_blocks`."""
    second = 0
    if scalar_blocks:
        block = tl.load(table + first // page, mask=first < stop, other=0)
        if page < block_n:
            second = tl.load(table + first // page + 1, mask=first + page < stop, other=0)
    else:
        block = tl.load(table + (first + lane_n) // page, mask=first + lane_n < stop, other=0)
    return block, second


@triton.jit
def _places(
    block, second, token, lane_n, page: tl.constexpr, block_n: tl.constexpr, scalar_blocks: tl.constexpr
):  # fmt: skip
    """(block, which token of it) of each lane."""
    at_page = block.to(tl.int64)
    at_token = token % page
    if scalar_blocks:
        if page < block_n:
            at_page = tl.where(lane_n < page, at_page, second.to(tl.int64))
            at_token = lane_n % page
        else:
            at_page += tl.zeros_like(lane_n)
    return at_page, at_token


@triton.jit
def _open(
    top, denominator, acc, q_head_at, in_group, new_head_at, length, stop, ends, table, k_cache, v_cache, head,
    cos, sin, q_gain, k_gain, eps, scale, query_head,
    kv_heads: tl.constexpr, k_dim: tl.constexpr, v_dim: tl.constexpr, k_pad: tl.constexpr, v_pad: tl.constexpr,
    page: tl.constexpr, fresh: tl.constexpr, has_norm: tl.constexpr,
):  # fmt: skip
    """Queries [k_pad, heads] of a row. If the item `ends` with the new token, that token's key and value go into their
    page and are the first that is attended."""
    lane_k = tl.arange(0, k_pad)[None, :]
    lane_v = tl.arange(0, v_pad)[None, :]
    if fresh:
        at = (length - 1).to(tl.int64) * (k_dim // 2)
        q = load_turned(q_head_at, in_group[:, None], q_gain, cos + at, sin + at, eps, lane_k, k_dim, has_norm)
        if ends:
            one = tl.arange(0, 1)[:, None]
            new = new_head_at + one
            k = load_turned(new, one == 0, k_gain, cos + at, sin + at, eps, lane_k, k_dim, has_norm)
            v = tl.load(new + kv_heads * query_head + lane_v)
            k, v = finite(k), finite(v)
            place = (tl.load(table + stop // page).to(tl.int64) * page + stop % page) * kv_heads + head
            tl.store(k_cache + place * k_dim + lane_k, k)
            tl.store(v_cache + place * v_dim + lane_v, v)
            top = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1) * scale
            denominator += 1.0
            acc += tl.trans(v)
    else:
        q = tl.load(q_head_at + lane_k, mask=in_group[:, None] & (lane_k < k_dim), other=0.0)
    return tl.trans(q), top, denominator, acc


@triton.jit
def decode_kernel(
    query,  # [rows, q_heads, k_dim]; of the raw projections of all heads if `fresh`
    k_cache,
    v_cache,
    block_table,
    items,  # [room, ITEM_WORDS]
    room,
    partial,  # [room, q_heads, v_dim]
    partial_lse,  # [room, q_heads], base 2
    arrived,  # int32 [rows, kv_heads], zero before and after
    sinks,  # [q_heads]
    out,  # [rows, q_heads, v_dim]
    cos,  # [positions, k_dim / 2]
    sin,  # [positions, k_dim / 2]
    q_gain,  # [k_dim]
    k_gain,  # [k_dim]
    eps,
    scale,
    cap,
    cap_scale,
    query_row,
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
    stages: tl.constexpr,
    group_pad: tl.constexpr,
    join_tile: tl.constexpr,
    has_softcap: tl.constexpr,
    has_sinks: tl.constexpr,
    precision: tl.constexpr,
    fresh: tl.constexpr,
    has_norm: tl.constexpr,
    reads_ahead: tl.constexpr,
    pdl: tl.constexpr,
):
    """One program = one KV head of every so-manieth work item. Of a row in several pieces, who arrives last joins them.

    `fresh`: the new token's heads come from the qkv projection, are normalized (if `has_norm`) and rotated here, and
    its key and value are stored by the program whose work item ends with it. Dimensions are powers of two then.
    With `pdl` what a step prepares once (lengths, work items, block table) is read before the kernel ahead has ended,
    and with `reads_ahead` the first keys and values too: of a fresh row all but the new token's are from earlier steps.
    """
    # One or two block numbers for a tile are no tensor: its addresses then differ by what the compiler knows.
    scalar_blocks: tl.constexpr = page % block_n == 0 or 2 * page == block_n
    head = tl.program_id(0) % kv_heads
    k_head = k_cache + head * k_dim
    v_head = v_cache + head * v_dim
    lanes = tl.num_programs(0) // kv_heads
    item = tl.program_id(0) // kv_heads
    row, slot, length, start, stop, piece, first_piece, splits = load_item(items, item, room)
    while row >= 0:
        lane_m = tl.arange(0, block_m)
        lane_n = tl.arange(0, block_n)
        lane_k = tl.arange(0, k_pad)
        lane_v = tl.arange(0, v_pad)
        in_group = lane_m < group
        q_head = head * group + lane_m
        table = block_table + slot * table_row
        begin = start // block_n * block_n  # so that a tile covers whole pages, or lies inside one
        block, second = _load_blocks(table, begin, stop, lane_n, page, block_n, scalar_blocks)
        top = tl.full([block_m], NEVER, tl.float32)
        denominator = tl.zeros([block_m], tl.float32)
        acc = tl.zeros([v_pad, block_m], tl.float32)
        q_head_at = query + row * query_row + q_head[:, None] * query_head
        new_head_at = query + row * query_row + (kv_heads * group + head) * query_head
        ends = fresh and stop == length
        stop -= tl.where(ends, 1, 0)
        if has_sinks:  # noqa: SIM102 - the outer one is decided at compile time
            # The sink counts once: here if the row is in one piece, else where its pieces meet.
            if splits == 1:
                top = tl.load(sinks + q_head, mask=in_group, other=0.0).to(tl.float32) * LOG2E
                denominator += 1.0
        opening = (
            q_head_at, in_group, new_head_at, length, stop, ends, table, k_cache, v_cache, head,
            cos, sin, q_gain, k_gain, eps, scale, query_head,
        )  # fmt: skip
        if reads_ahead:
            q = tl.zeros([k_pad, block_m], query.dtype.element_ty)
            last = tl.maximum(stop, begin + 1)
        else:
            if pdl:
                gdc_wait()
            q, top, denominator, acc = _open(
                top, denominator, acc, *opening, kv_heads, k_dim, v_dim, k_pad, v_pad, page, fresh, has_norm
            )
            last = stop
        for first in tl.range(begin, last, block_n, num_stages=stages):
            token = first + lane_n
            at_page, at_token = _places(block, second, token, lane_n, page, block_n, scalar_blocks)
            block, second = _load_blocks(table, first + block_n, stop, lane_n, page, block_n, scalar_blocks)
            k_at = k_head + at_page * (page * kv_heads * k_dim)
            v_at = v_head + at_page * (page * kv_heads * v_dim)
            k_in = at_token[:, None] * (kv_heads * k_dim) + lane_k[None, :]
            v_in = at_token[None, :] * (kv_heads * v_dim) + lane_v[:, None]
            k = load_lanes(k_at[:, None] + k_in, lane_k[None, :], k_dim, k_pad)
            v = load_lanes(v_at[None, :] + v_in, lane_v[:, None], v_dim, v_pad)
            if reads_ahead:  # noqa: SIM102 - the outer one is decided at compile time
                # Compiled, the loads of the first few turns stand before the loop, so before this wait.
                if first == begin:
                    if pdl:
                        gdc_wait()
                    q, top, denominator, acc = _open(
                        top, denominator, acc, *opening, kv_heads, k_dim, v_dim, k_pad, v_pad, page, fresh, has_norm
                    )
            scores = capped(tl.dot(k, q, input_precision=precision), cap, cap_scale, has_softcap)
            scores = tl.where(((token >= start) & (token < stop))[:, None], scores, NEVER)
            new_top = tl.maximum(top, tl.max(scores, 0) * scale)
            p = tl.exp2(scores * scale - new_top[None, :])
            keep = tl.exp2(top - new_top)
            denominator = denominator * keep + tl.sum(p, 0)
            acc = tl.dot(v, p.to(v.dtype), acc * keep[None, :], input_precision=precision)
            top = new_top
        if pdl:
            gdc_launch_dependents()
        result = tl.trans(acc / tl.where(denominator == 0.0, 1.0, denominator)[None, :])
        stored = in_group[:, None] & (lane_v < v_dim)[None, :]
        row_out = out + row * (kv_heads * group) * v_dim
        if splits == 1:
            place_out = q_head[:, None] * v_dim + lane_v[None, :]
            tl.store(row_out + place_out, result.to(out.dtype.element_ty), mask=stored)
        else:
            place = piece * (kv_heads * group) + q_head
            tl.store(partial + place[:, None] * v_dim + lane_v[None, :], result, mask=stored)
            tl.store(partial_lse + place, top + tl.log2(denominator), mask=in_group)
            tl.debug_barrier()  # every thread's part must be there before the arrival is told
            arrival = arrived + row * kv_heads + head
            if tl.atomic_add(arrival, 1, sem="acq_rel") == splits - 1:
                _join(
                    partial, partial_lse, first_piece, splits, head, sinks, row_out,
                    kv_heads * group, group, group_pad, v_dim, v_pad, join_tile, has_sinks,
                )  # fmt: skip
                tl.store(arrival, 0)
        # Longest items come first: whoever had the shortest of them takes the longest of the next.
        item = 2 * (item // lanes + 1) * lanes - 1 - item
        row, slot, length, start, stop, piece, first_piece, splits = load_item(items, item, room)
    if pdl:
        gdc_wait()  # without an item too: what comes after this kernel takes the one ahead for ended
