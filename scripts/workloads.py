"""The workloads and model shapes that every benchmark here means by a name. Imported by the benches only."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from typing import Final

import numpy as np
from transformers import LlamaConfig, PreTrainedConfig, Qwen3Config

from frontend.request import GenerateParams

SHAPES: Final[dict[str, PreTrainedConfig]] = {
    "llama-3.1-8b": LlamaConfig(
        vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=131_072, rms_norm_eps=1e-5, eos_token_id=128_001,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0}, tie_word_embeddings=False,
    ),
    "qwen3-0.6b": Qwen3Config(
        vocab_size=151_936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=40_960, eos_token_id=151_645,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0}, tie_word_embeddings=True,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Workload:
    """Requests sent all at once: `batch` of one shape, or, with `ragged`, both lengths uniform in [low, high].

    A `kind` other than throughput is another procedure: the batch decodes, and something happens meanwhile.
    """

    name: str
    batch: int
    prompt_len: int
    output_len: int
    ragged: tuple[int, int] | None = None
    kind: str = "throughput"  # or "latency", "burst"
    arriving_len: int = 0  # prompt tokens of what arrives
    arrivals: int = 0  # short requests that arrive at once
    slots: int = 0  # requests in a step, if more than the batch
    copies: int = 1  # how many times the batch, for as many replicas

    def lengths(self) -> list[tuple[int, int]]:
        """(prompt, output) tokens of each request."""
        if self.ragged is None:
            return [(self.prompt_len, self.output_len)] * (self.batch * self.copies)
        return _ragged_lengths(self.batch, *self.ragged) * self.copies

    @property
    def max_seq_len(self) -> int:
        return max(*(p + o for p, o in self.lengths()), self.arriving_len + 16)

    @property
    def max_num_seqs(self) -> int:
        return max(self.batch, self.slots)

    def prompts(self, vocab_size: int, seed: int) -> list[list[int]]:
        """Random token ids; another seed shares no prefix with this one."""
        rng = np.random.default_rng((seed, self.batch))
        return [rng.integers(1, vocab_size, p).tolist() for p, _ in self.lengths()]


@cache
def _ragged_lengths(batch: int, low: int, high: int) -> list[tuple[int, int]]:
    """As nano-vllm's bench.py draws them, token ids in between included: its published numbers have these lengths."""
    rng = random.Random(0)
    prompts = [len([rng.randint(0, 10_000) for _ in range(rng.randint(low, high))]) for _ in range(batch)]
    return [(prompt, rng.randint(low, high)) for prompt in prompts]


WORKLOADS: Final[dict[str, Workload]] = {
    workload.name: workload
    for workload in (
        Workload("headline", 32, 256, 8192),
        Workload("headline-short", 32, 256, 512),
        Workload("trace", 512, 0, 0, (100, 1024)),
        Workload("small-1", 1, 256, 512),
        Workload("small-32", 32, 256, 512),
        Workload("small-256", 256, 256, 512),
        Workload("small-trace", 256, 0, 0, (100, 1024)),
        Workload("latency", 32, 256, 2048, kind="latency", arriving_len=16_384, slots=40),
        Workload("burst", 32, 256, 4096, kind="burst", arriving_len=8192, arrivals=1000, slots=256),
    )
}


def greedy(output_len: int) -> GenerateParams:
    return GenerateParams(max_tokens=output_len, temperature=0.0, ignore_eos=True)


def sampled(index: int, output_len: int) -> GenerateParams:
    """Request `index` of a batch in which every row samples and no two rows alike: all stages of the sampler run."""
    return GenerateParams(
        max_tokens=output_len,
        ignore_eos=True,
        temperature=(0.6, 0.8, 1.0, 1.2)[index % 4],
        top_p=(0.95, 0.9, 1.0)[index % 3],
        top_k=(50, 0)[index % 2],
        seed=index,
        repetition_penalty=(1.0, 1.1)[index // 2 % 2],
        presence_penalty=(0.5, 0.0)[index % 2],
        frequency_penalty=0.2,
    )
