# mypy: ignore-errors
"""Triton kernels between the products of a decoder layer. Launched by `executor.decoder` only.

Each does all that stands between two linear layers in one pass: embedding and its square, residual and norm, rotary
embedding and KV write, SiLU and product. With `pdl` a launch begins while the kernel before it ends, and waits in
`gdc_wait` before it reads anything.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from executor.attention.heads import finite, load_turned


@triton.jit
def embed_kernel(
    token_ids,  # int64 [rows]
    table,  # [vocab, width]
    gain,  # [width]
    out,  # [rows, width]
    scaled,  # [rows, width]
    square,  # float32 [rows]
    eps,
    width: tl.constexpr,
    width_pad: tl.constexpr,
    normed: tl.constexpr,
    pdl: tl.constexpr,
):
    """out = table[token]; scaled = out * gain, divided by the row's root mean square if `normed`; square = sum of
    squares."""
    if pdl:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, width_pad)
    inside = lane < width
    raw = tl.load(table + tl.load(token_ids + row) * width + lane, mask=inside, other=0.0)
    x = raw.to(tl.float32)
    total = tl.sum(x * x, 0)
    tl.store(out + row * width + lane, raw, mask=inside)
    if normed:
        x *= tl.rsqrt(total / width + eps)
    g = tl.load(gain + lane, mask=inside, other=0.0).to(tl.float32)
    tl.store(scaled + row * width + lane, (x * g).to(scaled.dtype.element_ty), mask=inside)
    tl.store(square + row, total)


@triton.jit
def store_normed(total, gain, x, normed, inside, eps, width: tl.constexpr):
    """Store a row `total`, float32, at `x`, and at `normed` what its RMS norm makes of it as it was stored."""
    kind = x.dtype.element_ty
    rounded = total.to(kind)
    tl.store(x, rounded, mask=inside)
    z = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(z * z, 0) / width + eps)
    tl.store(normed, ((z * scale).to(kind) * gain).to(kind), mask=inside)


@triton.jit
def add_norm_kernel(
    x,  # [rows, width], updated
    y,  # [rows, width]
    gain,  # [width]
    normed,  # [rows, width]
    eps,
    width: tl.constexpr,
    width_pad: tl.constexpr,
    pdl: tl.constexpr,
):
    """x += y; normed = x / rms(x) * gain."""
    if pdl:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, width_pad)
    inside = lane < width
    at = row * width + lane
    total = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) + tl.load(y + at, mask=inside, other=0.0)
    g = tl.load(gain + lane, mask=inside, other=0.0).to(tl.float32)
    store_normed(total, g, x + at, normed + at, inside, eps, width)


@triton.jit
def gate_kernel(
    gate_up,  # [rows, 2 width]
    out,  # [rows, width]
    width: tl.constexpr,
    block: tl.constexpr,
    pdl: tl.constexpr,
):
    """out = silu(gate) * up."""
    if pdl:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1) * block + tl.arange(0, block)
    inside = lane < width
    gate = tl.load(gate_up + row * (2 * width) + lane, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * (2 * width) + width + lane, mask=inside, other=0.0)
    activated = (gate / (1.0 + tl.exp(-gate))).to(up.dtype)
    tl.store(out + row * width + lane, activated * up, mask=inside)


@triton.jit
def rotate_kernel(
    qkv,  # [tokens, (q_heads + 2 kv_heads) * dim]
    positions,  # int64 [tokens]
    slot_mapping,  # int64 [tokens]
    query,  # [tokens, q_heads, dim]
    k_cache,  # [blocks * page, kv_heads, dim]
    v_cache,  # [blocks * page, kv_heads, dim]
    cos,  # [positions, dim / 2]
    sin,  # [positions, dim / 2]
    q_gain,  # [dim]
    k_gain,  # [dim]
    eps,
    q_heads: tl.constexpr,
    kv_heads: tl.constexpr,
    dim: tl.constexpr,
    block_h: tl.constexpr,  # heads of one program; divides q_heads and kv_heads
    has_norm: tl.constexpr,
    pdl: tl.constexpr,
):
    """Normalize (if `has_norm`) and rotate the heads of queries and keys; store keys and values into their pages."""
    if pdl:
        gdc_wait()
        gdc_launch_dependents()
    half: tl.constexpr = dim // 2
    heads: tl.constexpr = q_heads + 2 * kv_heads
    token = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * block_h
    head = first + tl.arange(0, block_h)[:, None]
    lane = tl.arange(0, dim)[None, :]
    source = qkv + (token * heads + head) * dim
    slot = tl.load(slot_mapping + token)
    if first < q_heads + kv_heads:
        at = tl.load(positions + token) * half
        gain = cos
        if has_norm:
            gain = q_gain if first < q_heads else k_gain
        turned = load_turned(source, head >= 0, gain, cos + at, sin + at, eps, lane, dim, has_norm)
        if first < q_heads:
            tl.store(query + (token * q_heads + head) * dim + lane, turned)
        else:
            tl.store(k_cache + (slot * kv_heads + head - q_heads) * dim + lane, finite(turned))
    else:
        value = tl.load(source + lane)
        tl.store(v_cache + (slot * kv_heads + head - q_heads - kv_heads) * dim + lane, finite(value))
