"""Linear layers over few rows on CUDA: which tile of `linear_kernel` each shape takes, and its launch.

Owns the scratch that all launches share, and the table of the fastest tiles, measured once for a GPU.
Called by `executor.decoder` on the compute stream.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, Final

import torch
import triton
from triton import AsyncCompileMode

from executor.layer_launch import LayerLaunch
from executor.linear_kernels import linear_kernel
from executor.measured import cache_path, read_choices, settle_choices
from executor.peers import Sink

_CUDA: Final[Any] = torch.cuda  # untyped in part

ROW_BLOCKS: Final = (16, 32, 64)  # rows of the kernel's tiles
MAX_ROWS: Final = ROW_BLOCKS[-1]  # more rows fill the tensor cores, which cuBLAS does well
_PROGRAMS: Final = 96  # fewer programs cannot draw the memory's full bandwidth
_SHARED_BYTES: Final = 200 << 10  # of one multiprocessor, with room for what the compiler adds
_MAX_SPLITS: Final = 32
_ROUNDS: Final = 5
_NOWHERE: Final = (None, None, 0, 0)  # no `Sink`
# (output features, input features, multiple of the programs needed, one program a multiprocessor) worth measuring.
_CUTS: Final = (
    (64, 128, 1, False),
    (64, 128, 1, True),
    (64, 128, 2, False),
    (64, 64, 1, True),
    (64, 64, 1, False),
    (64, 256, 1, True),
    (32, 128, 1, False),
    (32, 64, 1, False),
    (128, 64, 1, False),
)


@dataclass(frozen=True, slots=True)
class Tile:
    """How a product is cut. `splits` programs share the input features of one block of output features."""

    block_n: int
    block_k: int
    splits: int
    stages: int
    warps: int
    prefetch: int  # input features to ask for before the kernel ahead has ended


@dataclass(frozen=True, slots=True)
class Shape:
    """What the choice of a tile depends on."""

    n: int  # output features; gated: of the gate
    k: int
    gated: bool
    block_m: int

    @property
    def key(self) -> str:
        return f"{self.n}x{self.k}{'g' if self.gated else ''}m{self.block_m}"


@dataclass(frozen=True, slots=True)
class Scaled:
    """Rows on their way through an RMS norm: times its gain already, not yet divided by their root mean square."""

    value: torch.Tensor  # [rows, width]
    square: torch.Tensor  # float32 [parts, rows], sums of squares before the gain; parts add up
    eps: float


@dataclass(frozen=True, slots=True)
class Linear:
    """A weight. Gated: rows of the gate, then of what it multiplies."""

    weight: torch.Tensor  # [n or 2 n, k]
    bias: torch.Tensor | None = None
    gated: bool = False

    @property
    def n(self) -> int:
        return self.weight.shape[0] // (1 + self.gated)

    @property
    def k(self) -> int:
        return self.weight.shape[1]


def has_pdl(device: torch.device) -> bool:
    """Whether a kernel may be launched while the one before it ends: programmatic dependent launch, from Hopper on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def block_m(rows: int) -> int:
    """The kernel's row block for `rows` <= MAX_ROWS."""
    return next(size for size in ROW_BLOCKS if rows <= size)


def candidates(shape: Shape) -> list[Tile]:
    """Tiles worth measuring, the likeliest first; empty if the kernel cannot run this shape."""
    tiles = []
    for block_n, block_k, few, deep in _CUTS:
        if shape.n % block_n or shape.k % block_k:
            continue
        splits = _splits(shape, block_n, block_k, few)
        share = shape.k // splits
        bytes_each = 2 * block_k * (block_n * (1 + shape.gated) + shape.block_m)
        stages = min(8, _SHARED_BYTES // (1 if deep else 2) // bytes_each, max(2, share // block_k))
        if stages < 2:
            continue
        prefetch = min(128 if shape.gated else 512, 1 << (share.bit_length() - 1))
        tile = Tile(block_n, block_k, splits, stages, 8 if block_n * shape.block_m > 4096 else 4, prefetch)
        if tile not in tiles:
            tiles.append(tile)
    return tiles


def _splits(shape: Shape, block_n: int, block_k: int, times: int) -> int:
    """The fewest shares that give `times` the programs needed, or as many as there can be."""
    most = 0
    for splits in range(1, _MAX_SPLITS + 1):
        if shape.k % (splits * block_k) == 0:
            most = splits
            if shape.n // block_n * splits >= _PROGRAMS * times:
                break
    return most


class SkinnyLinears:
    """Launches linear layers of at most MAX_ROWS rows; each output tile is written by one program.

    `pdl`: kernels are launched while the one ahead ends.
    """

    def __init__(self, linears: Sequence[Linear], device: torch.device) -> None:
        self.pdl = has_pdl(device)
        self._tiles: dict[Shape, Tile] = {}
        scratch = tiles = 1
        for shape in _shapes(linears):
            options = candidates(shape)
            if not options:
                raise ValueError(f"{shape.n} x {shape.k} features do not divide into tiles")
            self._tiles[shape] = options[0]
            scratch = max(scratch, *(_scratch(shape, tile) for tile in options))
            tiles = max(tiles, *(shape.n // tile.block_n for tile in options))
        self._kernel = LayerLaunch(linear_kernel)
        self._partial = torch.empty(scratch, dtype=torch.float32, device=device)
        self._arrived = torch.zeros(tiles, dtype=torch.int32, device=device)

    def begin(self) -> None:
        """A new step."""
        self._kernel.begin()

    def __call__(self, linear: Linear, x: torch.Tensor | Scaled) -> torch.Tensor:
        """x @ weight.T [rows, n], of normed rows if they are `Scaled`; silu(gate) * up if gated."""
        value = x.value if isinstance(x, Scaled) else x
        out = value.new_empty(len(value), linear.n)
        self._launch(linear, x, self._tile(linear, len(value)), out=out)
        return out

    def send(self, linear: Linear, x: torch.Tensor, sink: Sink) -> None:
        """x @ weight.T, written to where all ranks look for it."""
        self._launch(linear, x, self._tile(linear, len(x)), sink=sink)

    def add(
        self, linear: Linear, x: torch.Tensor, residual: torch.Tensor, gain: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, Scaled]:
        """residual + x @ weight.T, and the same on its way through the norm that follows."""
        rows, tile = len(x), self._tile(linear, len(x))
        out = torch.empty_like(residual)
        scaled = Scaled(
            torch.empty_like(residual),
            torch.empty(linear.n // tile.block_n, rows, dtype=torch.float32, device=x.device),
            eps,
        )
        self._launch(linear, x, tile, out=out, residual=residual, gain=gain, scaled=scaled)
        return out, scaled

    def _tile(self, linear: Linear, rows: int) -> Tile:
        return self._tiles[Shape(linear.n, linear.k, linear.gated, block_m(rows))]

    def _launch(
        self,
        linear: Linear,
        x: torch.Tensor | Scaled,
        tile: Tile,
        *,
        out: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
        gain: torch.Tensor | None = None,
        scaled: Scaled | None = None,
        sink: Sink | None = None,
    ) -> None:
        arguments, options = self._arguments(linear, x, tile, out, residual, gain, scaled, sink)
        self._kernel((linear.n // tile.block_n * tile.splits, 1, 1), arguments, options)

    def _arguments(
        self,
        linear: Linear,
        x: torch.Tensor | Scaled,
        tile: Tile,
        out: torch.Tensor | None,
        residual: torch.Tensor | None = None,
        gain: torch.Tensor | None = None,
        scaled: Scaled | None = None,
        sink: Sink | None = None,
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        value, square, eps = (x.value, x.square, x.eps) if isinstance(x, Scaled) else (x, None, 0.0)
        parts = 0 if square is None else len(square)
        rows = len(value)
        arguments = (
            value,
            linear.weight,
            linear.bias,
            square,
            residual,
            gain,
            out,
            None if scaled is None else scaled.value,
            None if scaled is None else scaled.square,
            self._partial,
            self._arrived,
            *(_NOWHERE if sink is None else (sink.addresses, sink.turns, sink.turns_at, sink.place)),
            rows,
            value.stride(0),
            eps,
        )
        shape = Shape(linear.n, linear.k, linear.gated, block_m(rows))
        ranks = 0 if sink is None else len(sink.addresses)
        options = _options(shape, tile, parts, linear.bias is not None, residual is not None, ranks, self.pdl)
        return arguments, options

    def tune(self, linears: Sequence[Linear], progress: Callable[[Sequence[Shape]], Iterator[Shape]]) -> None:
        """Measure the candidates of every shape and keep the fastest; a GPU that was measured before is read from disk.

        `linears` are all those of the model: going round them keeps weights out of the L2 cache, as in a step.
        """
        path = cache_path("linear", linears[0].weight.device)
        known = read_choices(path)
        missing = [shape for shape in self._tiles if not self._take(shape, known)]
        measured = {}
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for shape in progress(missing):
                alike = [m for m in linears if (m.n, m.k, m.gated) == (shape.n, shape.k, shape.gated)]
                self._tiles[shape] = tile = self._fastest(shape, alike, pool)
                measured[shape.key] = asdict(tile)
        if missing:
            settled = settle_choices(path, known, measured)
            for shape in missing:
                self._take(shape, settled)

    def _take(self, shape: Shape, choices: dict[str, Any]) -> bool:
        """Take the tile that is written down for a shape, if there is one."""
        tile = next((tile for tile in candidates(shape) if asdict(tile) == choices.get(shape.key)), None)
        if tile is not None:
            self._tiles[shape] = tile
        return tile is not None

    def _fastest(self, shape: Shape, linears: Sequence[Linear], pool: ThreadPoolExecutor) -> Tile:
        x = torch.randn(shape.block_m, shape.k, dtype=linears[0].weight.dtype, device=linears[0].weight.device)
        out = x.new_empty(shape.block_m, shape.n)
        options = candidates(shape)
        with AsyncCompileMode(pool, ignore_errors=True):
            for tile in options:
                arguments, constants = self._arguments(linears[0], x, tile, out)
                linear_kernel.warmup(*arguments, grid=(1,), **constants)

        def seconds(tile: Tile) -> float:
            try:
                return time_graph(lambda: self._launch_all(linears, x, tile, out))
            except triton.runtime.OutOfResources:
                return float("inf")

        return min(options, key=seconds)

    def _launch_all(self, linears: Sequence[Linear], x: torch.Tensor, tile: Tile, out: torch.Tensor) -> None:
        for linear in linears:
            self._launch(linear, x, tile, out=out)


def _shapes(linears: Sequence[Linear]) -> list[Shape]:
    kinds = dict.fromkeys((linear.n, linear.k, linear.gated) for linear in linears)
    return [Shape(*kind, size) for kind in kinds for size in ROW_BLOCKS]


@cache
def _options(
    shape: Shape, tile: Tile, parts: int, has_bias: bool, has_residual: bool, ranks: int, pdl: bool
) -> dict[str, Any]:
    return {
        "n": shape.n,
        "k": shape.k,
        "parts": parts,
        "parts_pad": triton.next_power_of_2(max(1, parts)),
        "splits": tile.splits,
        "block_m": shape.block_m,
        "block_n": tile.block_n,
        "block_k": tile.block_k,
        "stages": tile.stages,
        "gated": shape.gated,
        "has_bias": has_bias,
        "has_residual": has_residual,
        "ranks": ranks,
        "prefetch": tile.prefetch,
        "pdl": pdl,
        "num_warps": tile.warps,
        "launch_pdl": pdl,
    }


def _scratch(shape: Shape, tile: Tile) -> int:
    """Floats that the shares of a product take."""
    return shape.n * shape.block_m * (1 + shape.gated) * tile.splits if tile.splits > 1 else 1


def time_graph(run: Callable[[], Any]) -> float:
    """Seconds of `run` replayed as a CUDA graph: the median of a few."""
    stream: Any = _CUDA.Stream()
    with torch.cuda.stream(stream):
        run()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    times: list[float] = []
    for _ in range(_ROUNDS):
        start, end = (_CUDA.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return sorted(times)[_ROUNDS // 2]
