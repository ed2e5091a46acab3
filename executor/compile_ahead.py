"""Triton kernels compiled on all cores, ahead of a run that would compile them one after the other, a second each.

Used at start only. Kernels of the fused decoder and of attention are launched through `launch`; within
`compiling_ahead` it compiles them and launches nothing, so that a forward costs its Python and computes nothing. What
does not compile says so when it is launched.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from ipc.logs import news

_is_ahead = False


@contextmanager
def compiling_ahead() -> Iterator[None]:
    """Until the end of the block, which waits for all compilations, `launch` on this thread compiles only.

    The block must not use what kernels would have computed, nor run kernels that wait for others. What it raises is
    told, and ends the block only.
    """
    from triton import AsyncCompileMode  # Triton is not there on a machine without CUDA

    global _is_ahead
    with ThreadPoolExecutor(os.cpu_count()) as pool, AsyncCompileMode(pool, ignore_errors=True):
        _is_ahead = True
        try:
            yield
        except Exception as error:  # it fails again in the run itself, if that fails too
            news("executor", f"not all was compiled ahead: {type(error).__name__}: {error}")
        finally:
            _is_ahead = False


def launch(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
    """`kernel[grid](*arguments, **options)`, which is what was compiled for them, or None in Triton's interpreter."""
    if not _is_ahead:
        return kernel[grid](*arguments, **options)
    kernel.warmup(*arguments, grid=grid, **options)
    return _Unlaunched()


class _Unlaunched:
    """In place of what is still being compiled."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments: None
