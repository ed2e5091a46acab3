"""Tokens are those of transformers at any depth and chunk, with and without prefix cache, in a KV cache too small."""

from __future__ import annotations

import pytest

from tests.e2e.engine import running_engine
from tests.e2e.equality import check, flags, greedy, sampled
from tests.e2e.reference import long_cases

SMALL_CACHE_BLOCKS = 100  # 1584 tokens: one long prompt fits, or half of the long outputs


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [7, 512])
@pytest.mark.parametrize("caching", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_small_cache_preempts_and_changes_nothing(depth: int, caching: bool, chunk: int) -> None:
    few = ["--num-gpu-blocks-override", str(SMALL_CACHE_BLOCKS)]
    with running_engine(*flags(depth, caching, chunk), *few) as engine:
        check(engine.endpoint, [*greedy()[:15], *sampled()[:5]], 1)
        check(engine.endpoint, [*greedy()[15:60], *sampled()[5:15]], 8)
        stats = check(engine.endpoint, [*long_cases(20, max_tokens=80), *greedy()[60:], *sampled()[15:]], 64)
        assert stats.preemptions > 0
        assert (stats.prefix_hit_tokens > 0) == caching
