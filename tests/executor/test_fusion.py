"""Linear layers fused at load: which ones, in what memory, and that it never changes what a model computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from executor import fusion
from executor.model import load_model
from tests.executor.paged_generate import engine_config
from tests.executor.test_architectures import ARCHITECTURES, save_model


class Parallel(nn.Module):
    """Three linear layers, called in an order, on inputs and under conditions that a test chooses."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, size, bias=bias) for size in (3, 5, 2))
        self.order = "abc"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = {name: getattr(self, name)(x) for name in self.order}
        return torch.cat([out[name] for name in sorted(out)], -1)


class Flattening(Parallel):
    """A model that only takes contiguous products."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.a(x).view(-1), self.b(x).view(-1)])


def storage_bytes(model: nn.Module) -> int:
    return sum({p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}.values())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]]),
        ("qwen2", [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]]),
        ("phi3", []),
        ("deepseek_v3", [["q_a_proj", "kv_a_proj_with_mqa"], ["gate_proj", "up_proj"]]),
    ],
)
def test_groups_of_architectures(name: str, expected: list[list[str]], tmp_path: Path) -> None:
    model = save_model(tmp_path, *ARCHITECTURES[name][:2])
    tokens = torch.arange(4)[None]
    groups = fusion.find_groups(model, lambda: model(tokens, use_cache=False))
    first_layer = [names for names in groups if names[0].startswith("model.layers.0.")]
    assert [[name.rpartition(".")[2] for name in names] for names in first_layer] == expected
    assert len(groups) == 2 * len(expected)
    assert all(not module._forward_pre_hooks for module in model.modules())


def test_the_model_says_what_was_fused(tmp_path: Path) -> None:
    for name, note in (("llama", "4 groups of linear layers fused"), ("phi3", "not fused: no linear layers share")):
        save_model(tmp_path / name, *ARCHITECTURES[name][:2])
        assert load_model(engine_config(tmp_path / name, device="cpu"), progress=False).notes[0].startswith(note)


@pytest.mark.parametrize("bias", [False, True])
def test_fused_layers_compute_the_same_in_no_more_memory(bias: bool) -> None:
    model, x = Parallel(bias), torch.randn(2, 7, 8)
    expected, before_bytes = model(x), storage_bytes(model)
    assert fusion.fuse_linears(model, lambda: model(x), 1e-5) == (1, "")
    torch.testing.assert_close(model(x), expected)
    assert storage_bytes(model) == before_bytes
    assert model.b.weight.shape == (5, 8)
    assert (model.b.bias is not None) == bias


def test_a_product_does_not_outlive_its_step() -> None:
    model, x = Parallel(), torch.randn(2, 8)
    fusion.fuse_linears(model, lambda: model(x), 1e-5)
    model(x)
    assert model.a.product.x is None  # type: ignore[union-attr]
    assert model.a.product.y is None  # type: ignore[union-attr]


@pytest.mark.parametrize("order", ["cba", "bac", "a", "ca"])
def test_another_order_of_calls_is_still_right(order: str) -> None:
    model, x, other = Parallel(), torch.randn(2, 8), torch.randn(2, 8)
    model.order = order
    expected = [model(x), model(other), model(x)]
    model.order = "abc"
    fusion.fuse_linears(model, lambda: model(x), 1e-5)
    model.order = order
    for value, y in zip((x, other, x), expected, strict=True):
        torch.testing.assert_close(model(value), y)


def test_split_restores_plain_layers() -> None:
    model, x = Parallel(bias=True), torch.randn(2, 8)
    expected = model(x)
    fusion.fuse_linears(model, lambda: model(x), 1e-5)
    fusion.split(model)
    assert all(type(layer) is nn.Linear for layer in (model.a, model.b, model.c))
    torch.testing.assert_close(model(x), expected)


def test_a_model_that_fails_on_slices_is_left_as_it_was() -> None:
    model, x = Flattening(), torch.randn(2, 8)
    expected = model(x)
    groups, reason = fusion.fuse_linears(model, lambda: model(x), 1e-5)
    assert groups == 0
    assert "view size is not compatible" in reason
    assert torch.equal(model(x), expected)


def test_a_model_whose_logits_change_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def fuse_wrongly(model: nn.Module, names: list[str]) -> None:
        fuse(model, names)
        model.a.whole.weight.neg_()  # type: ignore[union-attr]

    fuse = fusion.fuse
    monkeypatch.setattr(fusion, "fuse", fuse_wrongly)
    model, x = Parallel(), torch.randn(2, 8)
    groups, reason = fusion.fuse_linears(model, lambda: model(x), 1e-5)
    assert (groups, reason) == (0, "fused logits differ by 2 of their norm")
    assert type(model.a) is nn.Linear


def test_tied_hooked_and_subclassed_layers_are_left_alone() -> None:
    class Special(nn.Linear):
        pass

    x = torch.randn(2, 8)
    tied, hooked, special = Parallel(), Parallel(), Parallel()
    tied.head = nn.Linear(8, 3, bias=False)
    tied.head.weight = tied.a.weight
    hooked.a.register_forward_hook(lambda *_: None)
    special.a = Special(8, 3, bias=False)
    for model in (tied, hooked, special):
        assert fusion.find_groups(model, lambda model=model: model(x)) == [["b", "c"]]
    mixed = Parallel()
    mixed.a = nn.Linear(8, 3, bias=True)
    assert fusion.find_groups(mixed, lambda: mixed(x)) == [["b", "c"]]
