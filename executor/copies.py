"""Copies and single numbers that the CUDA driver queues at once.

torch's own copy asks first what kind of memory each end is, which takes 30 us of a step. Called on the launch thread,
by the lanes and ahead of a graph.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any, Final

import torch

_WRITE_64: Final = 5  # CU_STREAM_MEM_OP_WRITE_VALUE_64


@cache
def _driver() -> Any:
    driver = ctypes.CDLL("libcuda.so.1")
    driver.cuMemcpyAsync.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    driver.cuStreamBatchMemOp_v2.argtypes = [ctypes.c_void_p, ctypes.c_uint, ctypes.c_void_p, ctypes.c_uint]
    return driver


def queue_copy(into: torch.Tensor, source: torch.Tensor, nbytes: int, stream: torch.cuda.Stream) -> None:
    """The first bytes of `source` go to the first of `into`; both contiguous, on the device or in pinned memory.

    Raises RuntimeError with the driver's code.
    """
    status = _driver().cuMemcpyAsync(into.data_ptr(), source.data_ptr(), nbytes, stream.cuda_stream)
    if status:
        raise RuntimeError(f"copying {nbytes} bytes failed with CUDA error {status}")


def queue_numbers(address: int, numbers: Sequence[int], stream: torch.cuda.Stream) -> None:
    """The int64s from a device address on become `numbers`, between what the stream runs before and after.

    Raises RuntimeError with the driver's code.
    """
    words = [word for i, number in enumerate(numbers) for word in (_WRITE_64, address + 8 * i, number, 0, 0, 0)]
    operations = (ctypes.c_uint64 * len(words))(*words)  # of type CUstreamBatchMemOpParams
    status = _driver().cuStreamBatchMemOp_v2(stream.cuda_stream, len(numbers), operations, 0)
    if status:
        raise RuntimeError(f"writing to the device failed with CUDA error {status}")
