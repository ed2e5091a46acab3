# mypy: ignore-errors
"""Triton kernel of a linear layer over few rows: it must read every weight once, and little else costs anything.

Launched by `executor.linear` only. One program multiplies a tile of output features and rows over one share of the
input features; where a tile has several shares, the program that arrives last adds them up, always in the same order,
so the result does not depend on who that was. Programs of the same weights follow each other, so that memory is read
for the first of them only. Weights are the left operand, so that the tensor cores' long side is never padded.

With `pdl` a launch begins while the kernel before it ends: until `gdc_wait` it may touch weights only.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from executor.peer_kernels import send_tile


@triton.jit
def _prefetch(pointer):
    """Ask for a line of global memory to be brought into the L2 cache."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointer], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _product(
    x, weight, rows, x_row, first_m, first_n, first_k, share,
    k: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr, block_k: tl.constexpr, stages: tl.constexpr,
    n_offset,
    gated: tl.constexpr,
):  # fmt: skip
    """float32 [block_n, block_m] of features first_n.. and rows first_m.. over input features first_k .. first_k +
    share; with `gated` also that of the features `n_offset` further on."""
    lane_n = first_n + tl.arange(0, block_n)
    lane_m = first_m + tl.arange(0, block_m)
    lane_k = tl.arange(0, block_k)
    in_rows = lane_m < rows
    x_tile = x + lane_m[:, None] * x_row + (first_k + lane_k)[None, :]
    w_tile = weight + lane_n[:, None].to(tl.int64) * k + (first_k + lane_k)[None, :]
    acc = tl.zeros([block_n, block_m], tl.float32)
    up = tl.zeros([block_n, block_m], tl.float32)
    for _ in tl.range(0, share, block_k, num_stages=stages):
        w = tl.load(w_tile)
        a = tl.load(x_tile, mask=in_rows[:, None], other=0.0)
        acc = tl.dot(w, tl.trans(a), acc)
        if gated:
            u = tl.load(w_tile + n_offset)
            up = tl.dot(u, tl.trans(a), up)
        w_tile += block_k
        x_tile += block_k
    return acc, up


@triton.jit(do_not_specialize=["rows", "turns_at", "sent_to"])
def linear_kernel(
    x,  # [rows, k]
    weight,  # [n, k], or [2 n, k] if gated: gate features, then up features
    bias,  # [n]
    square_in,  # float32 [parts, rows]: sums of squares of the rows that `x` is the scaled copy of
    residual,  # [rows, n]
    gain,  # [n]
    out,  # [rows, n]
    scaled_out,  # [rows, n] out * gain
    square_out,  # float32 [n / block_n, rows]
    partial,  # float32 [tiles, splits, 1 or 2 if gated, block_n, block_m]
    counter,  # int32 [tiles], zero before and after
    addresses,  # int64 [ranks], turns, turns_at, sent_to: where `send_tile` writes, if there are `ranks`
    turns,
    turns_at,
    sent_to,
    rows,
    x_row,
    eps,
    n: tl.constexpr,
    k: tl.constexpr,
    parts: tl.constexpr,  # 0: x is taken as it is
    parts_pad: tl.constexpr,
    splits: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    stages: tl.constexpr,
    gated: tl.constexpr,
    has_bias: tl.constexpr,
    has_residual: tl.constexpr,
    ranks: tl.constexpr,  # 0: the result is stored in `out`
    prefetch: tl.constexpr,  # input features of each weight row to ask for before the input is there
    early: tl.constexpr,  # the next kernel reads ahead of this one's result, so it may start at once
    pdl: tl.constexpr,
):
    """out = x @ weight.T, rows divided by their root mean square if `parts`; silu(gate) * up if gated; plus `residual`.

    The RMS norm of a row is a number, so it is applied after the product; its gain is in `x` already.
    """
    tile = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    share: tl.constexpr = k // splits
    row_tiles = tl.cdiv(rows, block_m)
    first_n = tile // row_tiles * block_n
    first_m = tile % row_tiles * block_m
    n_offset = tl.full([], n, tl.int64) * k
    lane_n = first_n + tl.arange(0, block_n)
    if pdl:
        if prefetch > 0:
            line = (
                weight + lane_n[:, None].to(tl.int64) * k + split * share + tl.arange(0, prefetch // 64)[None, :] * 64
            )
            _prefetch(line)
            if gated:
                _prefetch(line + n_offset)
        gdc_wait()
        if early:
            gdc_launch_dependents()
    lane_m = first_m + tl.arange(0, block_m)
    in_rows = lane_m < rows
    place = lane_m[None, :] * n + lane_n[:, None]
    inside = tl.broadcast_to(in_rows[None, :], [block_n, block_m])
    # What the end needs is asked for here, so that its way from memory is not waited for.
    if parts > 0:
        lane_p = tl.arange(0, parts_pad)
        squares = tl.load(
            square_in + lane_p[:, None] * rows + lane_m[None, :],
            mask=(lane_p < parts)[:, None] & in_rows[None, :],
            other=0.0,
        )
    if has_residual:
        added = tl.load(residual + place, mask=inside, other=0.0)
        gains = tl.load(gain + lane_n)
    acc, up = _product(
        x, weight, rows, x_row, first_m, first_n, split * share, share, k, block_m, block_n, block_k, stages, n_offset,
        gated,
    )  # fmt: skip
    if pdl and not early:
        gdc_launch_dependents()  # not before: who waits takes a place on a multiprocessor
    is_last = True
    if splits > 1:
        size: tl.constexpr = block_n * block_m
        pieces: tl.constexpr = 2 if gated else 1
        lane = tl.arange(0, block_n)[:, None] * block_m + tl.arange(0, block_m)[None, :]
        base = partial + tile * (splits * pieces * size) + lane
        own = base + split * (pieces * size)
        tl.store(own, acc)
        if gated:
            tl.store(own + size, up)
        tl.debug_barrier()  # every thread's part must be there before the arrival is told
        is_last = tl.atomic_add(counter + tile, 1, sem="acq_rel") == splits - 1
        if is_last:
            acc = tl.zeros([block_n, block_m], tl.float32)
            up = tl.zeros([block_n, block_m], tl.float32)
            for i in tl.static_range(splits):
                acc += tl.load(base + i * (pieces * size), cache_modifier=".cg")
                if gated:
                    up += tl.load(base + i * (pieces * size) + size, cache_modifier=".cg")
            tl.store(counter + tile, 0)
    if is_last:
        if parts > 0:
            scale = tl.rsqrt(tl.sum(squares, 0) / k + eps)
            acc *= scale[None, :]
            up *= scale[None, :]
        if has_bias:
            acc += tl.load(bias + lane_n).to(tl.float32)[:, None]
        if gated:
            acc = acc / (1.0 + tl.exp(-acc)) * up
        if has_residual:
            kind = out.dtype.element_ty
            y = (acc + added.to(tl.float32)).to(kind)
            tl.store(out + place, y, mask=inside)
            y = y.to(tl.float32)
            tl.store(scaled_out + place, (y * gains.to(tl.float32)[:, None]).to(kind), mask=inside)
            tl.store(square_out + first_n // block_n * rows + lane_m, tl.sum(y * y, 0), mask=in_rows)
        elif ranks > 0:
            y = acc.to(x.dtype.element_ty)
            send_tile(y, rows, first_m, first_n, addresses, turns, turns_at, sent_to, n, block_m, block_n, ranks)
        else:
            tl.store(out + place, acc.to(out.dtype.element_ty), mask=inside)
