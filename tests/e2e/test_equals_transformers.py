"""Tokens of the whole engine are those of transformers: any depth, chunk, cache, concurrency, and under preemption."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import cache

import pytest

from frontend import AsyncClient
from frontend.request import Completion, GenerateParams
from ipc.schema import Stats
from tests.e2e.engine import running_engine
from tests.e2e.reference import Case, greedy_cases, long_cases, sampled_cases

LONGEST_PROMPT = 1500
SMALL_CACHE_BLOCKS = 130  # 2064 tokens: one long prompt fits, or half of the long outputs


@cache
def greedy() -> list[Case]:
    return greedy_cases(200, LONGEST_PROMPT, max_tokens=12)


@cache
def sampled() -> list[Case]:
    return sampled_cases(40, 300, max_tokens=12)


@cache
def long() -> list[Case]:
    return long_cases(24, max_tokens=120)


async def run_all(endpoint: str, cases: Sequence[Case], concurrency: int) -> tuple[list[Completion], Stats]:
    limit = asyncio.Semaphore(concurrency)
    async with AsyncClient(endpoint) as client:

        async def run(case: Case) -> Completion:
            async with limit:
                return await client.generate(list(case.prompt), case.params(), timeout_s=300)

        results = await asyncio.gather(*(run(case) for case in cases))
        return list(results), await client.stats()


def check(endpoint: str, cases: Sequence[Case], concurrency: int) -> Stats:
    results, stats = asyncio.run(run_all(endpoint, cases, concurrency))
    for case, result in zip(cases, results, strict=True):
        assert result.token_ids == case.output, f"prompt of {len(case.prompt)} tokens at concurrency {concurrency}"
        assert result.choices[0].finish_reason == ("stop" if case.ended else "length")
        assert result.prompt_tokens == len(case.prompt)
        assert result.completion_tokens == len(case.output)
    return stats


def flags(depth: int, caching: bool, chunk: int) -> list[str]:
    chosen = ["--dtype", "float32", "--frontends", "0", "--max-num-seqs", "64", "--pipeline-depth", str(depth)]
    chosen += ["--long-prefill-token-threshold", str(chunk), "--max-num-batched-tokens", "1024"]
    return chosen if caching else [*chosen, "--no-enable-prefix-caching"]


@pytest.mark.slow
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_every_concurrency(depth: int) -> None:
    """All prompts one at a time, eight at a time and all together, with room for everything."""
    with running_engine(*flags(depth, True, 512)) as engine:
        for concurrency in (1, 8, 64):
            stats = check(engine.endpoint, [*greedy(), *sampled()], concurrency)
        assert stats.preemptions == 0
        assert stats.prefix_hit_tokens > 0
        assert stats.dropped_messages == 0
        assert (stats.running, stats.waiting, stats.inflight) == (0, 0, 0)
        assert stats.blocks_free == stats.blocks_total
    assert sum(case.ended for case in greedy()) >= 10, "no natural ends among the prompts"


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [7, 512])
@pytest.mark.parametrize("caching", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_small_cache_preempts_and_changes_nothing(depth: int, caching: bool, chunk: int) -> None:
    few = ["--num-gpu-blocks-override", str(SMALL_CACHE_BLOCKS)]
    with running_engine(*flags(depth, caching, chunk), *few) as engine:
        check(engine.endpoint, [*greedy()[:4], *sampled()[:4]], 1)
        check(engine.endpoint, [*greedy()[4:24], *sampled()[4:12]], 8)
        stats = check(engine.endpoint, [*long(), *greedy()[24:84], *sampled()[12:]], 64)
        assert stats.preemptions > 0
        assert (stats.prefix_hit_tokens > 0) == caching
        assert stats.blocks_free == stats.blocks_total


def test_logprobs_are_those_of_transformers() -> None:
    import torch

    from tests.e2e.reference import reference_model

    cases = greedy()[:20]
    params = GenerateParams(max_tokens=12, temperature=0.0, logprobs=5)
    with running_engine(*flags(2, True, 512)) as engine:

        async def run() -> list[Completion]:
            async with AsyncClient(engine.endpoint) as client:
                return list(await asyncio.gather(*(client.generate(list(c.prompt), params) for c in cases)))

        results = asyncio.run(run())
    for case, result in zip(cases, results, strict=True):
        ids = torch.tensor([[*case.prompt, *case.output]])
        with torch.inference_mode():
            logits = reference_model()(ids).logits[0, len(case.prompt) - 1 : -1]
        expected = torch.log_softmax(logits.float(), -1)  # [output tokens, vocab]
        logprobs = result.choices[0].logprobs
        assert logprobs is not None
        assert len(logprobs) == len(case.output)
        for row, entry, token in zip(expected, logprobs, case.output, strict=True):
            assert entry.token_id == token
            assert entry.rank == 1
            assert entry.logprob == pytest.approx(float(row[token]), abs=1e-4)
            top = row.topk(5)
            assert [value for _, _, value in entry.top] == pytest.approx(top.values.tolist(), abs=1e-4)
