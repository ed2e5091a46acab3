"""Attention on the CPU: torch's SDPA over gathered pages. Called by the model's layers through `executor.probe`.

Decode rows run as one padded batch, prefill rows one by one. Which pages to gather and what to mask is worked out once
a step; a layer then costs one gather of K, one of V and one SDPA call for each group of rows. Reads lengths on the
host, so it must never run on a device with a stream.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F

from executor.attention import LayerSpec, PagedLayer
from executor.inputs import StepInputs

Shape = tuple[int | None, int, torch.dtype]  # window, query heads of a KV head, dtype: what a mask depends on


@dataclass(slots=True)
class _Group:
    """Rows that run as one batch: `batch` rows of `query_len` tokens, padded to the same number of pages."""

    start: int  # first token
    stop: int
    batch: int
    query_len: int
    blocks: torch.Tensor  # int64 [batch * pages]
    masks: dict[Shape, torch.Tensor]  # 0 or -inf, [batch, 1, 1 or group * query_len, pages * block_size]


class SdpaBackend:
    """The backend of the CPU device."""

    name: Final = "sdpa"

    def __init__(self, specs: Sequence[LayerSpec], block_size: int) -> None:
        self._shapes = sorted({_shape(spec) for spec in specs}, key=str)
        self._block_size = block_size
        self._groups: list[_Group] = []
        self._gathered = [
            torch.empty(0),
            torch.empty(0),
        ]  # flat: a fresh allocation of this size costs more than a copy
        self._slot_mapping = torch.empty(0, dtype=torch.int64)

    def begin(self, inputs: StepInputs) -> None:
        self._slot_mapping = inputs.slot_mapping
        starts, lengths = inputs.query_start.tolist(), inputs.kv_len.tolist()
        decode = inputs.num_decode
        self._groups = []
        if decode:
            self._groups.append(self._group(inputs, 0, decode, 0, 1, max(lengths[:decode])))
        for row in range(decode, inputs.num_rows):
            first = starts[row]
            self._groups.append(self._group(inputs, row, row + 1, first, starts[row + 1] - first, lengths[row]))

    def _group(self, inputs: StepInputs, row: int, end: int, token: int, query_len: int, max_kv: int) -> _Group:
        pages = -(-max_kv // self._block_size)
        kv_len = inputs.kv_len[row:end].to(torch.int64)  # [batch]
        position = kv_len[:, None] - query_len + torch.arange(query_len)  # [batch, query_len]
        masks = {shape: _mask(position, pages * self._block_size, shape) for shape in self._shapes}
        blocks = inputs.block_table[inputs.row_slot[row:end], :pages].reshape(-1).to(torch.int64)
        return _Group(token, token + (end - row) * query_len, end - row, query_len, blocks, masks)

    def attend(
        self,
        layer: PagedLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        spec = layer.spec
        tokens = query.shape[0]
        for cache, new in ((layer.k_cache, key), (layer.v_cache, value)):
            # A NaN of one request must not reach the next owner of its block through a masked lane.
            finite = torch.nan_to_num(new, nan=0.0, posinf=0.0, neginf=0.0)
            cache.flatten(0, 1).index_copy_(0, self._slot_mapping, finite)
        out = query.new_empty(tokens, spec.q_heads, spec.v_dim)
        for group in self._groups:
            batch, query_len = group.batch, group.query_len
            heads = (batch, query_len, spec.kv_heads, spec.group)
            q = query[group.start : group.stop].reshape(*heads, spec.k_dim).permute(0, 2, 3, 1, 4).flatten(2, 3)
            keys = self._gather(0, layer.k_cache, group.blocks).view(batch, -1, spec.kv_heads, spec.k_dim)
            values = self._gather(1, layer.v_cache, group.blocks).view(batch, -1, spec.kv_heads, spec.v_dim)
            mask = group.masks[_shape(spec)]
            if spec.softcap is None and sinks is None:
                result = F.scaled_dot_product_attention(
                    q, keys.transpose(1, 2), values.transpose(1, 2), attn_mask=mask, scale=spec.scale
                )
            else:
                result = _explicit_attention(spec, q, keys.transpose(1, 2), values.transpose(1, 2), mask, sinks)
            result = result.view(batch, spec.kv_heads, spec.group, query_len, spec.v_dim).permute(0, 3, 1, 2, 4)
            out[group.start : group.stop].view(*heads, spec.v_dim).copy_(result)
        return out

    def _gather(self, buffer: int, cache: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        """Pages `blocks` of `cache`, in memory that the next gather into the same buffer overwrites."""
        shape = (len(blocks), *cache.shape[1:])
        size = math.prod(shape)
        flat = self._gathered[buffer]
        if flat.dtype != cache.dtype or flat.numel() < size:
            flat = self._gathered[buffer] = torch.empty(size + size // 4, dtype=cache.dtype)
        return torch.index_select(cache, 0, blocks, out=flat[:size].view(shape))


def _shape(spec: LayerSpec) -> Shape:
    return spec.window, spec.group, spec.dtype


def _mask(position: torch.Tensor, kv_len: int, shape: Shape) -> torch.Tensor:
    """Additive mask [batch, 1, group * query_len, kv_len] (query_len 1: [batch, 1, 1, kv_len]), heads outermost."""
    window, group, dtype = shape
    batch, query_len = position.shape
    key = torch.arange(kv_len)
    visible = key <= position[..., None]  # [batch, query_len, kv_len]
    if window is not None:
        visible &= key > position[..., None] - window
    mask = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, float("-inf"))[:, None]
    if query_len == 1:
        return mask
    return mask.repeat(1, group, 1, 1).view(batch, 1, group * query_len, kv_len)


def _explicit_attention(
    spec: LayerSpec,
    query: torch.Tensor,  # [batch, kv_heads, group * query_len, k_dim]
    keys: torch.Tensor,  # [batch, kv_heads, kv_len, k_dim]
    values: torch.Tensor,  # [batch, kv_heads, kv_len, v_dim]
    mask: torch.Tensor,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """What SDPA has no argument for: soft-capped scores, and sinks in the denominator of the softmax."""
    scores = (query @ keys.transpose(2, 3)).float() * spec.scale
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    scores = scores + mask
    if sinks is None:
        return scores.softmax(-1).to(values.dtype) @ values
    query_len = query.shape[2] // spec.group
    sink = sinks.float().view(1, spec.kv_heads, spec.group, 1).expand(query.shape[0], -1, -1, query_len)
    scores = torch.cat([scores, sink.flatten(2).unsqueeze(-1)], -1)
    return scores.softmax(-1)[..., :-1].to(values.dtype) @ values
