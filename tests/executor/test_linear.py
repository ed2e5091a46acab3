"""The kernel of few rows against float64, on fresh random inputs, with poisoned outputs and every tile.

Runs on a GPU, or on the CPU under TRITON_INTERPRET=1 where triton is installed.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

_INTERPRET = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None
_ON_GPU = torch.cuda.is_available()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not _ON_GPU and not _INTERPRET, reason="needs a CUDA device, or triton and TRITON_INTERPRET=1"),
]
_DEVICE = torch.device("cuda" if _ON_GPU else "cpu")
# The interpreter's products know no bfloat16.
_DTYPE = torch.bfloat16 if _ON_GPU else torch.float32
_LIMIT = 4e-3 if _ON_GPU else 1e-5
_SHAPES = [(256, 128), (384, 1024), (2048, 640)] if _ON_GPU else [(128, 256)]
_ROWS = [1, 3, 16, 17, 32, 33, 64, 65, 100, 128] if _ON_GPU else [1, 17, 70]


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


def rows_on_their_way(rows: int, width: int) -> tuple[object, torch.Tensor]:
    """`Scaled` rows with the squares in three parts, and the normed rows they stand for, float64."""
    from executor.linear import Scaled

    x = torch.randn(rows, width, device=_DEVICE) * 3
    gain = torch.randn(width, device=_DEVICE)
    value = (x * gain).to(_DTYPE)
    parts = torch.stack([(part * part).sum(1) for part in x.tensor_split(3, dim=1)])
    eps = 1e-5
    return Scaled(value, parts, eps), value.double() * torch.rsqrt(parts.double().sum(0) / width + eps)[:, None]


@pytest.mark.parametrize("shape", _SHAPES, ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_every_tile_matches_float64(shape: tuple[int, int], gated: bool) -> None:
    from executor.linear import Linear, Shape, SkinnyLinears, candidates, row_class

    n, k = shape
    weight = (torch.randn(n * (1 + gated), k, device=_DEVICE) / k**0.5).to(_DTYPE)
    bias = None if gated else torch.randn(n, device=_DEVICE).to(_DTYPE)
    linear = Linear(weight, bias, gated)
    skinny = SkinnyLinears([linear], _DEVICE)
    for rows in _ROWS:
        scaled, normed = rows_on_their_way(rows, k)
        plain = torch.randn(rows, k, device=_DEVICE).to(_DTYPE)
        for tile in candidates(Shape(n, k, gated, row_class(rows))):
            skinny._tiles[Shape(n, k, gated, row_class(rows))] = tile
            for x, reference in ((plain, plain.double()), (scaled, normed)):
                want = reference @ weight.double().T
                want = F.silu(want[:, :n]) * want[:, n:] if gated else want + bias.double()  # type: ignore[union-attr]
                got = skinny(linear, x)  # type: ignore[arg-type]
                assert error(got, want) < _LIMIT, (rows, tile)
                assert torch.equal(skinny(linear, x), got), "whoever arrives last"  # type: ignore[arg-type]
        assert int(skinny._arrived.abs().sum()) == 0


@pytest.mark.parametrize("shape", _SHAPES, ids=str)
def test_adding_prepares_the_next_norm(shape: tuple[int, int]) -> None:
    from executor.linear import Linear, Shape, SkinnyLinears, candidates, row_class

    n, k = shape
    linear = Linear((torch.randn(n, k, device=_DEVICE) / k**0.5).to(_DTYPE))
    skinny = SkinnyLinears([linear], _DEVICE)
    gain = torch.randn(n, device=_DEVICE).to(_DTYPE)
    for rows in _ROWS:
        x, residual = (torch.randn(rows, width, device=_DEVICE).to(_DTYPE) for width in (k, n))
        want = residual.double() + x.double() @ linear.weight.double().T
        for tile in candidates(Shape(n, k, False, row_class(rows))):
            skinny._tiles[Shape(n, k, False, row_class(rows))] = tile
            out, scaled = skinny.add(linear, x, residual, gain, 1e-6)
            assert error(out, want) < _LIMIT, (rows, tile)
            assert error(scaled.value, out.double() * gain.double()) < _LIMIT
            assert error(scaled.square.sum(0), (out.double() ** 2).sum(1)) < 1e-5


def test_shapes_that_no_tile_divides_are_refused() -> None:
    from executor.linear import Linear, SkinnyLinears

    with pytest.raises(ValueError, match="100 x 128 features do not divide into tiles"):
        SkinnyLinears([Linear(torch.zeros(100, 128, device=_DEVICE, dtype=_DTYPE))], _DEVICE)


@pytest.mark.skipif(not _ON_GPU, reason="needs a CUDA device")
def test_tuning_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from executor.linear import ROW_CLASSES, Linear, SkinnyLinears

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    linears = [Linear(torch.randn(256, 512, device=_DEVICE).to(_DTYPE)) for _ in range(4)]
    measured: list[int] = []

    def progress(shapes):  # type: ignore[no-untyped-def]
        measured.append(len(shapes))
        return iter(shapes)

    first, second = SkinnyLinears(linears, _DEVICE), SkinnyLinears(linears, _DEVICE)
    first.tune(linears, progress)
    second.tune(linears, progress)
    assert measured == [len(ROW_CLASSES), 0]
    assert first._tiles == second._tiles
    next((tmp_path / "tandem-engine").glob("*.json")).write_text('{"256x512m16": {"block_n": 7}}')
    SkinnyLinears(linears, _DEVICE).tune(linears, progress)
    assert measured == [len(ROW_CLASSES), 0, len(ROW_CLASSES)], "what cannot be read is measured anew"
