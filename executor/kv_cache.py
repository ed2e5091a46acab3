"""The pages of keys and values: how many there are and what they cost. Used by `executor.model` and at start only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Protocol

import numpy as np
import torch

from executor.attention import LayerSpec
from ipc.config import EngineConfig
from ipc.errors import ConfigError

_MIN_BLOCKS: Final = 2  # the null block and one to use
_CPU_BYTES: Final = 1 << 30
_CPU_SHARE: Final = 8  # one part in so many of the available memory


class _Pages(Protocol):
    @property
    def device(self) -> torch.device: ...
    def allocate_kv(self, num_blocks: int) -> None: ...
    def kv_bytes_per_block(self) -> int: ...


def allocate_pages(spec: LayerSpec, num_blocks: int, block_size: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """K [num_blocks, block_size, kv_heads, k_dim] and V of one layer; zeroed, because masked lanes read page 0."""
    shapes = [(num_blocks, block_size, spec.kv_heads, dim) for dim in (spec.k_dim, spec.v_dim)]
    if device.type == "cpu":  # numpy takes memory that the kernel zeroes when it is first used; torch writes all of it
        words = f"i{spec.dtype.itemsize}"
        return tuple(torch.from_numpy(np.zeros(shape, words)).view(spec.dtype) for shape in shapes)
    return tuple(torch.zeros(shape, dtype=spec.dtype, device=device) for shape in shapes)


def bytes_per_block(specs: Sequence[LayerSpec], block_size: int) -> int:
    """Bytes of one block over all layers."""
    return block_size * sum(spec.bytes_per_token for spec in specs)


def choose_num_blocks(config: EngineConfig, model: _Pages, run_full_step: Callable[[], None]) -> int:
    """How many blocks, the null block included, the KV cache gets; allocating them is left to the caller.

    `config.num_blocks` or `config.kv_cache_bytes` decide if given. Else, on CUDA, what `gpu_memory_utilization` of the
    device leaves after the peak of `run_full_step`, one step of the most tokens whose rows all lie in the null block,
    and after what CUDA graphs may take for another; on the CPU 1 GiB or an eighth of the available memory. Never more
    than all sequences at full length can fill.
    Raises ConfigError with both numbers if not even one block besides the null block fits.
    """
    limits = config.limits
    most = config.max_num_seqs * limits.max_blocks_per_seq + 1
    block_bytes = model.kv_bytes_per_block()
    if config.num_blocks is not None:
        if config.num_blocks < _MIN_BLOCKS:
            raise ConfigError(
                f"{config.num_blocks} KV blocks; {_MIN_BLOCKS} are needed", param="--num-gpu-blocks-override"
            )
        return min(config.num_blocks, most)
    if config.kv_cache_bytes is not None:
        budget_bytes, flag = config.kv_cache_bytes, "--kv-cache-memory-bytes"
    elif model.device.type == "cuda":
        budget_bytes, flag = _cuda_budget_bytes(config, model, run_full_step), "--gpu-memory-utilization"
    else:
        budget_bytes, flag = min(_CPU_BYTES, _available_bytes() // _CPU_SHARE), "--kv-cache-memory-bytes"
    blocks = budget_bytes // block_bytes
    if blocks < _MIN_BLOCKS:
        raise ConfigError(
            f"{max(0, budget_bytes):,} bytes are left for the KV cache; {_MIN_BLOCKS} blocks of "
            f"{config.block_size} tokens need {_MIN_BLOCKS * block_bytes:,}",
            param=flag,
        )
    return min(blocks, most)


def _cuda_budget_bytes(config: EngineConfig, model: _Pages, run_full_step: Callable[[], None]) -> int:
    """Bytes for KV: the share of the device that may be used, less what a full step and everything else take."""
    model.allocate_kv(1)
    torch.cuda.empty_cache()
    resting_bytes = torch.cuda.memory_allocated(model.device)
    torch.cuda.reset_peak_memory_stats(model.device)
    run_full_step()
    torch.cuda.synchronize(model.device)
    peak_bytes = torch.cuda.max_memory_allocated(model.device)
    free_bytes, total_bytes = torch.cuda.mem_get_info(model.device)
    # The driver, other processes and memory outside torch's allocator count against the share too.
    outside_bytes = total_bytes - free_bytes - torch.cuda.memory_reserved(model.device)
    torch.cuda.empty_cache()
    # Graphs share a pool of memory, which steps outside them do not use: a full step may lie in either.
    graph_bytes = 0 if config.enforce_eager else peak_bytes - resting_bytes
    return int(total_bytes * config.gpu_memory_utilization) - peak_bytes - graph_bytes - outside_bytes


def _available_bytes() -> int:
    """Memory that can be had without swapping, from the kernel's own estimate."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise ConfigError("/proc/meminfo has no MemAvailable; state the size", param="--kv-cache-memory-bytes")
