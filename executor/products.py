"""The products of a model's linear layers, run before it serves, so that the driver has loaded their kernels.

cuBLAS has dozens of kernels for one shape of weights and chooses by the exact number of tokens. The driver loads one
when it is first launched, for which it waits until the device is idle: that held a launch for 190 ms. So steps with
prompt tokens outside of CUDA graphs are padded to one of a few sizes, and all of these are run at start. (Those of
decode rows alone are graphs, but for `--enforce-eager`, which does not promise speed.) Used on CUDA only.
"""

from __future__ import annotations

from typing import Any, Final

import torch.nn.functional as F
from torch import nn

from executor.shards import GatheredLinear, RowLinear

_STRIDE: Final = 64  # tokens: under 1 % of a long step, and less than a second for all sizes


def padded_tokens(tokens: int, max_tokens: int) -> int:
    """What a step of `tokens` is padded to: a power of two, from 64 on a multiple of 64; at most `max_tokens`."""
    size = -(-tokens // _STRIDE) * _STRIDE if tokens > _STRIDE else 1 << (tokens - 1).bit_length()
    return min(size, max_tokens)


def run_products(module: Any, max_logits: int, max_tokens: int) -> None:
    """Run the product of each kind of linear layer of `module`, a causal LM, with each size of a step; that of its head
    with each number of rows that it may have, scored tokens of prompts among them."""
    sizes = sorted({padded_tokens(tokens, max_tokens) for tokens in range(1, max_tokens + 1)})
    head = module.get_output_embeddings()
    linears = [m for m in module.modules() if type(m) in (nn.Linear, RowLinear, GatheredLinear)]
    kinds = {(m.weight.shape, m.weight.dtype, m.bias is None, m is head): m for m in linears}
    for linear in kinds.values():
        weight, bias = linear.weight, None if isinstance(linear, RowLinear) else linear.bias
        for tokens in range(1, max_logits + 1) if linear is head else sizes:
            F.linear(weight.new_empty(tokens, weight.shape[1]), weight, bias)
