"""Tokens and log-probabilities of the whole engine are those of transformers: at any depth, concurrency and chunk, with
and without prefix cache, in a KV cache with room for everything and in one too small."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from frontend.request import GenerateParams
from tests.e2e.engine import Engine, running_engine
from tests.e2e.equality import LONGEST_PROMPT, check, flags, greedy, run, sampled
from tests.e2e.reference import long_cases, reference_model

SMALL_CACHE_BLOCKS = 100  # 1584 tokens: one long prompt fits, or half of the long outputs
# Any two of depth, caching and chunk meet in each way. All three do in tests/scheduler/test_properties.py.
EVERY_PAIR = [(1, True, 7), (1, False, 512), (2, True, 512), (2, False, 7), (3, True, 7), (3, False, 512)]


@pytest.fixture(scope="module", params=[1, 2, 3], ids=lambda depth: f"depth{depth}")
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    with running_engine(*flags(request.param, True, 512)) as engine:
        yield engine


def test_the_prompts_are_what_they_should_be() -> None:
    lengths = [len(case.prompt) for case in greedy()]
    assert (len(lengths), min(lengths), max(lengths)) == (200, 1, LONGEST_PROMPT)
    assert sum(case.ended for case in greedy()) >= 10, "no natural ends among the prompts"


@pytest.mark.slow
def test_every_concurrency(engine: Engine) -> None:
    """All prompts one at a time, eight at a time and all together, with room for everything."""
    for concurrency in (1, 8, 64):
        stats = check(engine.endpoint, [*greedy(), *sampled()], concurrency)
    assert stats.preemptions == 0
    assert stats.prefix_hit_tokens > 0


def test_logprobs_are_those_of_transformers(engine: Engine) -> None:
    cases = greedy()[:40]
    params = GenerateParams(max_tokens=6, temperature=0.0, logprobs=5)
    results, _ = run(engine.endpoint, [(case, params) for case in cases], 64)
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


@pytest.mark.slow
@pytest.mark.parametrize(("depth", "caching", "chunk"), EVERY_PAIR)
def test_a_small_cache_preempts_and_changes_nothing(depth: int, caching: bool, chunk: int) -> None:
    few = ["--num-gpu-blocks-override", str(SMALL_CACHE_BLOCKS)]
    with running_engine(*flags(depth, caching, chunk), *few) as engine:
        check(engine.endpoint, [*greedy()[:15], *sampled()[:5]], 1)
        check(engine.endpoint, [*greedy()[15:60], *sampled()[5:15]], 8)
        stats = check(engine.endpoint, [*long_cases(20, max_tokens=80), *greedy()[60:], *sampled()[15:]], 64)
        assert stats.preemptions > 0
        assert (stats.prefix_hit_tokens > 0) == caching
