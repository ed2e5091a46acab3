"""Ahead of a run its kernels are compiled, all of them, and nothing is computed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from executor import compile_ahead
from executor.compile_ahead import compiling_ahead, launch
from executor.layer_launch import LayerLaunch
from executor.warmup import synthetic_plan
from ipc.frames import PlanFlag
from tests.executor.fused_model import ON_GPU
from tests.executor.test_layer_launch import GRID, Kernel
from tests.executor.test_mixed_steps import make_bench, stage


class Warm(Kernel):
    """Notes what is to be compiled, too."""

    def warmup(self, *arguments: object, grid: tuple[int, ...], **options: object) -> None:
        self.launches.append(("warmup", grid, *arguments))


def test_ahead_a_kernel_is_asked_for_once_a_step_and_never_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, options = Warm(), {"flag": True, "width": 64}
    by_layer = LayerLaunch(kernel)
    monkeypatch.setattr(compile_ahead, "_is_ahead", True)
    for layer in range(3):
        by_layer(GRID, (f"x{layer}", 7), options)
    launch(kernel, GRID, ("y", 8), options)
    assert kernel.launches == [("warmup", GRID, "x0", 7), ("warmup", GRID, "y", 8)]
    monkeypatch.setattr(compile_ahead, "_is_ahead", False)
    by_layer.begin()
    by_layer(GRID, ("x0", 7), options)
    assert kernel.launches[2:] == [("search", GRID, "x0", 7)]


def test_a_fault_ahead_of_a_run_is_told_and_leaves_the_run_to_itself(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")
    with compiling_ahead():
        raise ValueError("no such layer")
    assert "not all was compiled ahead: ValueError: no such layer" in capsys.readouterr().err
    kernel = Kernel()
    launch(kernel, GRID, ("x", 7), {"flag": True, "width": 64})
    assert kernel.launches == [("search", GRID, "x", 7)]


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("few", [False, True])
def test_what_was_compiled_ahead_is_all_that_the_step_launches(few: bool, tmp_path: Path) -> None:
    from executor.attention.decode_kernels import decode_kernel
    from executor.layer_kernels import embed_kernel

    with torch.inference_mode():
        bench = make_bench(tmp_path, "qwen3", 12, 96)
        decoder = bench.model.decoder
        assert decoder is not None
        decoder.ways = decoder.both_ways()[few]
        bench.restore()
        step = bench.unpack.eager(stage(bench, synthetic_plan([1] * 3, 3, PlanFlag.NONE)))
        for kernel in (embed_kernel, decode_kernel):
            kernel.device_caches.clear()  # what earlier tests compiled
        assert {"embed_kernel", "decode_kernel"} <= compiled_by(lambda: bench.model.compile_ahead([step]))
        for name, tensor in bench.tensors().items():
            if name[0] in "kv":
                assert torch.equal(tensor, bench.start[name]), name
        assert not compiled_by(lambda: bench.model.forward(step))
        written = bench.model.layers[0].k_cache[1:] != bench.start["k0"][1:]
        assert written.any(-1).any(-1).sum() == 3


def compiled_by(run: Callable[[], object]) -> set[str]:
    """Names of kernels that were not there before."""
    from triton import knobs

    names = set()
    with knobs.compilation.scope():
        knobs.compilation.listener = lambda **compiled: names.add(compiled["src"].name)
        run()
    return names
