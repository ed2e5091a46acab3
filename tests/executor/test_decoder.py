"""The fused decoder computes what transformers does: with few rows and with many, in any mix of chunks and decode rows.

Runs on a GPU in bfloat16, or on the CPU in float32 under TRITON_INTERPRET=1 where triton is installed.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from executor import model as model_module
from executor.attention import AttentionBackend, LayerSpec
from executor.model import Model, load_model
from executor.recognition import recognize
from tests.executor.paged_generate import engine_config, paged_generate
from tests.executor.test_architectures import ARCHITECTURES, save_model

_INTERPRET = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None
_ON_GPU = torch.cuda.is_available()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not _ON_GPU and not _INTERPRET, reason="needs a CUDA device, or triton and TRITON_INTERPRET=1"),
]
_WIDER: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32}
# Greedy tokens may differ where the reference's own two best logits are this close, in bfloat16.
_MARGIN = 0.25
_LIMIT = 0.03


def fused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    from executor import decoder
    from executor.attention.triton import TritonBackend

    def backend(specs: list[LayerSpec], *, block_size: int, max_rows: int, device: torch.device) -> AttentionBackend:
        return TritonBackend(specs, block_size, max_rows, device)

    monkeypatch.setattr(model_module, "choose_backend", backend)
    if not _ON_GPU:
        monkeypatch.setattr(decoder, "DTYPES", (torch.float32,))
    config = engine_config(folder, dtype="bfloat16" if _ON_GPU else "float32")
    with torch.inference_mode():
        model = load_model(config, progress=False)
        model.decoder = decoder.FusedDecoder(recognize(model._module), model.layers, model._backend, 256)
    return model


@pytest.mark.parametrize("name", ["llama", "llama_yarn", "qwen2", "qwen2_window", "qwen3", "mistral"])
def test_logits_are_those_of_transformers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, changes, windows = ARCHITECTURES[name]
    theirs = save_model(tmp_path, kind, changes | _WIDER).float()
    ours = fused(tmp_path, monkeypatch)
    assert [layer.spec.window for layer in ours.layers] == windows
    lengths, new = ((1, 2, 17, 50, 100), 24) if _ON_GPU else ((1, 17), 5)
    prompts = [torch.randint(3, 128, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in lengths]
    assert ours.decoder is not None
    for ways in ours.decoder.both_ways():
        ours.decoder.ways = ways
        with torch.inference_mode():
            tokens, logits = paged_generate(ours, prompts, new, chunk=40)
        for prompt, ids, mine in zip(prompts, tokens, logits, strict=True):
            # Forced along our own tokens, so that one close call does not change all that follows.
            with torch.inference_mode():
                whole = torch.tensor([prompt + ids])
                want = theirs(whole.to(theirs.device)).logits[0, len(prompt) - 1 : -1].float().cpu()
            assert ((mine - want).norm() / want.norm()).item() < _LIMIT, (name, ways)
            best = want.topk(2).values
            clear = best[:, 0] - best[:, 1] > (_MARGIN if _ON_GPU else 1e-3)
            assert clear.any()
            assert torch.equal(torch.tensor(ids)[clear], want.argmax(-1)[clear])


def test_the_choice_of_kernels_never_runs_more_rows_than_a_step_may_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from executor import decoder as decoder_module

    save_model(tmp_path, ARCHITECTURES["llama"][0], ARCHITECTURES["llama"][1] | _WIDER)
    decoder = fused(tmp_path, monkeypatch).decoder
    assert decoder is not None
    ran: list[int] = []

    def forward(rows: int) -> torch.Tensor:
        ran.append(rows)
        return torch.empty(0)

    def seconds(run: Any) -> float:
        """Up to 16 rows are faster by `linear_kernel`, more by cuBLAS."""
        run()
        rows = ran[-1]
        few = decoder.ways[decoder_module.block_m(rows)].few
        return float(few == (rows > 16))

    monkeypatch.setattr(decoder_module, "time_graph", seconds)
    default = decoder.ways.copy()
    decoder.choose_ways(forward, 40)
    assert set(ran) == {16, 32, 40}
    assert [decoder.ways[size].few for size in (16, 32, 64)] == [True, False, False]
    assert decoder.ways[0] == default[0]
