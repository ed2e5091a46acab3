"""What a workload cannot be faster than: bytes that must move, and products that must be made. For the benches only.

    decode    every step reads all weights once, and the KV of all its rows: bytes / bandwidth
    prefill   every prompt token passes all weights, and attends to those before it: FLOPs / peak
    limit     decode + prefill

Weights are those a step reads: an untied input embedding is only looked up. All experts of a mixture count, so the
limit of such a model is too high.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

H200_BANDWIDTH = 4.8e12  # bytes/s
H200_FLOPS = 989e12  # dense bfloat16


@dataclass(frozen=True)
class ModelCost:
    """Of one model in the dtype it is served in."""

    weight_bytes: int  # read by every step
    kv_bytes_per_token: int  # of all layers
    flops_per_token: float  # through all weights but the output head
    head_flops: float  # the output head, for the last token of a prompt
    attention_flops: float  # one query and one key, all layers and heads

    def decode_bytes(self, lengths: Sequence[tuple[int, int]], steps: int) -> float:
        """Bytes that `steps` steps move to generate all outputs but their first tokens, which prefill brings."""
        contexts = sum((o - 1) * p + o * (o - 1) // 2 for p, o in lengths)  # tokens 2..o attend to p + 1 .. p + o - 1
        return steps * self.weight_bytes + contexts * self.kv_bytes_per_token

    def prefill_flops(self, lengths: Sequence[tuple[int, int]]) -> float:
        tokens = sum(p for p, _ in lengths)
        pairs = sum(p * (p + 1) // 2 for p, _ in lengths)
        return tokens * self.flops_per_token + len(lengths) * self.head_flops + pairs * self.attention_flops

    def limit_s(self, lengths: Sequence[tuple[int, int]], steps: int, bandwidth: float, flops: float) -> float:
        """The least time for a workload that decoded in `steps` steps."""
        return self.decode_bytes(lengths, steps) / bandwidth + self.prefill_flops(lengths) / flops


def model_cost(config: PreTrainedConfig, dtype_bytes: int = 2) -> ModelCost:
    """Counted from the model's own modules, built without memory."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    text = config.get_text_config(decoder=True)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    tied = bool(text.tie_word_embeddings)
    total = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    if tied and embedding is not head:  # not tied yet on the meta device
        total -= embedding.numel()
    read = total if tied else total - embedding.numel()
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    layers = text.num_hidden_layers
    return ModelCost(
        weight_bytes=read * dtype_bytes,
        kv_bytes_per_token=layers * kv_heads * 2 * head_dim * dtype_bytes,
        flops_per_token=2.0 * (read - head.numel()),
        head_flops=2.0 * head.numel(),
        attention_flops=4.0 * layers * heads * head_dim,
    )
