"""What transformers says: greedy continuations of the demo model, float32, with the margin of every decision."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.e2e.engine import DEMO_MODEL

MIN_MARGIN = 1e-3  # float32 logits of different batch shapes differ by about 1e-5


@dataclass(frozen=True)
class Case:
    """One prompt and its greedy continuation."""

    prompt: tuple[int, ...]
    max_tokens: int
    output: tuple[int, ...]


@functools.cache
def reference_model() -> torch.nn.Module:
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
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


@torch.inference_mode()
def greedy_cases(count: int, longest: int, max_tokens: int, seed: int = 0) -> list[Case]:
    """At least `count` cases whose every decision has a margin above MIN_MARGIN."""
    model, cases = reference_model(), []
    for prompt in prompts(count + count // 10 + 2, longest, seed):
        out = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=max_tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        top = torch.stack(out.logits)[:, 0].topk(2).values
        if float((top[:, 0] - top[:, 1]).min()) > MIN_MARGIN:
            cases.append(Case(prompt, max_tokens, tuple(out.sequences[0, len(prompt) :].tolist())))
    assert len(cases) >= count, f"only {len(cases)} of {count} prompts have clear margins"
    return cases
