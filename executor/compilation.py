"""Compiled decoder layers: one compilation serves all layers alike and all numbers of tokens.

Owns the operator that hides paged attention from the compiler. Called by `executor.model` once a model has been learned
and checked, and by the process when all warm-up is done; nothing is compiled after that. Must never change what a
model computes: a model that cannot be compiled is served as it is.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import nn
from transformers import AttentionInterface

from executor import probe

COMPILED: Final = "tandem_compiled"  # the attention implementation of compiled layers
_HANDLE: Final = "tandem_handle"  # attribute of an attention module: its handle
_PAGED: Final = "tandem_paged"  # attribute of a handle: the PagedAttention it stands for

# More than the kinds of layers of any model, twice: one token and several are compiled apart.
_RECOMPILE_LIMIT: Final = 32

_TORCH_LIBRARY: Final[Any] = torch.library  # untyped
_OPERATORS: Final = _TORCH_LIBRARY.Library("tandem", "DEF")


def _attend(
    query: torch.Tensor,  # [tokens, q_heads, k_dim]
    key: torch.Tensor,  # [tokens, kv_heads, k_dim]
    value: torch.Tensor,  # [tokens, kv_heads, v_dim]
    sinks: torch.Tensor | None,  # [q_heads]
    handle: torch.Tensor,
) -> torch.Tensor:
    """[tokens, q_heads, v_dim]. The compiler sees neither the pages it writes nor the step it belongs to."""
    paged: probe.PagedAttention = getattr(handle, _PAGED)
    return paged.backend.attend(paged.layer, query, key, value, sinks)


def _attend_shape(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sinks: torch.Tensor | None, handle: torch.Tensor
) -> torch.Tensor:
    return query.new_empty(query.shape[0], query.shape[1], value.shape[2])


_OPERATORS.define("attend(Tensor query, Tensor key, Tensor value, Tensor? sinks, Tensor handle) -> Tensor")
_OPERATORS.impl("attend", _attend, "CompositeExplicitAutograd")
torch.library.register_fake("tandem::attend", _attend_shape, lib=_OPERATORS)


def _serve(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: tensors [1, heads, tokens, dim] in, [1, tokens, heads, dim] out."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    out = torch.ops.tandem.attend(q, k, v, kwargs.get("s_aux"), getattr(module, _HANDLE))
    return out[None], None


def regions(model: nn.Module, attentions: Sequence[nn.Module]) -> list[nn.Module]:
    """What to compile: the layers, which are the entries of the one list that holds all `attentions`, and the modules
    without children beside that list that hold parameters or buffers, but for embeddings: the final norm and the rotary
    table. Empty if there is no such list."""
    for parent in model.modules():
        for layers in parent.children():
            if not isinstance(layers, nn.ModuleList):
                continue
            inside = {id(module) for module in layers.modules()}
            if all(id(attention) in inside for attention in attentions):
                return [*layers, *(m for m in parent.children() if _is_leaf(m))]
    return []


def _is_leaf(module: nn.Module) -> bool:
    holds = any(True for _ in (*module.parameters(), *module.buffers()))
    return holds and not any(True for _ in module.children()) and not isinstance(module, nn.Embedding)


def compile_layers(model: Any, attentions: Sequence[nn.Module], backend: str = "inductor") -> None:
    """Have the regions of `model` compiled when they are first called, once with one token and once with several.

    Each attention module carries its `PagedAttention`. What the compiler cannot take whole raises at that first call.
    Raises ValueError if the model has no list of layers.
    """
    modules = regions(model, attentions)
    if not modules:
        raise ValueError("its layers do not stand in one list")
    torch._dynamo.config.specialize_float = True  # else an epsilon is a tensor made anew in every call
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _RECOMPILE_LIMIT)
    AttentionInterface.register(COMPILED, _serve)
    for attention in attentions:
        # A number would be compiled into the code; a tensor is an argument, so that all layers share the code.
        handle = torch.empty(1, device=next(attention.parameters()).device)
        setattr(handle, _PAGED, getattr(attention, probe.LAYER))
        setattr(attention, _HANDLE, handle)
    for kind in {type(module) for module in modules}:
        forward = torch.compile(kind.forward, fullgraph=True, dynamic=True, backend=backend)
        for module in modules:
            if type(module) is kind:
                module.forward = forward.__get__(module)
    probe.set_implementation(model, COMPILED)


def restore(model: Any, attentions: Sequence[nn.Module]) -> None:
    """Undo `compile_layers`."""
    for module in regions(model, attentions):
        module.__dict__.pop("forward", None)
    for attention in attentions:
        attention.__dict__.pop(_HANDLE, None)
    probe.set_implementation(model, probe.SERVE)


def stop_compiling() -> None:
    """From now on a call that fits no compiled code runs as it is written, and the compiler's processes end."""
    torch.compiler.set_stance("eager_on_recompile")
    if (compiler := sys.modules.get("torch._inductor.async_compile")) is not None:
        compiler.shutdown_compile_workers()
