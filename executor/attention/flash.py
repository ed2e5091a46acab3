"""FlashAttention-3 for long prompts, taken where its package is installed. Used by `executor.attention.triton`.

It reads the same pages. Its launch needs the prompts' number and lengths as tensors of their own, so only steps whose
numbers the host knows take it: those outside CUDA graphs, which are the ones with many prompt tokens.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch

from executor.attention import LayerSpec, PagedLayer
from executor.inputs import StepInputs

Attend = Callable[..., torch.Tensor]  # flash_attn_with_kvcache
_HUB_KERNEL: Final = ("kernels-community/flash-attn3", 1)  # as transformers names it, and its version
_MAX_DIM: Final = 256


def find_flash_attention(device: torch.device) -> Attend | None:
    """`flash_attn_with_kvcache` of FlashAttention-3, of an installed build or through the `kernels` package."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return None
    for find in (_installed, _from_hub):
        try:
            return find()
        except Exception:  # a build for another torch raises whatever it likes
            continue
    return None


def _installed() -> Attend:
    attend: Attend = importlib.import_module("flash_attn_interface").flash_attn_with_kvcache
    return attend


def _from_hub() -> Attend:
    name, version = _HUB_KERNEL
    attend: Attend = importlib.import_module("kernels").get_kernel(name, version=version).flash_attn_with_kvcache
    return attend


def suits(spec: LayerSpec) -> bool:
    """Whether FlashAttention-3 computes what such a layer does."""
    is_half = spec.dtype in (torch.bfloat16, torch.float16)
    return is_half and not spec.has_sinks and spec.k_dim == spec.v_dim <= _MAX_DIM and spec.k_dim % 8 == 0


@dataclass(frozen=True, slots=True)
class Prompts:
    """The prefill rows of one step, as FlashAttention takes them; the same for all layers."""

    call: Attend
    first: int  # token
    starts: torch.Tensor  # int32 [prompts + 1], row -> first query, from 0 on
    kv_len: torch.Tensor  # int32 [prompts]
    pages: torch.Tensor  # int32 [prompts, max_blocks_per_seq]
    longest: int  # queries of a row, at most

    @classmethod
    def of(cls, inputs: StepInputs, call: Attend) -> Prompts:
        """From a step with prefill rows, whose numbers of rows are exact; its last tokens may be padding."""
        first = inputs.num_decode  # decode rows have one token each
        return cls(
            call,
            first,
            inputs.query_start[first:] - first,
            inputs.kv_len[first:],
            inputs.block_table[inputs.row_slot[first:]],
            inputs.num_tokens - first,
        )

    def attend(self, layer: PagedLayer, query: torch.Tensor) -> torch.Tensor:
        """[tokens - first, q_heads, dim] for queries [tokens, q_heads, dim]."""
        spec = layer.spec
        options: dict[str, Any] = {}
        if spec.window is not None:
            options["window_size"] = (spec.window - 1, 0)
        if spec.softcap is not None:
            options["softcap"] = spec.softcap
        return self.call(
            query[self.first :],
            layer.k_cache,
            layer.v_cache,
            cache_seqlens=self.kv_len,
            page_table=self.pages,
            cu_seqlens_q=self.starts,
            max_seqlen_q=self.longest,
            softmax_scale=spec.scale,
            causal=True,
            num_splits=1,
            **options,
        )
