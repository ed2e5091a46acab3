"""Which models the fused decoder takes for its own: those whose code is, and none that differs in a line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from executor.model import load_model
from executor.recognition import DecoderWeights, NotRecognizedError, recognize
from tests.executor.paged_generate import engine_config
from tests.executor.test_architectures import ARCHITECTURES, save_model

KNOWN = ["llama", "llama_yarn", "qwen2", "qwen2_window", "qwen3", "mistral"]


def loaded(folder: Path, name: str) -> Any:
    """The module of an architecture as the executor has it: linear layers fused."""
    save_model(folder, *ARCHITECTURES[name][:2])
    with torch.inference_mode():
        return load_model(engine_config(folder, device="cpu"), progress=False)._module


@pytest.mark.parametrize("name", KNOWN)
def test_known_programs_are_recognized_and_their_weights_are_views(name: str, tmp_path: Path) -> None:
    module = loaded(tmp_path, name)
    weights = recognize(module)
    assert isinstance(weights, DecoderWeights)
    attention = module.model.layers[1].self_attn
    layer = weights.layers[1]
    parts = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
    assert torch.equal(layer.qkv, torch.cat(parts))
    assert layer.qkv.data_ptr() == parts[0].data_ptr()
    assert (layer.q_norm is None) == (name != "qwen3")
    assert (layer.qkv_bias is None) == (not name.startswith("qwen2"))
    assert torch.equal(layer.gate_up[: layer.down.shape[1]], module.model.layers[1].mlp.gate_proj.weight)


@pytest.mark.parametrize("name", sorted(set(ARCHITECTURES) - set(KNOWN)))
def test_other_programs_are_not(name: str, tmp_path: Path) -> None:
    with pytest.raises(NotRecognizedError):
        recognize(loaded(tmp_path, name))


def test_a_change_to_a_known_model_is_noticed(tmp_path: Path) -> None:
    module = loaded(tmp_path, "llama")
    mlp = module.model.layers[0].mlp
    mlp.act_fn, kept = nn.GELU(), mlp.act_fn
    with pytest.raises(NotRecognizedError, match="GELU"):
        recognize(module)
    mlp.act_fn = kept
    module.model.layers[0].forward = lambda hidden, **_: hidden
    with pytest.raises(NotRecognizedError, match="patched"):
        recognize(module)
    del module.model.layers[0].forward
    module.model.extra = nn.Linear(2, 2)
    with pytest.raises(NotRecognizedError, match="more parts"):
        recognize(module)
