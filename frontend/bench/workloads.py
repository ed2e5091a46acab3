"""What is asked: prompts as texts, lengths, and when each request leaves. Pure; the same seed gives the same load.

Texts are made of common words, since token ids would need the server's tokenizer: a length in words is about that in
tokens for most models, and the server's own count is what the report shows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

_COMMON: Final = """
the of and to in is you that it he was for on are as with his they at be this have from or one had
by word but not what all were we when your can said there use an each which she do how their if will
up other about out many then them these so some her would make like him into time has look two more
write go see number no way could people my than first water been call who oil its now find long down
day did get come made may part
"""
WORDS: Final = tuple(_COMMON.split())
SHARED_PREFIXES: Final = 8  # of the prefix workload


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: leaves `at_s` after the start (open loop), or as soon as somebody is free (closed loop)."""

    prompt: str
    max_tokens: int
    at_s: float = 0.0


def _text(rng: np.random.Generator, words: int) -> str:
    return " ".join(rng.choice(WORDS, max(1, words)))


def random_load(rng: np.random.Generator, count: int, input_len: int, output_len: int) -> list[Ask]:
    """Lengths uniform within a quarter of the given ones, no two prompts alike."""
    lengths = rng.uniform(0.75, 1.25, (count, 2)) * (input_len, output_len)
    return [Ask(_text(rng, round(i)), max(1, round(o))) for i, o in lengths.tolist()]


def sharegpt_load(rng: np.random.Generator, count: int, input_len: int, output_len: int) -> list[Ask]:
    """Conversations: most prompts are short and some very long, answers vary less. Lengths are log-normal, with the
    given ones as their means; the widths are those of the ShareGPT set (sigma about 1.2 of prompts, 0.8 of answers).
    """
    sigma = np.array((1.2, 0.8))
    mean = np.log((input_len, output_len)) - sigma**2 / 2
    lengths = np.clip(rng.lognormal(mean, sigma, (count, 2)), 1, 8 * np.array((input_len, output_len)))
    return [Ask(_text(rng, round(i)), max(1, round(o))) for i, o in lengths.tolist()]


def prefix_load(rng: np.random.Generator, count: int, input_len: int, output_len: int) -> list[Ask]:
    """A few long system prompts, each shared by many requests: three quarters of a prompt, then a question."""
    shared = [_text(rng, round(input_len * 0.75)) for _ in range(SHARED_PREFIXES)]
    own = max(1, input_len - round(input_len * 0.75))
    return [Ask(f"{shared[rng.integers(SHARED_PREFIXES)]} {_text(rng, own)}", output_len) for _ in range(count)]


LOADS: Final = {"random": random_load, "sharegpt": sharegpt_load, "prefix": prefix_load}


def with_arrivals(asks: list[Ask], rate: float, rng: np.random.Generator) -> list[Ask]:
    """The same requests as a Poisson process of `rate` a second; an infinite rate sends all at once."""
    gaps = rng.exponential(1 / rate, len(asks)) if np.isfinite(rate) else np.zeros(len(asks))
    return [Ask(ask.prompt, ask.max_tokens, at) for ask, at in zip(asks, np.cumsum(gaps).tolist(), strict=True)]
