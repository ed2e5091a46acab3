# mypy: ignore-errors
"""What happens to one head between the projections and attention. Called by Triton kernels only."""

import triton
import triton.language as tl


@triton.jit
def finite(x):
    """NaN and infinities become 0: one request's fault must not pass through a masked lane to the next owner."""
    wide = x.to(tl.float32)
    return tl.where(tl.abs(wide) < float("inf"), x, tl.zeros_like(x))


@triton.jit
def load_turned(
    source,  # [heads, 1] where each head begins
    inside,  # [heads, 1] which of them there are; the others are 0
    gain,  # [dim] of the norm
    cos,  # [dim / 2] at the token's position
    sin,  # [dim / 2]
    eps,
    lane,  # [1, dim]
    dim: tl.constexpr,
    has_norm: tl.constexpr,
):
    """Heads [heads, dim], through their RMS norm (if `has_norm`) and the rotary embedding; in the dtype of `source`."""
    half: tl.constexpr = dim // 2
    kind = source.dtype.element_ty
    partner = (lane + half) % dim
    x = tl.load(source + lane, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(source + partner, mask=inside, other=0.0).to(tl.float32)
    if has_norm:
        scale = tl.rsqrt(tl.sum(x * x, 1) / dim + eps)[:, None]
        x = ((x * scale).to(kind) * tl.load(gain + lane)).to(tl.float32)
        y = ((y * scale).to(kind) * tl.load(gain + partner)).to(tl.float32)
    c = tl.load(cos + lane % half).to(tl.float32)
    s = tl.load(sin + lane % half).to(tl.float32)
    return tl.where(lane < half, x * c - y * s, x * c + y * s).to(kind)
