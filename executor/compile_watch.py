"""Proof that nothing is compiled or captured while serving: a count that must stay 0.

Owns hooks into the three that could stall a step: dynamo, Triton, CUDA graph capture. The executor process starts it
when the engine is ready; each result carries what happened since the one before. It only counts and names, never
prevents.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from ipc.logs import news


class CompileWatch:
    """Counts from `start` on. `take` may be called on another thread than the one that compiles."""

    def __init__(self) -> None:
        self._seen = self._taken = 0

    def start(self) -> None:
        """Install the hooks, for the rest of the process. What is not imported by now is never used: no hook for it."""
        if (dynamo := sys.modules.get("torch._dynamo.callback")) is not None:
            dynamo.callback_handler.register_start_callback(lambda _: self._note("a traced function"))
        if (triton := sys.modules.get("triton")) is not None:
            self._watch_triton(triton.knobs.compilation)
        self._watch_capture(torch.cuda.CUDAGraph)

    def take(self) -> int:
        """Compilations and captures since the last call."""
        seen, taken = self._seen, self._taken
        self._taken = seen
        return seen - taken

    def _note(self, what: str) -> None:
        self._seen += 1
        news("executor", f"{what} was compiled while serving")

    def _watch_triton(self, knobs: Any) -> None:
        """Kernels found in the cache on disk count too: loading one takes milliseconds."""
        before = knobs.listener

        def listener(**compiled: Any) -> None:
            self._note(f"Triton kernel {getattr(compiled.get('src'), 'name', '?')}")
            if before is not None:
                before(**compiled)

        knobs.listener = listener

    def _watch_capture(self, graph: Any) -> None:
        begin = graph.capture_begin  # torch has no hook for it

        def capture_begin(*args: Any, **kwargs: Any) -> Any:
            self._note("a CUDA graph")
            return begin(*args, **kwargs)

        graph.capture_begin = capture_begin
