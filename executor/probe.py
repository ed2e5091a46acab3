"""What is learned from a transformers model by running it: its attention layers, and whether paging them changes it.

Registers two attention implementations with transformers. `tandem` is the one that serves: each layer's module carries
the `PagedAttention` that runs it, so nothing is global. `tandem_probe` only records how each layer calls. Called by
`executor.model` at load; must know no architecture by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

from executor.attention import AttentionBackend, LayerSpec, PagedLayer
from ipc.errors import ModelError

SERVE: Final = "tandem"
PROBE: Final = "tandem_probe"
LAYER: Final = "tandem_attention"  # attribute of a layer's module: PagedAttention, or list[_Call] while probing
_PROBE_TOKENS: Final = 4

# A mask is learned by evaluating it at these far positions; three, so that a window that moves in jumps shows.
_FAR: Final = 1 << 17
_FAR_QUERIES: Final = (_FAR // 2, _FAR - 2, _FAR - 1)


@dataclass(frozen=True, slots=True)
class _Call:
    """Arguments of one attention call: tensors [1, heads, tokens, dim]."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    kwargs: dict[str, Any]


@dataclass(slots=True)
class PagedAttention:
    """What a served layer's module carries."""

    backend: AttentionBackend
    layer: PagedLayer


def _serve(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: tensors [1, heads, tokens, dim] in, [1, tokens, heads, dim] out."""
    paged: PagedAttention = getattr(module, LAYER)
    out = paged.backend.attend(
        paged.layer, query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1), kwargs.get("s_aux")
    )
    return out[None], None


def _record(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    calls = getattr(module, LAYER, None)
    if calls is None:
        raise ModelError(f"attention module {type(module).__name__} has no layer_idx to find its KV cache by")
    calls.append(_Call(query, key, value, attention_mask, kwargs))
    return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3]), None


def _sample_mask(
    *, mask_function: Callable[..., torch.Tensor], device: torch.device | str = "cpu", **_: Any
) -> torch.Tensor:
    """Instead of the mask of the tokens at hand, that of `_FAR_QUERIES` over all keys: bool [1, 1, 3, _FAR + 1]."""
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.int64, device=device)
    query = torch.tensor(_FAR_QUERIES, device=device)[None, None, :, None]
    key = torch.arange(_FAR + 1, device=device)[None, None, None, :]
    return mask_function(zero, zero, query, key).expand(1, 1, len(_FAR_QUERIES), _FAR + 1)


def register() -> None:
    """Make both implementations known to transformers. May be called again."""
    AttentionInterface.register(SERVE, _serve)
    AttentionInterface.register(PROBE, _record)
    AttentionMaskInterface.register(PROBE, _sample_mask)


def learn_layers(model: Any, num_layers: int, max_model_len: int) -> tuple[list[tuple[nn.Module, LayerSpec]], int]:
    """(attention module, its spec) of each layer in order and the width of the logits, from one forward of few tokens.

    Raises ModelError naming the layers that do not attend through transformers' interface exactly once, or attend in a
    way that pages cannot serve.
    """
    modules: list[Any] = [m for m in model.modules() if isinstance(getattr(m, "layer_idx", None), int)]
    for module in modules:
        setattr(module, LAYER, [])
    set_implementation(model, PROBE)
    parameter = next(model.parameters())
    tokens = torch.arange(_PROBE_TOKENS, device=parameter.device)[None]
    logits = model(input_ids=tokens, position_ids=tokens, use_cache=False).logits
    found: dict[int, tuple[nn.Module, LayerSpec]] = {}
    for module in modules:
        calls: list[_Call] = getattr(module, LAYER)
        delattr(module, LAYER)
        index = int(module.layer_idx)
        if len(calls) > 1 or (calls and index in found):
            raise ModelError(f"layer {index} attends more than once in a step: one KV cache for it is not enough")
        if calls:
            found[index] = module, _spec(index, module, calls[0], max_model_len)
    missing = sorted(set(range(num_layers)) - set(found))
    if missing:
        name = type(model).__name__
        which = "no layer" if not found else f"of {num_layers} layers, {missing} do not"
        verb = " of it attends" if not found else " attend"
        raise ModelError(
            f"{name}: {which}{verb} through transformers' AttentionInterface, so the state cannot be kept in KV blocks "
            "(recurrent layers and private attention code are not served)"
        )
    return [found[index] for index in sorted(found)], logits.shape[-1]


def _spec(index: int, module: nn.Module, call: _Call, max_model_len: int) -> LayerSpec:
    def refuse(reason: str) -> ModelError:
        return ModelError(f"layer {index} ({type(module).__name__}) {reason}")

    query, key, value, kwargs = call.query, call.key, call.value, call.kwargs
    is_causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise refuse("is not causal: tokens would have to see later ones")
    if query.shape[1] % key.shape[1] or key.shape[:3] != value.shape[:3] or query.shape[2] != key.shape[2]:
        raise refuse(f"has queries {list(query.shape)} over keys {list(key.shape)} and values {list(value.shape)}")
    if kwargs.get("position_bias") is not None:
        raise refuse("adds a position bias to its scores")
    if call.mask is not None and call.mask.shape[-2:] == (len(_FAR_QUERIES), _FAR + 1):
        window = _window(call.mask[0, 0])
        if window == 0:
            raise refuse("has a mask that is neither causal nor a sliding window")
    else:
        window = kwargs.get("sliding_window")
    scale = kwargs.get("scaling")
    return LayerSpec(
        q_heads=query.shape[1],
        kv_heads=key.shape[1],
        k_dim=key.shape[3],
        v_dim=value.shape[3],
        dtype=key.dtype,
        scale=query.shape[3] ** -0.5 if scale is None else float(scale),
        window=None if window is None or window >= max_model_len else window,
        softcap=kwargs.get("softcap"),
        has_sinks=kwargs.get("s_aux") is not None,
    )


def _window(mask: torch.Tensor) -> int | None:
    """Tokens that every query of a sampled mask [3, _FAR + 1] sees; None for all up to its own, 0 for another shape."""
    query = torch.tensor(_FAR_QUERIES, device=mask.device)[:, None]
    key = torch.arange(mask.shape[1], device=mask.device)[None]
    seen = mask.sum(1).tolist()
    if not torch.equal(mask, (key <= query) & (key > query - torch.tensor(seen, device=mask.device)[:, None])):
        return 0
    if seen == [q + 1 for q in _FAR_QUERIES]:
        return None
    return int(seen[0]) if len(set(seen)) == 1 else 0


def set_implementation(model: Any, name: str) -> None:
    """Switch the attention of a transformers model; raises ModelError if it would not follow."""
    model.set_attn_implementation(name)
    if model.config._attn_implementation != name:
        raise ModelError(f"{type(model).__name__} does not attend through transformers' AttentionInterface")


def fix_rope(model: nn.Module, rope: dict[str, Any], max_model_len: int) -> None:
    """Refuse rotary tables that depend on the batch, and pin those that only could.

    `rope` is a config's rope_parameters, flat or one dict for each kind of layer. Raises ModelError with the reason.
    """
    for parameters in [rope] if "rope_type" in rope else [r for r in rope.values() if isinstance(r, dict)]:
        kind = parameters.get("rope_type")
        if kind == "dynamic":
            raise ModelError(
                "rope type 'dynamic' rescales with the longest request of a batch, so tokens would depend on neighbours"
            )
        if kind == "longrope" and max_model_len > (trained := parameters["original_max_position_embeddings"]):
            raise ModelError(
                f"rope type 'longrope' uses another table past {trained} tokens, and max_model_len is {max_model_len}: "
                f"serve it with --max-model-len {trained}"
            )
    module: Any
    for module in model.modules():
        # Below its limit longrope never changes table; asking every step would read the device from the host.
        kind = getattr(module, "rope_type", None)
        if kind == "longrope":
            module.rope_type = "default"
        elif isinstance(kind, dict):
            module.rope_type = {k: "default" if v == "longrope" else v for k, v in kind.items()}
