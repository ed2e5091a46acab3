"""Linear layers of one input become one: their weights are concatenated, so that q/k/v or gate/up cost one GEMM.

Owns the fused modules. Called by `executor.model` once the weights are on the device. Which layers share an input is
learned by running the model, and so is that fusing them leaves its logits alone; must know no architecture by name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class _Product:
    """The product of all layers of a group, between the call of the first and the last of them."""

    def __init__(self) -> None:
        self.x: torch.Tensor | None = None  # [..., in_features]
        self.y: torch.Tensor | None = None  # [..., sum of out_features]


class FusedLinear(nn.Module):
    """One of a group of linear layers: computes the product of all for a new input, slices it for a known one.

    In any other order of calls, or with other inputs, it is slower but still right. Compiled, only the GEMM remains.
    """

    def __init__(self, whole: nn.Linear, start: int, stop: int, product: _Product, is_last: bool) -> None:
        super().__init__()
        self.whole, self.start, self.stop = whole, start, stop
        self.product, self.is_last = product, is_last

    @property
    def weight(self) -> torch.Tensor:
        """This layer's own part, for models that ask for its dtype or shape: a view [out_features, in_features]."""
        return self.whole.weight[self.start : self.stop]

    @property
    def bias(self) -> torch.Tensor | None:
        bias: torch.Tensor | None = self.whole.bias
        return None if bias is None else bias[self.start : self.stop]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product = self.product
        if product.x is not x:
            product.x, product.y = x, self.whole(x)
        assert product.y is not None, "a product without a result"
        y = product.y[..., self.start : self.stop]
        if self.is_last:
            product.x = product.y = None  # what a step computed must not outlive it
        return y


def find_groups(model: nn.Module, run: Callable[[], Any]) -> list[list[str]]:
    """Names of linear layers that `run`, one forward of `model`, calls once each with the same tensor, by parent.

    Layers whose weight is shared, that carry hooks, or that are of a subclass (quantized, adapted) are left out.
    """
    owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    linears = {name: m for name, m in model.named_modules() if type(m) is nn.Linear and _is_plain(m, owners)}
    calls: list[tuple[str, torch.Tensor]] = []

    def record(name: str) -> Callable[..., None]:
        return lambda _, args: calls.append((name, args[0])) if args else None

    hooks = [linear.register_forward_pre_hook(record(name)) for name, linear in linears.items()]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    times = Counter(name for name, _ in calls)
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, x in calls:  # `calls` keeps every input alive, so an id is one tensor
        linear = linears[name]
        key = (name.rpartition(".")[0], id(x), linear.weight.dtype, linear.bias is None)
        if times[name] == 1:
            groups.setdefault(key, []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def _is_plain(linear: nn.Linear, owners: Counter[int]) -> bool:
    hooked = linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks
    return not hooked and all(owners[id(parameter)] == 1 for parameter in linear.parameters())


def fuse(model: nn.Module, names: list[str]) -> None:
    """Replace the linear layers `names` of one input, in the order of their calls, by slices of one product."""
    linears: list[nn.Linear] = [model.get_submodule(name) for name in names]  # type: ignore[misc]
    with torch.device("meta"):
        whole = nn.Linear(linears[0].in_features, sum(m.out_features for m in linears), linears[0].bias is not None)
    whole.weight = nn.Parameter(torch.cat([m.weight for m in linears]), requires_grad=False)
    if linears[0].bias is not None:
        whole.bias = nn.Parameter(torch.cat([m.bias for m in linears]), requires_grad=False)
    product, start = _Product(), 0
    for name, linear in zip(names, linears, strict=True):
        stop = start + linear.out_features
        model.set_submodule(name, FusedLinear(whole, start, stop, product, name == names[-1]).eval())
        start = stop


def split(model: nn.Module) -> None:
    """Undo every `fuse`. The layers are plain again; their weights stay views of the concatenated ones."""
    for name, fused in list(model.named_modules()):
        if isinstance(fused, FusedLinear):
            with torch.device("meta"):
                linear = nn.Linear(fused.whole.in_features, fused.stop - fused.start, fused.bias is not None)
            linear.weight = nn.Parameter(fused.weight, requires_grad=False)
            if fused.bias is not None:
                linear.bias = nn.Parameter(fused.bias, requires_grad=False)
            model.set_submodule(name, linear.eval())


def fuse_linears(model: nn.Module, run: Callable[[], torch.Tensor], limit: float) -> tuple[int, str]:
    """Fuse all groups of `model`, one at a time, so that no more than one group's weights exist twice.

    `run` is a forward that gives logits, on the same tokens every time; a model whose logits then differ by more than
    `limit` of their norm, or that fails, is split again. Returns (groups fused, why there are none).
    """
    logits: list[torch.Tensor] = []
    groups = find_groups(model, lambda: logits.append(run()))
    if not groups:
        return 0, "no linear layers share an input"
    for names in groups:
        fuse(model, names)
    try:
        difference = ((run() - logits[0]).norm() / logits[0].norm().clamp_min(1e-6)).item()
        reason = "" if difference <= limit else f"fused logits differ by {difference:.2g} of their norm"
    except (RuntimeError, AttributeError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
    if reason:
        split(model)
        return 0, reason
    return len(groups), ""
