"""CUDA graphs of decode steps: a ladder of batch sizes, captured before the engine is ready, replayed with padding.

Each size has two graphs: the model (gather the carry-over tokens, forward) and the greedy tail (argmax, scatter). Steps
whose rows need more than greedy replay the first and sample eagerly from its logits. Called by the step runner only;
nothing is captured while serving.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from tqdm import tqdm

from executor.inputs import StagedPlan, StepInputs
from executor.slot_state import SlotState

_FINE_LADDER: Final = (1, 2, 4, 8, 12, 16)
_TYPESTR: Final = {2: "<i2", 4: "<i4"}


def ladder(max_rows: int) -> list[int]:
    """Batch sizes to capture: 1, 2, 4, 8, 12, 16, by 8 up to 256, by 16 beyond, and max_rows itself."""
    sizes = [*_FINE_LADDER, *range(24, 257, 8), *range(272, max_rows, 16)]
    return [size for size in sizes if size < max_rows] + [max_rows]


@dataclass(slots=True)
class DecodeGraph:
    """One size of the ladder. Tensors are static: a replay reads and writes the same memory."""

    model: torch.cuda.CUDAGraph
    greedy: torch.cuda.CUDAGraph
    inputs: StepInputs  # [bucket] rows
    logits: torch.Tensor  # [bucket, vocab], valid from a replay of `model` to the next replay of any graph
    token: torch.Tensor  # int32 [bucket], of the greedy tail


class DecodeGraphs:
    """The ladder. `forward(inputs)` gives logits [rows, vocab]; `sample_greedy(inputs, logits)` gives tokens int32
    [rows] and carries them over; both must be capturable."""

    def __init__(
        self,
        state: SlotState,
        *,
        max_rows: int,
        max_kv_len: int,
        compute: torch.cuda.Stream,
        forward: Callable[[StepInputs], torch.Tensor],
        sample_greedy: Callable[[StepInputs, torch.Tensor], torch.Tensor],
    ) -> None:
        from executor.unpack_kernel import UnpackDecode, decode_inputs  # Triton needs CUDA

        self._unpack, self._inputs = UnpackDecode(state), decode_inputs
        self._state, self._max_kv_len = state, max_kv_len
        self._forward, self._sample_greedy = forward, sample_greedy
        device = state.position.device
        self._row_slot = torch.full((max_rows,), state.null_slot, dtype=torch.int32, device=device)  # [rows], padded
        self._row_sample = torch.ones(max_rows, dtype=torch.int32, device=device)
        self._index = torch.arange(max_rows + 1, device=device)
        self._pool: Any = torch.cuda.graph_pool_handle()
        self._compute = compute
        self._graphs: dict[int, DecodeGraph] = {}
        sizes = ladder(max_rows)
        # Largest first: the smaller ones then fit into memory that the pool already has.
        for size in tqdm(sizes[::-1], desc="capturing CUDA graphs", unit="graph", disable=None):
            self._graphs[size] = self._capture(size)
        self._bucket = [next(size for size in sizes if size >= rows) for rows in range(max_rows + 1)]

    def replay_model(self, plan: StagedPlan) -> DecodeGraph:
        """Apply the plan's block deltas and run the model over its rows, all decode rows.

        They are the first rows of the returned graph; the others are padding.
        """
        bucket = self._bucket[plan.header.num_rows]
        self._unpack(plan, self._row_slot[:bucket])
        graph = self._graphs[bucket]
        graph.model.replay()
        return graph

    def _capture(self, size: int) -> DecodeGraph:
        with torch.cuda.stream(self._compute):
            self._sample_greedy(*self._run(size))  # compiles and warms up whatever this size needs
        self._compute.synchronize()
        model, greedy = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(model, pool=self._pool, stream=self._compute):
            inputs, logits = self._run(size)
        with torch.cuda.graph(greedy, pool=self._pool, stream=self._compute):
            token = self._sample_greedy(inputs, logits)
        return DecodeGraph(model, greedy, inputs, _borrow(logits), token)

    def _run(self, size: int) -> tuple[StepInputs, torch.Tensor]:
        row_slot, row_sample = self._row_slot[:size], self._row_sample[:size]
        inputs = self._inputs(row_slot, row_sample, self._index, self._state, self._max_kv_len)
        return inputs, self._forward(inputs)


class _Memory:
    """Names device memory to torch without owning it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.__cuda_array_interface__ = {
            "shape": tuple(tensor.shape),
            "typestr": _TYPESTR[tensor.element_size()],
            "data": (tensor.data_ptr(), False),
            "strides": None,
            "version": 3,
        }


def _borrow(tensor: torch.Tensor) -> torch.Tensor:
    """An alias that keeps nothing alive, so that the logits of all graphs share the pool's memory.

    The pool itself lives as long as its graphs; owning the logits of every size would cost gigabytes.
    """
    assert tensor.is_contiguous(), f"logits of shape {tuple(tensor.shape)} have strides {tensor.stride()}"
    return torch.as_tensor(_Memory(tensor), device=tensor.device).view(tensor.dtype)
