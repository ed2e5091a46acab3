"""What a model's attention layer is, and the interface of the backends that run it over paged keys and values.

Owns the description of a layer (learned by `executor.probe`) and its pages. A backend is told of each step once
(`begin`) and then asked for every layer; it must never wait for the device or keep anything of a step beyond the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from executor.inputs import StepInputs


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One attention layer, as seen in the arguments of its call."""

    q_heads: int
    kv_heads: int
    k_dim: int
    v_dim: int
    dtype: torch.dtype
    scale: float
    window: int | None  # a query at p sees keys p - window + 1 .. p; None: all up to p
    softcap: float | None  # scores become softcap * tanh(scores / softcap)
    has_sinks: bool  # a learned score for each query head joins the softmax's denominator

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.q_heads // self.kv_heads

    @property
    def bytes_per_token(self) -> int:
        return self.kv_heads * (self.k_dim + self.v_dim) * self.dtype.itemsize


@dataclass(slots=True)
class PagedLayer:
    """A layer and its pages. Values are always finite: masked lanes multiply whatever they read by zero."""

    spec: LayerSpec
    k_cache: torch.Tensor  # [blocks, block_size, kv_heads, k_dim]
    v_cache: torch.Tensor  # [blocks, block_size, kv_heads, v_dim]


class AttentionBackend(Protocol):
    """Writes the new keys and values of a step into pages and attends over them."""

    @property
    def name(self) -> str: ...

    def begin(self, inputs: StepInputs) -> None:
        """Prepare what all layers of this step share. Part of the CUDA graph when one is captured."""

    def attend(
        self,
        layer: PagedLayer,
        query: torch.Tensor,  # [tokens, q_heads, k_dim]
        key: torch.Tensor,  # [tokens, kv_heads, k_dim]
        value: torch.Tensor,  # [tokens, kv_heads, v_dim]
        sinks: torch.Tensor | None,  # [q_heads]
    ) -> torch.Tensor:
        """[tokens, q_heads, v_dim] in the dtype of `query`."""


def choose_backend(
    specs: Sequence[LayerSpec], *, block_size: int, max_rows: int, device: torch.device
) -> AttentionBackend:
    """The fastest backend that runs on `device`: Triton kernels on CUDA, SDPA over gathered pages elsewhere."""
    if device.type == "cuda":
        from executor.attention.triton import TritonBackend

        return TritonBackend(specs, block_size, max_rows, device)
    from executor.attention.sdpa import SdpaBackend

    return SdpaBackend(specs, block_size)
