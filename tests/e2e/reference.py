"""What transformers says: continuations of the demo model in float32, kept only where every decision is clear."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, LogitsProcessorList

from frontend.request import GenerateParams
from tests.e2e.engine import DEMO_MODEL
from tests.executor.sampler_rows import Row, expected_scores

MIN_MARGIN = 1e-3  # float32 logits of different batch shapes differ by about 1e-5


@dataclass(frozen=True)
class Case:
    """One prompt and its continuation; greedy unless it has a seed."""

    prompt: tuple[int, ...]
    max_tokens: int
    output: tuple[int, ...]
    sampling: dict[str, Any]

    @property
    def ended(self) -> bool:
        """The model ended it, rather than max_tokens."""
        ends: list[int] = reference_model().generation_config.eos_token_id
        return self.output[-1] in ends and "ignore_eos" not in self.sampling

    def params(self) -> GenerateParams:
        return GenerateParams(max_tokens=self.max_tokens, **self.sampling)


class _Sampling(LogitsProcessor):
    """Turns logits into the scores whose argmax is the token this engine must sample."""

    def __init__(self, row: Row) -> None:
        self.row = row

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        row = Row(**{**vars(self.row), "position": input_ids.shape[1]})
        return expected_scores(scores[0], row)[None]


@functools.cache
def reference_model() -> Any:
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    return model.eval()


@functools.cache
def documents() -> list[int]:
    """Token ids of real text: this project's own test file of the standard library's language topics."""
    from pydoc_data.topics import topics

    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    ids: list[int] = tokenizer("\n".join(topics[key] for key in sorted(topics)[:40]))["input_ids"]
    return ids


def prompts(count: int, longest: int, seed: int) -> list[tuple[int, ...]]:
    """Prompts of 1 to `longest` tokens, log-uniform; a third share a prefix with another one."""
    rng, text = np.random.default_rng(seed), documents()
    made: list[tuple[int, ...]] = []
    for i in range(count):
        length = min(longest, int(np.exp(rng.uniform(0, np.log(longest + 1)))))
        start = int(rng.integers(0, len(text) - longest))
        prompt = tuple(text[start : start + length])
        if made and i % 3 == 0:
            other = made[int(rng.integers(len(made)))]
            prompt = (other[: int(rng.integers(0, len(other) + 1))] + prompt)[:length]
        made.append(prompt)
    return made


def greedy_cases(count: int, longest: int, max_tokens: int) -> list[Case]:
    """At least `count` greedy cases whose every decision has a margin above MIN_MARGIN."""
    asked = [(prompt, Row(slot=0), {"temperature": 0.0}) for prompt in prompts(count + count // 10, longest, seed=0)]
    return _clear_cases(asked, count, max_tokens)


def long_cases(count: int, max_tokens: int) -> list[Case]:
    """Short prompts that go on past every end of sequence: what fills a KV cache while it runs."""
    sampling = {"temperature": 0.0, "ignore_eos": True}
    asked = [(prompt, Row(slot=0), sampling) for prompt in prompts(2 * count, 40, seed=2)]
    return _clear_cases(asked, count, max_tokens)


def sampled_cases(count: int, longest: int, max_tokens: int) -> list[Case]:
    """At least `count` seeded cases, of several temperatures and filters."""
    rng, asked = np.random.default_rng(1), []
    for i, prompt in enumerate(prompts(count + count // 4, longest, seed=1)):
        seed, temperature = int(rng.integers(2**63)), round(float(rng.uniform(0.5, 1.2)), 2)
        filters: dict[str, Any] = [{}, {"top_k": 20}, {"top_p": 0.9}, {"min_p": 0.05}][i % 4]
        row = Row(slot=0, seed=seed, temperature=temperature, **filters)
        asked.append((prompt, row, {"temperature": temperature, "seed": seed, **filters}))
    return _clear_cases(asked, count, max_tokens)


@torch.inference_mode()
def _clear_cases(asked: list[tuple[tuple[int, ...], Row, dict[str, Any]]], count: int, max_tokens: int) -> list[Case]:
    cases = []
    for prompt, row, sampling in asked:
        if len(cases) == count:
            break
        ids = torch.tensor([prompt])
        out: Any = reference_model().generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_tokens,
            eos_token_id=None if sampling.get("ignore_eos") else reference_model().generation_config.eos_token_id,
            do_sample=False,
            logits_processor=LogitsProcessorList([_Sampling(row)] if row.temperature else []),
            output_scores=True,
            return_dict_in_generate=True,
        )
        top = torch.stack(out.scores)[:, 0].topk(2).values
        if float((top[:, 0] - top[:, 1]).min()) > MIN_MARGIN:
            cases.append(Case(prompt, max_tokens, tuple(out.sequences[0, len(prompt) :].tolist()), sampling))
    assert len(cases) >= count, f"only {len(cases)} of {len(asked)} prompts have clear margins"
    return cases
