"""Whether a transformers model computes exactly what the fused decoder does, learned by reading its code.

Called by `executor.decoder` at load. No architecture is known by name: the forward methods of a model's classes must be
the same program as those of the installed transformers' own Llama, Qwen 2, Qwen 3 or Mistral, so a model that differs
in one line is not recognized, and neither is one from a transformers that changed its Llama beyond them.
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import torch
from torch import nn
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3

from executor.fusion import FusedLinear
from executor.ranks import Ranks
from executor.shards import GatheredLinear, RowLinear, ShardedEmbedding

_MODELS: Final[tuple[Any, ...]] = (
    modeling_llama.LlamaModel,
    modeling_mistral.MistralModel,
    modeling_qwen2.Qwen2Model,
)
_ATTENTIONS: Final[tuple[Any, ...]] = (
    modeling_llama.LlamaAttention,
    modeling_mistral.MistralAttention,
    modeling_qwen2.Qwen2Attention,
    modeling_qwen3.Qwen3Attention,
)
_LAYERS: Final[tuple[Any, ...]] = (modeling_llama.LlamaDecoderLayer,)
_MLPS: Final[tuple[Any, ...]] = (modeling_llama.LlamaMLP,)
_NORMS: Final[tuple[Any, ...]] = (modeling_llama.LlamaRMSNorm,)


class NotRecognizedError(Exception):
    """The model is something else; the message says what."""


@dataclass(frozen=True, slots=True)
class Norm:
    gain: torch.Tensor  # [width]
    eps: float


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer. Matrices are [out features, in features]."""

    input_norm: Norm
    qkv: torch.Tensor  # rows of q, then k, then v
    qkv_bias: torch.Tensor | None
    q_norm: Norm | None  # of each head
    k_norm: Norm | None
    o: torch.Tensor
    mlp_norm: Norm
    gate_up: torch.Tensor  # rows of gate, then up
    down: torch.Tensor


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """A causal LM: embedding, layers of pre-norm attention and gated MLP, norm, head; or one rank's shards of it."""

    embedding: torch.Tensor  # [vocab, width], or [share, width]
    embed: nn.Module  # token ids -> rows of the whole embedding
    layers: list[LayerWeights]
    norm: Norm
    head: torch.Tensor  # [vocab, width], or [share, width]
    rotary: Any  # transformers' module: (x, position_ids) -> cos, sin
    ranks: Ranks | None  # products with o and down are to be summed over them
    gathers: int | None  # features of the head's shares together, if it is shared out

    def rotary_table(self, dim: int, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [positions, dim / 2], as the model's own module computes them. Raises NotRecognizedError if they
        are of another kind."""
        ids = torch.arange(positions, device=self.embedding.device)[None]
        halves = []
        for table in self.rotary(self.embedding.new_empty(1, 1, 1), ids):
            require(table.shape == (1, positions, dim), f"its rotary table is {list(table.shape)}")
            first, second = table[0].chunk(2, dim=-1)
            require(torch.equal(first, second), "its rotary halves differ")
            halves.append(first.contiguous())
        return halves[0], halves[1]


def recognize(model: Any) -> DecoderWeights:
    """The weights of `model` (views, nothing is copied). Raises NotRecognizedError with the first difference."""
    inner, head = getattr(model, "model", None), getattr(model, "lm_head", None)
    if inner is None or head is None:
        raise NotRecognizedError(f"{type(model).__name__} has no model and lm_head")
    _same(inner, _MODELS)
    require(type(inner.embed_tokens) in (nn.Embedding, ShardedEmbedding), "its embedding is of another kind")
    require(type(head) in (nn.Linear, GatheredLinear) and head.bias is None, "its head is of another kind")
    require(set(dict(inner.named_children())) == {"embed_tokens", "layers", "norm", "rotary_emb"}, "it has more parts")
    for name in ("apply_rotary_pos_emb", "rotate_half"):
        _same_function(getattr(sys.modules[type(inner).__module__], name), (getattr(modeling_llama, name),))
    return DecoderWeights(
        embedding=inner.embed_tokens.weight,
        embed=inner.embed_tokens,
        layers=[_layer(layer) for layer in inner.layers],
        norm=_norm(inner.norm),
        head=head.weight,
        rotary=inner.rotary_emb,
        ranks=_ranks(inner.layers),
        gathers=head.out_features if type(head) is GatheredLinear else None,
    )


def _ranks(layers: Any) -> Ranks | None:
    """The ranks that all of the output projections are shared out among, or none of them."""
    outputs = [linear for layer in layers for linear in (layer.self_attn.o_proj, layer.mlp.down_proj)]
    kinds = {type(linear) for linear in outputs}
    require(len(kinds) == 1, "some of its output projections are shared out among ranks, others are not")
    first: Any = outputs[0]
    return first.ranks if kinds == {RowLinear} else None


def _layer(layer: Any) -> LayerWeights:
    _same(layer, _LAYERS)
    attention, mlp = layer.self_attn, layer.mlp
    _same(attention, _ATTENTIONS)
    _same(mlp, _MLPS)
    require(type(mlp.act_fn).__name__ in ("SiLU", "SiLUActivation"), f"its activation is {type(mlp.act_fn).__name__}")
    qkv = _whole(attention.q_proj, attention.k_proj, attention.v_proj)
    gate_up = _whole(mlp.gate_proj, mlp.up_proj)
    require(gate_up.bias is None, "its MLP has a bias")
    for linear in (attention.o_proj, mlp.down_proj):
        require(type(linear) in (nn.Linear, RowLinear), "an output projection is of another kind")
        require(not getattr(linear, "splits_input", False), "an output projection cuts its input")
        require(linear.bias is None, "an output projection has a bias")
    q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    return LayerWeights(
        input_norm=_norm(layer.input_layernorm),
        qkv=qkv.weight,
        qkv_bias=qkv.bias,
        q_norm=None if q_norm is None else _norm(q_norm),
        k_norm=None if k_norm is None else _norm(k_norm),
        o=attention.o_proj.weight,
        mlp_norm=_norm(layer.post_attention_layernorm),
        gate_up=gate_up.weight,
        down=mlp.down_proj.weight,
    )


def _norm(module: Any) -> Norm:
    _same(module, _NORMS)
    return Norm(module.weight, float(module.variance_epsilon))


def _whole(*parts: Any) -> nn.Linear:
    """The product that `parts` are the slices of, in this order and without gaps."""
    start = 0
    for part in parts:
        require(type(part) is FusedLinear, "its linear layers are not fused")
        require(part.whole is parts[0].whole and part.start == start, "its linear layers are fused in another order")
        start = part.stop
    whole: nn.Linear = parts[0].whole
    require(start == whole.out_features, "more linear layers are fused")
    return whole


def require(holds: bool, difference: str) -> None:
    """Raise NotRecognizedError unless it holds."""
    if not holds:
        raise NotRecognizedError(difference)


def _same(module: nn.Module, known: tuple[type[nn.Module], ...]) -> None:
    require("forward" not in vars(module), f"{type(module).__name__} is patched")
    _same_function(type(module).forward, tuple(kind.forward for kind in known))


def _same_function(function: Callable[..., Any], known: tuple[Callable[..., Any], ...]) -> None:
    program = _program(function)
    require(
        any(program == _program(other) for other in known), f"{function.__qualname__} is not {known[0].__qualname__}"
    )


@cache
def _program(function: Callable[..., Any]) -> str:
    """A function's code without names of types, decorators and documentation, which change nothing."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    definition = tree.body[0]
    if not isinstance(definition, ast.FunctionDef):
        raise NotRecognizedError(f"{function.__qualname__} is not a plain function")
    definition.decorator_list, definition.returns = [], None
    arguments = definition.args
    for argument in (*arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg):
        if argument is not None:
            argument.annotation = None
    for node in ast.walk(tree):
        if isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(value=None)
    if ast.get_docstring(definition) is not None:
        definition.body = definition.body[1:]
    return ast.dump(definition)
