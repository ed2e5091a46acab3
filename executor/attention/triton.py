"""Attention on CUDA: Triton kernels that read pages in place. Called by the model's layers through `executor.probe`.

Owns the work lists of split-KV decode, one for each (window, KV heads) a model has, and of prefill, one for each size
of tiles, all rebuilt on the device every step, and the scratch for partial results. Must never read a length on the
host: how many rows of each kind there are is on the device too, so that one CUDA graph serves every mix of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import torch
import triton

from executor.attention import LayerSpec, PagedLayer
from executor.attention.decode_kernels import decode_kernel
from executor.attention.flash import Attend, Prompts, suits
from executor.attention.kernels import prefill_kernel, tiles_kernel, write_kv_kernel
from executor.attention.work_kernels import ITEM_WORDS, split_kernel
from executor.compile_ahead import launch
from executor.inputs import StepInputs
from executor.layer_launch import LayerLaunch

_LOG2E: Final = math.log2(math.e)
_NO_WINDOW: Final = 1 << 30
_PROGRAMS_PER_SM: Final = (4, 6)  # decode programs that run at once on one multiprocessor, and in a crowd
_CROWD: Final = 2  # more rows than so many to a program are one
_FEW_ROWS: Final = 32  # rows that one warp cuts
_SPLIT_BLOCK: Final = 64
_TILES_BLOCK: Final = 128
_MIN_CHUNK: Final = 128
_JOIN_LANES: Final = 2048  # numbers that one warp joins at once
_FLASH_TOKENS: Final = 1024  # of a prompt on average: FlashAttention costs more to launch, and less for each token
_CHUNK_OVERHEAD: Final = 150  # cost of starting a work item, in KV tokens


@dataclass(frozen=True, slots=True)
class Heads:
    """What a layer does to its heads before attention: rotary embedding, and an RMS norm where there are gains."""

    cos: torch.Tensor  # [positions, dim / 2]
    sin: torch.Tensor  # [positions, dim / 2]
    q_gain: torch.Tensor | None = None  # [dim]
    k_gain: torch.Tensor | None = None  # [dim]
    eps: float = 0.0

    @property
    def arguments(self) -> tuple[torch.Tensor | float | None, ...]:
        """As the kernels take them."""
        return self.cos, self.sin, self.q_gain, self.k_gain, self.eps


_NO_HEADS: Final = (None, None, None, None, 0.0)


class WorkList:
    """How the decode rows of a step are cut into chunks. Filled by one small kernel, shared by all layers alike."""

    def __init__(self, window: int | None, kv_heads: int, max_rows: int, device: torch.device) -> None:
        self.window = window or _NO_WINDOW
        self._slots, self._crowd_slots = (max(1, _multiprocessors(device) * n // kv_heads) for n in _PROGRAMS_PER_SM)
        self._max_rows = max_rows
        self._rows_pad = max(_FEW_ROWS, triton.next_power_of_2(max_rows))
        # As many as `split_kernel` may make of `max_rows`.
        self.items = torch.zeros(max_rows + 2 * self._crowd_slots, ITEM_WORDS, dtype=torch.int32, device=device)

    def is_crowded(self, rows: int) -> bool:
        """Whether so many rows wait for programs that more of these at once hide each other's starts and ends."""
        return rows > _CROWD * self._slots

    def slots(self, rows: int) -> int:
        """Programs of one KV head that run at once."""
        return self._crowd_slots if self.is_crowded(rows) else self._slots

    def programs(self, rows: int) -> int:
        """Of one KV head: as many as run at once, or one for each row. Those with short items take further ones."""
        return max(rows, self.slots(rows))

    def fill(self, inputs: StepInputs) -> None:
        """Cut the decode rows of a step."""
        rows = inputs.num_decode
        assert rows <= self._max_rows, f"{rows} decode rows, the work list was made for {self._max_rows}"
        places = inputs.kv_len, inputs.row_slot, inputs.counts, self.items
        options = {
            "rows_pad": _FEW_ROWS if rows <= _FEW_ROWS else self._rows_pad,
            "rank_block": _FEW_ROWS,
            "block_n": _SPLIT_BLOCK,
            "min_chunk": _MIN_CHUNK,
            "overhead": _CHUNK_OVERHEAD,
            "num_warps": 1 if rows <= _FEW_ROWS else 8,
        }
        grid = (-(-rows // _FEW_ROWS), 1, 1)
        launch(split_kernel, grid, (*places, len(self.items), self.slots(rows), self.window), options)


class TileList:
    """Which tile of which prefill row each program takes. Filled by one small kernel, shared by all layers alike."""

    def __init__(self, tile_tokens: int, max_rows: int) -> None:
        self._tile_tokens, self._rows_pad = tile_tokens, triton.next_power_of_2(max_rows)
        self.tiles = torch.empty(0)  # int32 [2, room], see `tiles_kernel`

    def fill(self, inputs: StepInputs) -> None:
        tile, rows = self._tile_tokens, inputs.num_prefill
        room = (inputs.num_tokens + rows * (tile - 1)) // tile
        self.tiles = torch.empty(2, room, dtype=torch.int32, device=inputs.query_start.device)
        options = {"tile_tokens": tile, "rows_pad": self._rows_pad, "block": _TILES_BLOCK, "num_warps": 1}
        launch(tiles_kernel, (rows, 1, 1), (inputs.query_start, inputs.counts, self.tiles, room), options)


class TritonBackend:
    """The backend of CUDA devices."""

    name: Final = "triton"

    def __init__(self, specs: Sequence[LayerSpec], block_size: int, max_rows: int, device: torch.device) -> None:
        self._block_size = block_size
        keys = {(spec.window, spec.kv_heads) for spec in specs}
        self._work = {key: WorkList(*key, max_rows=max_rows, device=device) for key in keys}
        self._tiles = {size: TileList(size, max_rows) for size in {_tile_tokens(spec) for spec in specs}}
        items = max(len(work.items) for work in self._work.values())
        heads = max(spec.q_heads for spec in specs)
        width = max(spec.q_heads * spec.v_dim for spec in specs)
        self._partial = torch.zeros(items * width, dtype=torch.float32, device=device)
        self._partial_lse = torch.zeros(items * heads, dtype=torch.float32, device=device)
        kv_heads = max(spec.kv_heads for spec in specs)
        self._arrived = torch.zeros(max_rows * kv_heads, dtype=torch.int32, device=device)
        self._inputs: StepInputs | None = None
        self._flash: Attend | None = None
        self._flash_tokens = 0
        self._prompts: Prompts | None = None  # of the step, if it takes them
        self._decode_kernel, self._prefill_kernel = LayerLaunch(decode_kernel), LayerLaunch(prefill_kernel)

    def use_flash(self, call: Attend | None, always: bool = False) -> None:
        """Let FlashAttention take the prompts of steps with exact rows where they are long, or `always`; or nobody."""
        self._flash, self._flash_tokens = call, 0 if always else _FLASH_TOKENS

    def begin(self, inputs: StepInputs) -> None:
        self._inputs = inputs
        self._begin_launches()
        if inputs.num_decode:
            for work in self._work.values():
                work.fill(inputs)
        self._prompts = None
        if not inputs.decode_only:
            for tiles in self._tiles.values():
                tiles.fill(inputs)
            tokens = inputs.num_tokens - inputs.num_decode
            if self._flash is not None and inputs.has_exact_rows and tokens >= self._flash_tokens * inputs.num_prefill:
                self._prompts = Prompts.of(inputs, self._flash)

    def _begin_launches(self) -> None:
        self._decode_kernel.begin()
        self._prefill_kernel.begin()

    def attend(
        self,
        layer: PagedLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        assert self._inputs is not None, "attend before begin"
        query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
        self._begin_launches()  # what a module projects may lie differently in every layer
        _write(layer, self._inputs, key, value)
        return self.read(layer, query, sinks)

    def read(
        self, layer: PagedLayer, query: torch.Tensor, sinks: torch.Tensor | None = None, pdl: bool = False
    ) -> torch.Tensor:
        """`attend` for keys and values that are in their pages already. `pdl`: start while the kernel ahead ends.

        Queries of all layers alike lie alike.
        """
        inputs, spec = self._inputs, layer.spec
        assert inputs is not None, "read before begin"
        flashed = None
        if self._prompts is not None and suits(spec):
            flashed = self._prompts.attend(layer, query)
            if not inputs.num_decode:
                return flashed
        out = query.new_empty(query.shape[0], spec.q_heads, spec.v_dim)
        if inputs.num_decode:
            self._decode(layer, inputs, query, sinks, out, None, pdl)
        if flashed is not None:
            out[inputs.num_decode :] = flashed
        elif not inputs.decode_only:
            self._prefill(layer, inputs, query, sinks, out)
        return out

    def decode_fresh(self, layer: PagedLayer, qkv: torch.Tensor, heads: Heads, pdl: bool = False) -> torch.Tensor:
        """Attention of decode rows from their projections [rows, (q_heads + 2 kv_heads) * dim]: normalizes and rotates
        heads, writes K and V, and attends; [rows, q_heads, dim]."""
        inputs, spec = self._inputs, layer.spec
        assert inputs is not None, "decode before begin"
        assert inputs.num_decode == len(qkv), f"{len(qkv)} rows, {inputs.num_decode} of them decode"
        out = qkv.new_empty(len(qkv), spec.q_heads, spec.v_dim)
        self._decode(layer, inputs, qkv.view(len(qkv), -1, spec.k_dim), None, out, heads, pdl)
        return out

    def _decode(
        self,
        layer: PagedLayer,
        inputs: StepInputs,
        query: torch.Tensor,
        sinks: torch.Tensor | None,
        out: torch.Tensor,
        fresh: Heads | None,
        pdl: bool,
    ) -> None:
        spec, rows = layer.spec, inputs.num_decode
        work = self._work[spec.window, spec.kv_heads]
        has_norm = fresh is not None and fresh.q_gain is not None
        arguments = (
            query,
            layer.k_cache,
            layer.v_cache,
            inputs.block_table,
            work.items,
            len(work.items),
            self._partial,
            self._partial_lse,
            self._arrived,
            query if sinks is None else sinks,
            out,
            *(_NO_HEADS if fresh is None else fresh.arguments),
            *_scales(spec),
            query.stride(0),
            query.stride(1),
            inputs.block_table.stride(0),
        )
        kind = sinks is not None, fresh is not None, has_norm, pdl, work.is_crowded(rows)
        options = _decode_options(spec, self._block_size, *kind)
        self._decode_kernel((work.programs(rows) * spec.kv_heads, 1, 1), arguments, options)

    def _prefill(
        self, layer: PagedLayer, inputs: StepInputs, query: torch.Tensor, sinks: torch.Tensor | None, out: torch.Tensor
    ) -> None:
        spec = layer.spec
        tiles = self._tiles[_tile_tokens(spec)].tiles
        arguments = (
            query,
            layer.k_cache,
            layer.v_cache,
            inputs.block_table,
            inputs.row_slot,
            inputs.kv_len,
            inputs.query_start,
            tiles,
            query if sinks is None else sinks,
            out,
            *_scales(spec),
            spec.window or _NO_WINDOW,
            query.stride(0),
            query.stride(1),
            inputs.block_table.stride(0),
        )
        options = _prefill_options(spec, self._block_size, sinks is not None)
        self._prefill_kernel((tiles.shape[1], spec.kv_heads, 1), arguments, options)


@cache
def _decode_options(
    spec: LayerSpec, page: int, has_sinks: bool, fresh: bool, has_norm: bool, pdl: bool, crowded: bool
) -> dict[str, Any]:
    block_n, num_warps, num_stages = _decode_tile(spec, crowded)
    group_pad, v_pad = triton.next_power_of_2(spec.group), triton.next_power_of_2(spec.v_dim)
    return {
        **_dims(spec),
        "page": page,
        "block_m": max(8, group_pad),
        "block_n": block_n,
        "stages": num_stages,
        "group_pad": group_pad,
        "join_tile": max(1, min(8, _JOIN_LANES * num_warps // (group_pad * v_pad))),
        "has_softcap": spec.softcap is not None,
        "has_sinks": has_sinks,
        "precision": _precision(spec),
        "fresh": fresh,
        "has_norm": has_norm,
        "reads_ahead": fresh and pdl,
        "pdl": pdl,
        "num_warps": num_warps,
        "launch_pdl": pdl,
    }


@cache
def _prefill_options(spec: LayerSpec, page: int, has_sinks: bool) -> dict[str, Any]:
    block_m, block_n, num_warps, num_stages = _prefill_tile(spec)
    return {
        **_dims(spec),
        "page": page,
        "block_m": block_m,
        "block_n": block_n,
        "has_window": spec.window is not None,
        "has_softcap": spec.softcap is not None,
        "has_sinks": has_sinks,
        "precision": _precision(spec),
        "num_warps": num_warps,
        "num_stages": num_stages,
    }


def _write(layer: PagedLayer, inputs: StepInputs, key: torch.Tensor, value: torch.Tensor) -> None:
    spec = layer.spec
    write_kv_kernel[(key.shape[0],)](
        key,
        value,
        layer.k_cache,
        layer.v_cache,
        inputs.slot_mapping,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        kv_heads=spec.kv_heads,
        k_dim=spec.k_dim,
        v_dim=spec.v_dim,
        heads_pad=triton.next_power_of_2(spec.kv_heads),
        k_pad=triton.next_power_of_2(spec.k_dim),
        v_pad=triton.next_power_of_2(spec.v_dim),
        num_warps=4,
    )


def _dims(spec: LayerSpec) -> dict[str, int]:
    return {
        "kv_heads": spec.kv_heads,
        "group": spec.group,
        "k_dim": spec.k_dim,
        "v_dim": spec.v_dim,
        "k_pad": triton.next_power_of_2(spec.k_dim),
        "v_pad": triton.next_power_of_2(spec.v_dim),
    }


def _scales(spec: LayerSpec) -> tuple[float, float, float]:
    """(scale, cap, cap_scale) as the kernels take them."""
    if spec.softcap is None:
        return spec.scale * _LOG2E, 0.0, 0.0
    return _LOG2E, spec.softcap, spec.scale / spec.softcap


def _precision(spec: LayerSpec) -> str:
    """float32 models keep float32 products; narrower ones take the tensor cores either way."""
    return "ieee" if spec.dtype == torch.float32 else "tf32"


def _row_bytes(spec: LayerSpec) -> int:
    """Shared memory of one token of K and V in a tile."""
    return int(triton.next_power_of_2(spec.k_dim) + triton.next_power_of_2(spec.v_dim)) * spec.dtype.itemsize


def _decode_tile(spec: LayerSpec, crowded: bool) -> tuple[int, int, int]:
    """(KV tokens, warps, pipeline stages): measured best for head 128 in bf16, smaller where a token is wider.

    One warp has no barriers, and several programs of one warp fit a multiprocessor: as _PROGRAMS_PER_SM says.
    """
    if _row_bytes(spec) <= 512 and spec.group <= 16:
        return 32, 1, 3 if crowded else 4
    return (32, 4, 3) if _row_bytes(spec) <= 1024 else (16, 4, 2)


def _prefill_tile(spec: LayerSpec) -> tuple[int, int, int, int]:
    """(query lanes, KV tokens, warps, pipeline stages)."""
    if _row_bytes(spec) <= 512:
        tile = 128, 32, 8, 3
    elif _row_bytes(spec) <= 1024:
        tile = 64, 32, 4, 2
    else:
        tile = 32, 16, 4, 2
    return max(tile[0], triton.next_power_of_2(spec.group)), *tile[1:]


def _tile_tokens(spec: LayerSpec) -> int:
    """Query tokens of a prefill tile."""
    return _prefill_tile(spec)[0] // spec.group


def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 4
