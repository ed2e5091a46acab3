"""Copies that the CUDA driver queues at once. torch's own asks first what kind of memory each end is: 30 us of a step.

Called by the lanes, on the launch thread.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch


@cache
def _driver() -> Any:
    copy = ctypes.CDLL("libcuda.so.1").cuMemcpyAsync
    copy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    return copy


def queue_copy(into: torch.Tensor, source: torch.Tensor, nbytes: int, stream: torch.cuda.Stream) -> None:
    """The first bytes of `source` go to the first of `into`; both contiguous, on the device or in pinned memory.

    Raises RuntimeError with the driver's code.
    """
    status = _driver()(into.data_ptr(), source.data_ptr(), nbytes, stream.cuda_stream)
    if status:
        raise RuntimeError(f"copying {nbytes} bytes failed with CUDA error {status}")
