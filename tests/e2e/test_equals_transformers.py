"""Tokens and log-probabilities of the whole engine are those of transformers, at any depth and concurrency."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from frontend.request import GenerateParams
from tests.e2e.engine import Engine, running_engine
from tests.e2e.equality import LONGEST_PROMPT, check, flags, greedy, run, sampled
from tests.e2e.reference import reference_model


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
