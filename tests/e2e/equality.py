"""Runs cases through an engine and compares every answer with what transformers says."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from frontend import AsyncClient
from frontend.request import Completion, GenerateParams
from ipc.schema import Stats
from tests.e2e.reference import Case, greedy_cases, sampled_cases

LONGEST_PROMPT = 1500
LIMIT_S = 300.0


def greedy() -> list[Case]:
    return greedy_cases(200, LONGEST_PROMPT, max_tokens=6)


def sampled() -> list[Case]:
    return sampled_cases(40, 300, max_tokens=6)


def flags(depth: int, caching: bool, chunk: int) -> list[str]:
    chosen = ["--dtype", "float32", "--frontends", "0", "--max-num-seqs", "64", "--pipeline-depth", str(depth)]
    chosen += ["--long-prefill-token-threshold", str(chunk), "--max-num-batched-tokens", "1024"]
    return chosen if caching else [*chosen, "--no-enable-prefix-caching"]


def run(
    endpoint: str, asked: Sequence[tuple[Case, GenerateParams]], concurrency: int
) -> tuple[list[Completion], Stats]:
    """The answers, at most `concurrency` at a time, and what the scheduler has counted by then."""

    async def all_of_them() -> tuple[list[Completion], Stats]:
        limit = asyncio.Semaphore(concurrency)
        async with AsyncClient(endpoint) as client:

            async def one(case: Case, params: GenerateParams) -> Completion:
                async with limit:
                    return await client.generate(list(case.prompt), params, timeout_s=LIMIT_S)

            results = await asyncio.gather(*(one(*pair) for pair in asked))
            return list(results), await client.stats()

    return asyncio.run(all_of_them())


def check(endpoint: str, cases: Sequence[Case], concurrency: int) -> Stats:
    """Cases of one concurrency share cached prefixes only with each other, so that each of them is prefilled anew."""
    asked = [(case, replace(case.params(), cache_salt=f"concurrency {concurrency}")) for case in cases]
    results, stats = run(endpoint, asked, concurrency)
    for case, result in zip(cases, results, strict=True):
        assert result.token_ids == case.output, f"prompt of {len(case.prompt)} tokens at concurrency {concurrency}"
        assert result.choices[0].finish_reason == ("stop" if case.ended else "length")
        assert result.prompt_tokens == len(case.prompt)
        assert result.completion_tokens == len(case.output)
    assert (stats.running, stats.waiting, stats.inflight) == (0, 0, 0)
    assert stats.blocks_free == stats.blocks_total
    assert stats.dropped_messages == 0
    return stats
