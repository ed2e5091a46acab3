"""CUDA graphs of whole steps, captured before the engine is ready, replayed with padding.

Two ladders: steps of decode rows only, by rows, and steps with prompt tokens, by tokens. Each size has one graph: the
plan, the model, and the greedy tail (argmax, carry-over). Where the plan lies and where the tokens go, it finds in two
numbers on the device. If rows need more than greedy the second is 0, the tail does nothing, and the caller samples
eagerly from the graph's logits.

Steps that fit no size run eagerly: they keep the device busy for longer than their launches take, so that padding would
only cost; or somebody asked for the log-probabilities of a prompt. Of the long ones those that fill the token budget
need no padding, and have a graph too. Called by the step runner only; nothing is captured while serving.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from tqdm import tqdm

from executor.inputs import PlanHeader, StagedPlan, StepInputs
from ipc.frames import FrameLimits

if TYPE_CHECKING:
    from executor.unpack_kernel import Unpack

_FINE_LADDER: Final = (1, 2, 4, 8, 12, 16)
_TOKEN_LADDER: Final = (16, 32, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
_FREE_TOKENS: Final = 256  # up to so many, reading the weights takes longer than multiplying by them: padding is free
_LAUNCH_FLOPS: Final = 4e12  # what a GPU does in the milliseconds that the launches of a step take
_PREFILL_ROWS: Final = 33  # of a graph: a plan admits at most 32 requests, and one goes on with its prompt
_TYPESTR: Final = {2: "<i2", 4: "<i4"}


def ladder(max_rows: int) -> list[int]:
    """Batch sizes to capture: 1, 2, 4, 8, 12, 16, by 8 up to 256, by 16 beyond, and max_rows itself."""
    sizes = [*_FINE_LADDER, *range(24, 257, 8), *range(272, max_rows, 16)]
    return [size for size in sizes if size < max_rows] + [max_rows]


def token_ladder(max_tokens: int, parameters: int) -> list[int]:
    """Tokens of the steps with prompt tokens to capture: those of a model of `parameters` that end before their
    launches would, and 256 at least."""
    most = max(_FREE_TOKENS, min(_TOKEN_LADDER[-1], _LAUNCH_FLOPS / (2 * parameters)))
    sizes = [*(size for size in _TOKEN_LADDER if size < max_tokens), max_tokens]
    return [size for size in sizes if size <= most]


@dataclass(slots=True)
class StepGraph:
    """One size of a ladder. Tensors are static: a replay reads and writes the same memory."""

    cuda_graph: torch.cuda.CUDAGraph
    inputs: StepInputs  # all that there is room for
    logits: torch.Tensor  # [rows, vocab], valid from a replay to the next one of any graph


class StepGraphs:
    """Both ladders, and with `full_steps` a graph for steps of all tokens.

    `forward(inputs)` gives logits [rows, vocab]; `sample_greedy(logits, row_slot, address)` is as
    `Sampler.sample_greedy`; both must be capturable."""

    def __init__(
        self,
        unpack: Unpack,
        limits: FrameLimits,
        *,
        parameters: int,
        full_steps: bool,
        compute: torch.cuda.Stream,
        forward: Callable[[StepInputs], torch.Tensor],
        sample_greedy: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None],
    ) -> None:
        self._unpack, self._forward, self._sample_greedy = unpack, forward, sample_greedy
        self._pool: Any = torch.cuda.graph_pool_handle()
        self._compute = compute
        # A plan never has more decode rows than its budget of tokens.
        self._rows = ladder(min(limits.max_rows, limits.max_tokens))
        self._tokens = token_ladder(limits.max_tokens, parameters)
        rooms = [unpack.room(rows=size, decode=size, prefill=0, tokens=size) for size in self._rows]
        longest = {limits.max_tokens} if full_steps else set()
        rooms += [_mixed_room(unpack, size, limits.max_rows) for size in {*self._tokens, *longest}]
        # Largest first: the smaller ones then fit into memory that the pool already has.
        rooms.sort(key=lambda room: room.num_tokens, reverse=True)
        self._graphs: dict[tuple[bool, int], StepGraph] = {}  # by whether they are of decode rows only, and size
        for room in tqdm(rooms, desc="capturing CUDA graphs", unit="graph", disable=None):
            self._graphs[room.decode_only, room.num_tokens] = self._capture(room)

    def replay(self, plan: StagedPlan, token_address: int) -> StepGraph | None:
        """Unpack the plan and run the model over its rows; None, and nothing is done, if it fits no graph.

        They are the first rows of the returned graph; the others are padding. Unless `token_address` is 0, all of them
        get their greedy token, which is carried over and written to the int32 column [max_rows] at that address.
        """
        size = self._size(plan.header)
        if size is None:
            return None
        graph = self._graphs[size]
        self._unpack.point(plan.staged, token_address)
        graph.cuda_graph.replay()
        return graph

    def _size(self, header: PlanHeader) -> tuple[bool, int] | None:
        if not header.num_prefill:
            return True, self._rows[bisect_left(self._rows, header.num_rows)]
        tokens = header.num_tokens
        if tokens <= self._tokens[-1]:
            tokens = self._tokens[bisect_left(self._tokens, tokens)]
        size = False, tokens
        fits = header.num_prefill <= _PREFILL_ROWS and not header.num_scores and size in self._graphs
        return size if fits else None

    def _capture(self, inputs: StepInputs) -> StepGraph:
        with torch.cuda.stream(self._compute):
            self._unpack.point_at_nothing()
            self._run(inputs)  # compiles and warms up whatever this size needs
            self._compute.synchronize()
            graph = torch.cuda.CUDAGraph()
            # `torch.cuda.graph` would give the driver memory back that eager steps ask it for again, which stalls them.
            graph.capture_begin(pool=self._pool)
            logits = self._run(inputs)
            graph.capture_end()
        return StepGraph(graph, inputs, _borrow(logits))

    def _run(self, inputs: StepInputs) -> torch.Tensor:
        self._unpack.fill(inputs)
        logits = self._forward(inputs)
        self._sample_greedy(logits, inputs.row_slot, self._unpack.token_address)
        return logits


def _mixed_room(unpack: Unpack, tokens: int, max_rows: int) -> StepInputs:
    """One of them at least is a prompt's."""
    rows = min(tokens, max_rows)
    return unpack.room(rows=rows, decode=min(rows, tokens - 1), prefill=min(rows, _PREFILL_ROWS), tokens=tokens)


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
