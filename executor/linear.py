"""Linear layers over few rows on CUDA: which tile of `linear_kernel` each shape takes, and its launch.

Owns the scratch that all launches share, and the table of the fastest tiles, measured once for a GPU.
Called by `executor.decoder` on the compute stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any, Final

import torch
import triton

from executor import linear_kernels
from executor.compile_ahead import compiling_ahead
from executor.layer_launch import LayerLaunch
from executor.linear_kernels import linear_kernel
from executor.measured import cache_path, read_choices, settle_choices
from executor.peers import Sink

_CUDA: Final[Any] = torch.cuda  # untyped in part

ROW_CLASSES: Final = (16, 32, 64, 128)  # products of up to so many rows are cut alike
MAX_ROWS: Final = ROW_CLASSES[-1]  # more rows fill the tensor cores, which cuBLAS does well
MAX_HEAD_ROWS: Final = 64  # the head's weights are so many that fewer rows do
_SINGLE_ROWS: Final = 32  # up to so many rows are one tile
_PROGRAMS: Final = 96  # fewer programs cannot draw the memory's full bandwidth
_SHARED_BYTES: Final = 200 << 10  # of one multiprocessor, with room for what the compiler adds
_MAX_SPLITS: Final = 32
_ROUNDS: Final = 5
_NOWHERE: Final = (None, None, 0, 0)  # no `Sink`
# (output features, input features, multiple of the programs needed, one program a multiprocessor) worth measuring;
# the first few of them for several tiles of rows.
_CUTS: Final = (
    (64, 128, 1, False),
    (64, 128, 1, True),
    (64, 64, 1, True),
    (128, 64, 1, False),
    (64, 128, 2, False),
    (64, 64, 1, False),
    (64, 256, 1, True),
    (32, 128, 1, False),
    (32, 64, 1, False),
)
_FEW_CUTS: Final = 5
_ROW_TILES: Final = (64, 32)


@dataclass(frozen=True, slots=True)
class Tile:
    """How a product is cut. `splits` programs share the input features of one block of rows and output features."""

    block_m: int  # rows
    block_n: int  # output features
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
    rows: int  # one of ROW_CLASSES

    @property
    def key(self) -> str:
        return f"{self.n}x{self.k}{'g' if self.gated else ''}m{self.rows}"


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
    max_rows: int = MAX_ROWS  # that the kernel is wanted for
    early: bool = False  # what follows it reads ahead of its result

    @property
    def n(self) -> int:
        return self.weight.shape[0] // (1 + self.gated)

    @property
    def k(self) -> int:
        return self.weight.shape[1]

    def shape(self, rows: int) -> Shape:
        """Of its products with so many rows."""
        return Shape(self.n, self.k, self.gated, row_class(rows))


def has_pdl(device: torch.device) -> bool:
    """Whether a kernel may be launched while the one before it ends: programmatic dependent launch, from Hopper on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def row_class(rows: int) -> int:
    """Which of ROW_CLASSES `rows` <= MAX_ROWS are in."""
    return next(size for size in ROW_CLASSES if rows <= size)


def candidates(shape: Shape) -> list[Tile]:
    """Tiles worth measuring, the likeliest first; empty if the kernel cannot run this shape."""
    single = shape.rows <= _SINGLE_ROWS
    tiles = []
    for block_m in (shape.rows,) if single else _ROW_TILES:
        for cut in _CUTS if single else _CUTS[:_FEW_CUTS]:
            tile = _tile(shape, block_m, *cut)
            if tile is not None and tile not in tiles:
                tiles.append(tile)
    return tiles


def _tile(shape: Shape, block_m: int, block_n: int, block_k: int, times: int, deep: bool) -> Tile | None:
    """One of `_CUTS`; None if the shape does not divide into it."""
    if shape.n % block_n or shape.k % block_k:
        return None
    splits = _splits(shape, block_k, shape.n // block_n * (shape.rows // block_m), _PROGRAMS * times)
    share = shape.k // splits
    bytes_each = 2 * block_k * (block_n * (1 + shape.gated) + block_m)
    stages = min(8, _SHARED_BYTES // (1 if deep else 2) // bytes_each, max(2, share // block_k))
    if stages < 2:
        return None
    prefetch = min(128 if shape.gated else 512, 1 << (share.bit_length() - 1))
    return Tile(block_m, block_n, block_k, splits, stages, 8 if block_n * block_m > 4096 else 4, prefetch)


def _splits(shape: Shape, block_k: int, tiles: int, programs: int) -> int:
    """The fewest shares of so many tiles that give the programs needed, or as many as there can be."""
    most = 0
    for splits in range(1, _MAX_SPLITS + 1):
        if shape.k % (splits * block_k) == 0:
            most = splits
            if tiles * splits >= programs:
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
            tiles = max(tiles, *(_num_tiles(shape.n, tile, shape.rows) for tile in options))
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
        return self._tiles[linear.shape(rows)]

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
        rows = len(arguments[0])
        self._kernel((_num_tiles(linear.n, tile, rows) * tile.splits, 1, 1), arguments, options)

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
            len(value),
            value.stride(0),
            eps,
        )
        kind = linear.n, linear.k, linear.gated, linear.bias is not None
        ranks = 0 if sink is None else len(sink.addresses)
        return arguments, _options(*kind, tile, parts, residual is not None, ranks, linear.early, self.pdl)

    def tune(self, linears: Sequence[Linear], progress: Callable[[Sequence[_Product]], Iterator[_Product]]) -> None:
        """Measure the candidates of every shape and keep the fastest; a GPU that was measured before is read from disk.

        `linears` are all those of the model: going round them keeps weights out of the L2 cache, as in a step.
        """
        path = cache_path("linear", linears[0].weight.device, linear_kernels)
        known = read_choices(path)
        missing = [shape for shape in self._tiles if not self._take(shape, known)]
        products = [_Product.of(shape, linears) for shape in missing]
        with compiling_ahead():
            for product in products:
                for tile in candidates(product.shape):
                    self._run(product, tile)
        self.begin()
        measured = {}
        for product in progress(products):
            self._tiles[product.shape] = tile = self._fastest(product)
            measured[product.shape.key] = asdict(tile)
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

    def _fastest(self, product: _Product) -> Tile:
        def seconds(tile: Tile) -> float:
            try:
                return time_graph(lambda: self._run(product, tile))
            except triton.runtime.OutOfResources:
                return float("inf")

        return min(candidates(product.shape), key=seconds)

    def _run(self, product: _Product, tile: Tile) -> None:
        for linear in product.linears:
            self._launch(linear, product.x, tile, out=product.out)


@dataclass(frozen=True, slots=True)
class _Product:
    """What the tiles of a shape are measured on."""

    shape: Shape
    linears: list[Linear]
    x: torch.Tensor  # [rows, k]
    out: torch.Tensor  # [rows, n]

    @classmethod
    def of(cls, shape: Shape, linears: Sequence[Linear]) -> _Product:
        # Alone, a product is followed by itself, which reads nothing ahead.
        alike = [replace(m, early=False) for m in linears if (m.n, m.k, m.gated) == (shape.n, shape.k, shape.gated)]
        weight = alike[0].weight
        x = torch.randn(shape.rows, shape.k, dtype=weight.dtype, device=weight.device)
        return cls(shape, alike, x, x.new_empty(shape.rows, shape.n))


def _shapes(linears: Sequence[Linear]) -> list[Shape]:
    """All kinds of products of these layers."""
    shapes = (linear.shape(size) for linear in linears for size in ROW_CLASSES if size <= linear.max_rows)
    return list(dict.fromkeys(shapes))


@cache
def _options(
    n: int,
    k: int,
    gated: bool,
    has_bias: bool,
    tile: Tile,
    parts: int,
    has_residual: bool,
    ranks: int,
    early: bool,
    pdl: bool,
) -> dict[str, Any]:
    return {
        "n": n,
        "k": k,
        "parts": parts,
        "parts_pad": triton.next_power_of_2(max(1, parts)),
        "splits": tile.splits,
        "block_m": tile.block_m,
        "block_n": tile.block_n,
        "block_k": tile.block_k,
        "stages": tile.stages,
        "gated": gated,
        "has_bias": has_bias,
        "has_residual": has_residual,
        "ranks": ranks,
        "prefetch": tile.prefetch,
        "early": early,
        "pdl": pdl,
        "num_warps": tile.warps,
        "launch_pdl": pdl,
    }


def _num_tiles(n: int, tile: Tile, rows: int) -> int:
    """Tiles of so many output features and rows."""
    return n // tile.block_n * -(-rows // tile.block_m)


def _scratch(shape: Shape, tile: Tile) -> int:
    """Floats that the shares of a product take."""
    return shape.n * shape.rows * (1 + shape.gated) * tile.splits if tile.splits > 1 else 1


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
