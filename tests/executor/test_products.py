"""Before it serves, a model's products are run with numbers of tokens from one to the most."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from executor.model import load_model
from executor.products import padded_tokens
from tests.executor.paged_generate import engine_config
from tests.executor.test_architectures import save_model


@pytest.mark.parametrize("most", [1, 3, 64, 100, 8192])
def test_a_step_is_padded_to_the_next_size(most: int) -> None:
    sizes = [padded_tokens(tokens, most) for tokens in range(1, most + 1)]
    assert sizes == sorted(sizes)
    assert sizes[-1] == most
    for tokens, size in enumerate(sizes, 1):
        assert size == most or (size & (size - 1) == 0 if size <= 64 else size % 64 == 0)
        assert tokens <= size < min(2 * tokens, tokens + 64)


def test_each_kind_of_product_is_run_with_few_and_many_tokens_and_the_head_with_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path, "Qwen3Config", {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16})
    model = load_model(engine_config(tmp_path, device="cpu"), progress=False)
    runs: dict[tuple[int, ...], list[int]] = defaultdict(list)

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        runs[tuple(weight.shape)].append(len(x))
        return F.linear(x, weight, bias)

    monkeypatch.setattr("executor.products.F", type("F", (), {"linear": staticmethod(linear)}))
    model.run_products(max_logits=20, max_tokens=200)
    hidden, wide = model._module.config.hidden_size, model._module.config.intermediate_size
    kinds = {(10 * 16, hidden), (hidden, 6 * 16), (2 * wide, hidden), (hidden, wide)}
    assert runs.keys() == {*kinds, (model.vocab_size, hidden)}
    assert all(runs[kind] == [1, 2, 4, 8, 16, 32, 64, 128, 192, 200] for kind in kinds)
    assert runs[model.vocab_size, hidden] == list(range(1, 21))
