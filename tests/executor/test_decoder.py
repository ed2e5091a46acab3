"""The fused decoder computes what transformers does: with few rows and with many, in any mix of chunks and decode rows.

Runs on a GPU in bfloat16, or on the CPU in float32 under TRITON_INTERPRET=1 where triton is installed.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.executor.fused_model import INTERPRET, ON_GPU, WIDER, check_logits, fused_model
from tests.executor.paged_generate import paged_generate
from tests.executor.test_architectures import ARCHITECTURES, save_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not ON_GPU and not INTERPRET, reason="needs a CUDA device, or triton and TRITON_INTERPRET=1"),
]


def check_model(name: str, folder: Path) -> None:
    """Either way of running prompts and decode rows gives transformers' logits."""
    kind, changes, windows = ARCHITECTURES[name]
    theirs = save_model(folder, kind, changes | WIDER).float()
    with torch.inference_mode():
        ours = fused_model(folder)
    assert [layer.spec.window for layer in ours.layers] == windows
    lengths, new = ((1, 2, 17, 50, 100), 24) if ON_GPU else ((1, 17), 5)
    prompts = [torch.randint(3, 128, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in lengths]
    assert ours.decoder is not None
    for ways in ours.decoder.both_ways():
        ours.decoder.ways = ways
        with torch.inference_mode():
            tokens, logits = paged_generate(ours, prompts, new, chunk=40)
        for prompt, ids, mine in zip(prompts, tokens, logits, strict=True):
            check_logits(theirs, prompt, ids, mine)


@pytest.mark.parametrize("name", ["llama", "llama_yarn", "qwen2", "qwen2_window", "qwen3", "mistral"])
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    check_model(name, tmp_path)


@pytest.mark.parametrize("name", ["llama", "qwen2_window", "qwen3"])
def test_reading_ahead_is_not_seen(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention reads ahead with dependent launch only, which the CPU lacks: here it does so anyway."""
    from executor.attention import triton as backend

    options = backend._decode_options
    monkeypatch.setattr(backend, "_decode_options", cache(lambda *kind: options(*kind) | {"reads_ahead": kind[3]}))
    check_model(name, tmp_path)


def test_the_choice_of_kernels_never_runs_more_rows_than_a_step_may_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from executor import decoder as decoder_module

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    save_model(tmp_path, ARCHITECTURES["llama"][0], ARCHITECTURES["llama"][1] | WIDER)
    with torch.inference_mode():
        decoder = fused_model(tmp_path).decoder
    assert decoder is not None
    ran: list[int] = []

    def forward(rows: int) -> torch.Tensor:
        ran.append(rows)
        return torch.empty(0)

    def seconds(run: Any) -> float:
        """Up to 16 rows are faster by `linear_kernel`, more by cuBLAS."""
        run()
        rows = ran[-1]
        few = decoder.ways[decoder_module.row_class(rows)].few
        return float(few == (rows > 16))

    monkeypatch.setattr(decoder_module, "time_graph", seconds)
    default = decoder.ways.copy()
    decoder.choose_ways(forward, 40, 1024)
    assert set(ran) == {16, 32, 40}
    assert [decoder.ways[size].few for size in (16, 32, 64)] == [True, False, False]
    assert decoder.ways[0] == default[0]
    chosen, times = decoder.ways, len(ran)
    decoder.ways = default.copy()
    decoder.choose_ways(forward, 40, 1024)
    assert (decoder.ways, len(ran)) == (chosen, times), "the second start reads what the first one measured"
    decoder.choose_ways(forward, 16, 1024)
    decoder.choose_ways(forward, 40, 1024)
    assert len(ran) == times, "what is known of some classes is not measured again for others"
    # Two ranks, of which the other has found the first option the fastest, whatever this one measured or read.
    alone, decoder._ranks = decoder._ranks, SimpleNamespace(agree=bool, least=lambda _: 0, size=2)  # type: ignore[assignment]
    decoder.choose_ways(forward, 40, 1024)
    assert all(decoder.ways[size] == decoder._options(size)[0] for size in (16, 32, 64))
    decoder._ranks, before = alone, len(ran)
    file = next((tmp_path / "cache" / "tandem-engine").glob("*.json"))
    file.write_text(file.read_text().replace('"few"', '"former"'))
    decoder.choose_ways(forward, 40, 1024)
    assert (decoder.ways, len(ran)) == (chosen, before + times), "what cannot be read is measured anew"


def test_a_gpu_that_its_kernels_do_not_fit_goes_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.errors import OutOfResources

    from executor import decoder as decoder_module
    from executor import model as model_module

    def too_much(*_: object) -> None:
        raise OutOfResources(102_400, 101_376, "shared memory")

    save_model(tmp_path, ARCHITECTURES["llama"][0], ARCHITECTURES["llama"][1] | WIDER)
    model = fused_model(tmp_path)
    compiled: list[object] = []
    monkeypatch.setattr(decoder_module.FusedDecoder, "forward", too_much)
    monkeypatch.setattr(decoder_module, "DTYPES", (model.dtype,))
    monkeypatch.setattr(model_module, "compile_model", compiled.append)
    model_module.optimize_model(model)
    assert model.decoder is None
    assert compiled == [model]
    assert "no fused decoder: out of resource: shared memory" in model.notes[-1]
