"""Prefix-affinity routing: hit rate of the prefix cache and balance of the load, with one replica and with several.

    python scripts/bench_routing.py                        # 1 and 4 replicas
    python scripts/bench_routing.py --replicas 8 --requests 4000

Whole engines with the fake executor, which takes --step-us for a step, and this script as the client that routes.
Requests begin with one of --systems system prompts, the i-th being 1 / i as popular as the first, and go on with tokens
of their own; --concurrency of them are open at any time, and all runs have the same requests. Columns:

    hit %        prompt tokens found in the prefix cache, of all
    imbalance %  work of the busiest replica over the mean of all, less 1; work is tokens, computed or generated
    requests     that each replica ran

The last row sends requests to replicas at random: what the numbers would be without a router.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from bench_engine import running_engine

import frontend.replicas
from frontend import AsyncClient, GenerateParams
from frontend.router import Router

DEMO = Path(__file__).resolve().parents[1] / "models" / "demo"
HIT_POINTS, IMBALANCE = 5.0, 10.0  # the targets
FIRST_ID = 3  # ids below have a meaning


class AtRandom(Router):
    """What the router is compared with."""

    def pick(self, prompt: bytes, salt: str = "") -> int | None:
        return random.choice(self._taking).number if self._taking else None


@dataclass(frozen=True)
class Found:
    """One run."""

    hit: float  # %
    imbalance: float  # %
    requests: list[int]
    wall_s: float


def make_requests(args: argparse.Namespace, vocab_size: int) -> list[tuple[list[int], int]]:
    """(prompt, output tokens), the same for every run."""
    rng = np.random.default_rng(args.seed)
    systems = rng.integers(FIRST_ID, vocab_size, (args.systems, args.system_len))
    popularity = 1 / np.arange(1, args.systems + 1)
    chosen = rng.choice(args.systems, args.requests, p=popularity / popularity.sum())
    own = rng.integers(*args.own_len, args.requests)
    outputs = rng.integers(*args.output_len, args.requests)
    return [
        ([*systems[system].tolist(), *rng.integers(FIRST_ID, vocab_size, length).tolist()], int(output))
        for system, length, output in zip(chosen, own, outputs, strict=True)
    ]


async def drive(endpoint: str, args: argparse.Namespace) -> Found:
    async with AsyncClient(endpoint, name="bench") as client:
        requests = iter(make_requests(args, client.card.vocab_size))
        start_s = time.perf_counter()
        await asyncio.gather(*(work(client, requests) for _ in range(args.concurrency)))
        wall_s = time.perf_counter() - start_s
        total = await client.stats()
        each = list(client.last_stats.values())
        tokens = [s.prompt_tokens - s.prefix_hit_tokens + s.generation_tokens for s in each]
        return Found(
            hit=100 * total.prefix_hit_tokens / total.prefix_query_tokens,
            imbalance=100 * (max(tokens) * len(tokens) / sum(tokens) - 1),
            requests=[s.requests_finished.get("length", 0) for s in each],
            wall_s=wall_s,
        )


async def work(client: AsyncClient, requests: Iterator[tuple[list[int], int]]) -> None:
    for prompt, output in requests:
        await client.generate(prompt, GenerateParams(max_tokens=output, ignore_eos=True))


def measure(replicas: int, router: type[Router], args: argparse.Namespace) -> Found:
    flags = [str(DEMO), "--fake-executor", "--device", "cpu", "--data-parallel-size", str(replicas)]
    flags += ["--max-model-len", "4096", "--max-num-seqs", "64", "--disable-log-stats"]
    frontend.replicas.Router = router  # type: ignore[misc, attr-defined]
    with running_engine(flags, {"ENGINE_FAKE_STEP_US": str(args.step_us)}) as engine:
        found = asyncio.run(drive(engine.endpoint, args))
    return found


def span(text: str) -> tuple[int, int]:
    low, high = map(int, text.split("-"))
    return low, high + 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--requests", type=int, default=1500)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--systems", type=int, default=32, help="system prompts")
    parser.add_argument("--system-len", type=int, default=512)
    parser.add_argument("--own-len", type=span, default=span("16-256"), metavar="LOW-HIGH")
    parser.add_argument("--output-len", type=span, default=span("16-64"), metavar="LOW-HIGH")
    parser.add_argument("--step-us", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    runs = [
        ("one replica", 1, Router),
        ("by the router", args.replicas, Router),
        ("at random", args.replicas, AtRandom),
    ]
    results = [(name, measure(count, router, args)) for name, count, router in runs]
    print(f"{'':14} {'hit %':>6} {'imbalance %':>12} {'wall s':>7}  requests")
    for name, found in results:
        shares = " ".join(map(str, found.requests))
        print(f"{name:14} {found.hit:6.1f} {found.imbalance:12.1f} {found.wall_s:7.1f}  {shares}")
    one, routed = results[0][1], results[1][1]
    lost = one.hit - routed.hit
    holds = lost <= HIT_POINTS and routed.imbalance <= IMBALANCE
    print(
        f"{args.replicas} replicas: {lost:.1f} points of hit rate below one replica's (at most {HIT_POINTS:g}), "
        f"imbalance {routed.imbalance:.1f} % (at most {IMBALANCE:g}): {'holds' if holds else 'MISSED'}"
    )
    return 0 if holds else 1


if __name__ == "__main__":
    raise SystemExit(main())
