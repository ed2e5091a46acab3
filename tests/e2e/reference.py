"""What transformers says: continuations of the demo model in float32, kept only where every decision is clear."""

from __future__ import annotations

import asyncio
import functools
import inspect
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, LogitsProcessorList

from frontend.request import GenerateParams
from tests.e2e.engine import DEMO_MODEL
from tests.executor.sampler_rows import Row, expected_scores

FOREVER = 1 << 30  # positions
MAX_BATCH, BATCH_TOKENS = 32, 2048
MIN_MARGIN = 1e-3  # float32 logits of different batch shapes differ by about 1e-5

Asked = tuple[tuple[int, ...], Row, dict[str, Any]]  # prompt, the sampler's row, the client's parameters


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
        return self.output[-1] in ends() and "ignore_eos" not in self.sampling

    def params(self) -> GenerateParams:
        return GenerateParams(max_tokens=self.max_tokens, **self.sampling)


class _Sampling(LogitsProcessor):
    """Turns logits into the scores whose argmax is the token this engine must sample."""

    def __init__(self, rows: list[Row], padding: list[int], longest: int) -> None:
        self.rows, self.padding, self.longest = rows, padding, longest

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        expected = []
        for row, pad, ids, one in zip(self.rows, self.padding, input_ids.tolist(), scores, strict=True):
            prompt, generated = tuple(ids[pad : self.longest]), tuple(ids[self.longest :])
            now = replace(row, position=len(ids) - pad, prompt=prompt, generated=generated)
            expected.append(expected_scores(one, now))
        return torch.stack(expected)


@functools.cache
def reference_model() -> Any:
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    return model.eval()


def ends() -> list[int]:
    """Token ids that end a sequence."""
    ids: list[int] = reference_model().generation_config.eos_token_id
    return ids


@functools.cache
def documents() -> list[int]:
    """Token ids of real text: Python's language topics, one after another."""
    from pydoc_data.topics import topics

    return _tokenize("\n".join(topics[key] for key in sorted(topics)[:40]))


@functools.cache
def docstrings() -> list[list[int]]:
    """Token ids of short texts whose end the model knows."""
    members = [inspect.getdoc(member) or "" for _, member in inspect.getmembers(asyncio, callable)]
    return [_tokenize(text) for text in sorted(set(members)) if 40 < len(text) < 800]


def _tokenize(text: str) -> list[int]:
    ids: list[int] = AutoTokenizer.from_pretrained(DEMO_MODEL)(text)["input_ids"]
    return ids


def prompts(count: int, longest: int, seed: int) -> list[tuple[int, ...]]:
    """Prompts of 1 to `longest` tokens, log-uniform, one in 24 of the upper half.

    A third share a prefix with one of the four before, so that both are in flight together; one in 12 is near its end.
    """
    rng, text = np.random.default_rng(seed), documents()
    made: list[tuple[int, ...]] = []
    for i in range(count):
        low, high = (0.5, 1.0) if i % 24 == 23 else (0.0, 0.6)
        length = longest if i == 23 else int((longest + 1) ** rng.uniform(low, high))
        start = int(rng.integers(0, len(text) - longest))
        prompt = tuple(text[start : start + length])
        if i % 3 == 2:
            other = made[-int(rng.integers(1, 5)) if i > 3 else 0]
            prompt = (other[: int(rng.integers(0, len(other) + 1))] + prompt)[:longest]
        elif i % 12 == 6:
            prompt = tuple(docstrings()[i % len(docstrings())][:-3][-longest:])
        made.append(prompt)
    return made


@functools.cache
def greedy_cases(count: int, longest: int, max_tokens: int) -> list[Case]:
    """Greedy cases whose every decision has a margin above MIN_MARGIN."""
    asked: list[Asked] = [
        (prompt, Row(slot=0), {"temperature": 0.0}) for prompt in prompts(count + count // 10, longest, seed=0)
    ]
    return _clear_cases(asked, count, max_tokens)


@functools.cache
def sampled_cases(count: int, longest: int, max_tokens: int) -> list[Case]:
    """Seeded cases, of several temperatures and filters."""
    rng = np.random.default_rng(1)
    asked = [_seeded(prompt, rng, i) for i, prompt in enumerate(prompts(count + count // 4, longest, seed=1))]
    return _clear_cases(asked, count, max_tokens)


@functools.cache
def long_cases(count: int, max_tokens: int) -> list[Case]:
    """Short prompts that go on past every end of sequence, half of them seeded: what fills a KV cache while it runs."""
    rng, asked = np.random.default_rng(2), []
    for i, prompt in enumerate(prompts(2 * count, 40, seed=2)):
        _, row, sampling = (prompt, Row(slot=0), {"temperature": 0.0}) if i % 2 else _seeded(prompt, rng, i // 2)
        asked.append((prompt, row, {**sampling, "ignore_eos": True}))
    return _clear_cases(asked, count, max_tokens)


def _seeded(prompt: tuple[int, ...], rng: np.random.Generator, i: int) -> Asked:
    """One of every kind of wish in turn; penalties and bias are what a preempted request has to bring along."""
    seed, temperature = int(rng.integers(2**63)), round(float(rng.uniform(0.5, 1.2)), 2)
    end = len(prompt) + 5
    row, wish = [
        (Row(0), {}),
        (Row(0, top_k=20), {"top_k": 20}),
        (Row(0, top_p=0.9), {"top_p": 0.9}),
        (Row(0, min_p=0.05), {"min_p": 0.05}),
        (Row(0, repetition=1.3), {"repetition_penalty": 1.3}),
        (Row(0, presence=0.7, frequency=0.4), {"presence_penalty": 0.7, "frequency_penalty": 0.4}),
        (Row(0, bias=((9, 2.5, FOREVER), (5, -100.0, FOREVER))), {"logit_bias": {9: 2.5, 5: -100.0}}),
        (Row(0, bias=tuple((token, -np.inf, end) for token in ends())), {"min_tokens": 5}),
    ][i % 8]
    return prompt, replace(row, seed=seed, temperature=temperature), {"temperature": temperature, "seed": seed, **wish}


def _clear_cases(asked: list[Asked], count: int, max_tokens: int) -> list[Case]:
    """In batches of prompts of similar length, which is several times faster than one by one."""
    found: dict[int, Case] = {}
    rest = sorted(range(len(asked)), key=lambda i: len(asked[i][0]))
    while rest:
        size = max(1, min(MAX_BATCH, BATCH_TOKENS // len(asked[rest[-1]][0])))
        batch, rest = rest[-size:], rest[:-size]
        answers = _generate([asked[i] for i in batch], max_tokens)
        found |= {i: case for i, case in zip(batch, answers, strict=True) if case is not None}
    assert len(found) >= count, f"only {len(found)} of {len(asked)} prompts have clear margins"
    return [found[i] for i in sorted(found)[:count]]


@torch.inference_mode()
def _generate(asked: list[Asked], max_tokens: int) -> list[Case | None]:
    """What transformers continues each prompt with; None where a decision was close."""
    ignores_end = "ignore_eos" in asked[0][2]
    longest = max(len(prompt) for prompt, _, _ in asked)
    padding = [longest - len(prompt) for prompt, _, _ in asked]
    mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in padding])
    rows = [row for _, row, _ in asked]
    out: Any = reference_model().generate(
        torch.tensor([[0] * pad + list(prompt) for pad, (prompt, _, _) in zip(padding, asked, strict=True)]),
        attention_mask=mask,
        max_new_tokens=max_tokens,
        eos_token_id=None if ignores_end else ends(),
        pad_token_id=0,
        do_sample=False,
        logits_processor=LogitsProcessorList(
            [_Sampling(rows, padding, longest)] if any(row.features for row in rows) else []
        ),
        output_scores=True,
        return_dict_in_generate=True,
    )
    top = torch.stack(out.scores, 1).topk(2).values  # [rows, new tokens, 2]
    cases: list[Case | None] = []
    for (prompt, _, sampling), tokens, margins in zip(asked, out.sequences[:, longest:].tolist(), top, strict=True):
        ended = [] if ignores_end else [i + 1 for i, token in enumerate(tokens) if token in ends()]
        length = min([max_tokens, *ended])
        clear = float((margins[:length, 0] - margins[:length, 1]).min()) > MIN_MARGIN
        cases.append(Case(prompt, max_tokens, tuple(tokens[:length]), sampling) if clear else None)
    return cases
