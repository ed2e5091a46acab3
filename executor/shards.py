"""Which part of a model each rank holds, by the tensor-parallel plan that transformers has for it.

Called by `executor.weights` with a module whose parameters are still on the meta device: linear layers are replaced by
their shards, and each parameter gets the piece of its full tensor that this rank is to read. Must know no architecture
by name. The styles are those of transformers.distributed.tensor_parallel; what only gradients need is nothing here.

    colwise                 output features are shared out; the output stays in shares
    rowwise                 input features are shared out; outputs are partial and summed
    colwise_gather_output   as colwise, the output is gathered; shares may be padded, so any vocabulary divides
    rowwise_split_input     as rowwise, of an input that is whole
    packed_colwise          as colwise, for each half of the output features: gate and up
    moe_tp_experts          the module's output is partial and summed
    embedding_rowwise       token ids are shared out, as the rows of a gathered head; outputs are summed
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from executor.ranks import Ranks
from ipc.errors import ModelError

_FLAG: Final = "--tensor-parallel-size"
_OLD_NAMES: Final = {"colwise_rep": "colwise_gather_output", "rowwise_rep": "rowwise_split_input"}
_NOTHING: Final = ("replicated_with_grad_allreduce", "replicate", "mla_kv_a_proj", "local_params")
_ALIGNMENT: Final = 64  # features of a padded share: what kernels like to divide


class Sliceable(Protocol):
    """A tensor, or one in a safetensors file of which only the slices that are asked for are read."""

    def __getitem__(self, index: Any) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class Piece:
    """A rank's part of a full tensor: along `dim`, each of `parts` equal stretches of `length` is cut into shares."""

    dim: int
    length: int
    share: int
    parts: int = 1

    def of(self, full: Sliceable, ndim: int, rank: int) -> torch.Tensor:
        """The piece of rank `rank`, padded with zeros where the shares reach beyond the stretch."""
        taken = []
        for part in range(self.parts):
            start, stop = (min(self.length, edge * self.share) for edge in (rank, rank + 1))
            index: list[slice] = [slice(None)] * ndim
            index[self.dim] = slice(part * self.length + start, part * self.length + stop)
            taken.append(_pad(full[tuple(index)], self.dim, self.share))
        return taken[0] if len(taken) == 1 else torch.cat(taken, self.dim)


def _pad(tensor: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    missing = size - tensor.shape[dim]
    if not missing:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat((tensor, tensor.new_zeros(shape)), dim)


class RowLinear(nn.Module):
    """A linear layer over this rank's input features; every rank returns the sum of all."""

    def __init__(self, full: nn.Linear, ranks: Ranks, *, splits_input: bool) -> None:
        super().__init__()
        self.ranks, self.splits_input = ranks, splits_input
        self.handle = ranks.handle
        self.in_features, self.out_features = full.in_features, full.out_features
        self.weight, self.bias = full.weight, full.bias  # the bias is added once, to the sum

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.splits_input:
            share = self.weight.shape[1]
            x = x[..., self.ranks.rank * share :][..., :share]
        y: torch.Tensor = torch.ops.tandem.rank_sum(F.linear(x, self.weight), self.handle)
        return y if self.bias is None else y + self.bias


class GatheredLinear(nn.Module):
    """A linear layer of which each rank computes a share of the output features, and returns all of them."""

    def __init__(self, full: nn.Linear, ranks: Ranks) -> None:
        super().__init__()
        self.ranks = ranks
        self.handle = ranks.handle
        self.in_features, self.out_features = full.in_features, full.out_features
        self.weight, self.bias = full.weight, full.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        share = F.linear(x, self.weight, self.bias)
        gathered: torch.Tensor = torch.ops.tandem.rank_gather(share, self.handle, self.out_features)
        return gathered


class ShardedEmbedding(nn.Module):
    """An embedding of which each rank holds some rows; every rank returns the sum, in which one row is not zero.

    Only of plain ones: what a subclass does to the rows it has found would be lost.
    """

    def __init__(self, full: nn.Embedding, ranks: Ranks) -> None:
        super().__init__()
        self.ranks = ranks
        self.handle = ranks.handle
        self.weight = full.weight

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        rows, inside = self.find(token_ids)
        summed: torch.Tensor = torch.ops.tandem.rank_sum(torch.where(inside, rows, 0), self.handle)
        return summed

    def find(self, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows [..., width], bool [..., 1]: whether this rank holds the row; else it is another one)."""
        rows = len(self.weight)
        place = token_ids - self.ranks.rank * rows
        inside = (place >= 0) & (place < rows)
        return self.weight[torch.where(inside, place, 0)], inside[..., None]


class Cutter:
    """Replaces what the plan names in one model; `pieces` then says what this rank holds of the full parameters."""

    def __init__(self, model: Any, ranks: Ranks) -> None:
        self._model, self._ranks = model, ranks
        self.pieces: dict[str, Piece] = {}  # by the name of the parameter; one that is not here is whole

    def cut(self) -> None:
        """Raises ModelError if the model has no plan, one that cannot be followed, or does not divide."""
        plan = read_plan(self._model)
        for name, module in list(self._model.named_modules()):
            if (style := plan.get(_generic(name))) is not None:
                self._cut_module(name, module, style)
        for name, _ in list(self._model.named_parameters()):
            if (style := plan.get(_generic(name))) is not None:
                self._cut_parameter(name, style)

    def _cut_module(self, name: str, module: nn.Module, style: str) -> None:
        if style in _NOTHING:
            return
        if style in ("moe_tp_experts", "all_reduce"):
            module.register_forward_hook(_summing(self._ranks))
            return
        if style == "embedding_rowwise" and isinstance(module, nn.Embedding):
            if type(module) is nn.Embedding:
                self._hold(name, "weight", Piece(0, module.num_embeddings, self._share(module.num_embeddings)))
                self._replace(name, ShardedEmbedding(module, self._ranks))
            return
        if type(module) is not nn.Linear:
            raise ModelError(f"{name} is a {type(module).__name__}, which cannot be shared out as {style}", param=_FLAG)
        match style:
            case "colwise" | "packed_colwise":
                parts = 2 if style == "packed_colwise" else 1
                self._check_heads(name, module)
                self._hold_rows(name, module, self._even(module.out_features // parts, name, "output features"), parts)
                module.out_features //= self._ranks.size
            case "colwise_gather_output":
                self._hold_rows(name, module, self._share(module.out_features), 1)
                self._replace(name, GatheredLinear(module, self._ranks))
            case "rowwise" | "rowwise_split_input":
                features = module.in_features
                self._hold(name, "weight", Piece(1, features, self._even(features, name, "input features")))
                self._replace(name, RowLinear(module, self._ranks, splits_input=style != "rowwise"))
            case _:
                raise ModelError(f"its plan shares out {name} as {style!r}, which is not known here", param=_FLAG)

    def _cut_parameter(self, name: str, style: str) -> None:
        """A parameter that the plan names itself, such as the weights of all experts: [experts, out, in]."""
        shape = self._model.get_parameter(name).shape
        if style in _NOTHING:
            return
        if style not in ("colwise", "rowwise", "packed_colwise", "packed_rowwise"):
            raise ModelError(f"its plan shares out {name} as {style!r}, which is not known here", param=_FLAG)
        if style.endswith("rowwise") and len(shape) == 1:
            raise ModelError(f"its plan shares out {name}, a bias, as {style!r}", param=_FLAG)
        dim = max(0, len(shape) - (1 if style.endswith("rowwise") else 2))
        parts = 2 if style.startswith("packed") else 1
        length = shape[dim] // parts
        self.pieces[name] = Piece(dim, length, self._even(length, name, "features"), parts)

    def _hold_rows(self, name: str, linear: nn.Linear, share: int, parts: int) -> None:
        for which in ("weight", "bias"):
            if getattr(linear, which) is not None:
                self._hold(name, which, Piece(0, linear.out_features // parts, share, parts))

    def _hold(self, module: str, parameter: str, piece: Piece) -> None:
        self.pieces[f"{module}.{parameter}"] = piece

    def _replace(self, name: str, module: nn.Module) -> None:
        self._model.set_submodule(name, module)

    def _share(self, features: int) -> int:
        """An even share, or one that is padded."""
        even, rest = divmod(features, self._ranks.size)
        if not rest and even % (_ALIGNMENT // 2) == 0:
            return even
        return -(-features // (self._ranks.size * _ALIGNMENT)) * _ALIGNMENT

    def _even(self, features: int, name: str, what: str) -> int:
        if features % self._ranks.size:
            raise ModelError(f"{name} has {features} {what}, which {self._ranks.size} ranks cannot share", param=_FLAG)
        return features // self._ranks.size

    def _check_heads(self, name: str, linear: nn.Linear) -> None:
        """A head is never split: what attends is known by the head size that it carries."""
        owner = self._model.get_submodule(name.rpartition(".")[0])
        size = getattr(owner, "head_dim", None) or getattr(owner, "head_size", None)
        if isinstance(size, int) and linear.out_features % size == 0:
            heads = linear.out_features // size
            if heads % self._ranks.size:
                raise ModelError(f"{name} has {heads} heads, which {self._ranks.size} ranks cannot share", param=_FLAG)


def _summing(ranks: Ranks) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        summed: torch.Tensor = torch.ops.tandem.rank_sum(output, ranks.handle)
        return summed

    return hook


def read_plan(model: Any) -> dict[str, str]:
    """Style by name, with `*` for the number of a layer. Raises ModelError if transformers has none for this model."""
    body = getattr(model.config.get_text_config(decoder=True), "base_model_tp_plan", None)
    plan: dict[str, str] = dict(getattr(model, "_tp_plan", None) or {})
    if not body or not plan:
        raise ModelError(
            f"transformers has no tensor-parallel plan for {type(model).__name__}: it runs on one GPU", param=_FLAG
        )
    return {name: _OLD_NAMES.get(style, style) for name, style in plan.items()}


def _generic(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)
