"""The products of a model's linear layers, run before it serves, so that the driver has loaded their kernels.

cuBLAS has several kernels for one shape of weights, each for some numbers of tokens, and the driver loads a kernel when
it is first launched, for which it waits until the device is idle: that held a launch for 190 ms. Used by the executor
at start, on CUDA only.
"""

from __future__ import annotations

from typing import Any, Final

import torch.nn.functional as F
from torch import nn

from executor.shards import GatheredLinear, RowLinear

_FEW: Final = (1, 2, 4, 8, 16, 32)
_STRIDE: Final = 64  # tokens; a fraction of a second for all of them


def run_products(module: Any, max_rows: int, max_tokens: int) -> None:
    """Run the product of each kind of linear layer of `module`, a causal LM, with 1 to `max_tokens` tokens; that of its
    head with up to `max_rows`."""
    head = module.get_output_embeddings()
    linears = [m for m in module.modules() if type(m) in (nn.Linear, RowLinear, GatheredLinear)]
    kinds = {(m.weight.shape, m.weight.dtype, m.bias is None, m is head): m for m in linears}
    for linear in kinds.values():
        weight, bias = linear.weight, None if isinstance(linear, RowLinear) else linear.bias
        most = max_rows if linear is head else max_tokens
        for tokens in {*_FEW, *range(_STRIDE, most, _STRIDE), most}:
            if tokens <= most:
                F.linear(weight.new_empty(tokens, weight.shape[1]), weight, bias)
