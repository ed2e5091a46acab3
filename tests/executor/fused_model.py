"""A model run by the fused decoder: on a GPU in bfloat16, or on the CPU in float32 in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from executor import model as model_module
from executor.attention import AttentionBackend, LayerSpec
from executor.model import Model, load_model
from executor.ranks import Ranks
from executor.recognition import recognize
from tests.executor.paged_generate import engine_config

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None
ON_GPU = torch.cuda.is_available()
WIDER: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32}  # what kernels can divide
# Greedy tokens may differ where the reference's own two best logits are this close.
MARGIN = 0.25 if ON_GPU else 1e-3
# Of |ours - theirs| / |theirs|, logits. Transformers' own bfloat16 is up to 0.044 from its float32 on these models.
LIMIT = 0.06 if ON_GPU else 1e-3


def fused_model(
    folder: Path, device: torch.device | None = None, ranks: Ranks | None = None, **changes: object
) -> Model:
    from executor import decoder
    from executor.attention.triton import TritonBackend

    def backend(specs: list[LayerSpec], *, block_size: int, max_rows: int, device: torch.device) -> AttentionBackend:
        return TritonBackend(specs, block_size, max_rows, device)

    config = engine_config(folder, dtype="bfloat16" if ON_GPU else "float32", **changes)
    dtypes = decoder.DTYPES if ON_GPU else (torch.float32,)
    with mock.patch.object(model_module, "choose_backend", backend), mock.patch.object(decoder, "DTYPES", dtypes):
        model = load_model(config, False, device, ranks)
        model.decoder = decoder.FusedDecoder(recognize(model._module), model.layers, model._backend, 256)
    return model


def check_logits(theirs: Any, prompt: list[int], ids: list[int], ours: torch.Tensor) -> None:
    """Forced along our own tokens, so that one close call does not change all that follows."""
    with torch.inference_mode():
        whole = torch.tensor([prompt + ids])
        want = theirs(whole.to(theirs.device)).logits[0, len(prompt) - 1 : -1].float().cpu()
    assert ((ours - want).norm() / want.norm()).item() < LIMIT
    best = want.topk(2).values
    clear = best[:, 0] - best[:, 1] > MARGIN
    assert clear.any()
    assert torch.equal(torch.tensor(ids)[clear], want.argmax(-1)[clear])
