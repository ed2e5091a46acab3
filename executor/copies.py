"""Copies and single numbers that the CUDA driver queues at once.

torch's own copy asks first what kind of memory each end is, which takes 30 us of a step. Called on the launch thread,
by the lanes and ahead of a graph.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from functools import cache
from typing import Any, Final

import torch

_WRITE_64: Final = 5  # CU_STREAM_MEM_OP_WRITE_VALUE_64
_OPERATION_WORDS: Final = 6  # int64s: kind, address, number, and what is 0


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


class Numbers:
    """int64s on the device, one after the other, that change between what a stream runs before and after."""

    def __init__(self, memory: torch.Tensor) -> None:
        """`memory` int64 [count], on the device."""
        self._count = len(memory)
        # Made once, of type CUstreamBatchMemOpParams: the driver reads it when it is called.
        self._operations = (ctypes.c_uint64 * (_OPERATION_WORDS * self._count))()
        for i in range(self._count):
            self._operations[_OPERATION_WORDS * i] = _WRITE_64
            self._operations[_OPERATION_WORDS * i + 1] = memory.data_ptr() + 8 * i

    def queue(self, numbers: Iterable[int], stream: torch.cuda.Stream) -> None:
        """All of them, in one call. Raises RuntimeError with the driver's code."""
        operations = self._operations
        for i, number in enumerate(numbers):
            operations[_OPERATION_WORDS * i + 2] = number
        status = _driver().cuStreamBatchMemOp_v2(stream.cuda_stream, self._count, operations, 0)
        if status:
            raise RuntimeError(f"writing to the device failed with CUDA error {status}")
