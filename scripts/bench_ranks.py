"""What it costs a step that several ranks read its plan, without a GPU: the real engine around fake executors.

    python scripts/bench_ranks.py --ranks 1,8

Starts `engine-launch --fake-executor` once for each number of ranks, in turn and several times, and decodes `--batch`
requests with steps of `--step-us` microseconds, long enough that the ranks need not share cores all the time. Columns:

    plan, retire    host microseconds a step in the scheduler, which is what more ranks add to: acks to look at, bells
    cost            their sum; medians over the rounds
    step            wall time of a step beyond `--step-us`, in microseconds: waking the ranks is in it

Target: the cost with 8 ranks is at most 1.2 times that with one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

from bench_engine import running_engine
from workloads import Workload, greedy

from frontend import AsyncClient

TARGET = 1.2
MODEL = Path(__file__).resolve().parents[1] / "models" / "demo"
WARM_TOKENS = 16


@dataclass(frozen=True)
class StepCost:
    """Microseconds a step."""

    plan_us: float
    retire_us: float
    beyond_us: float

    @property
    def cost_us(self) -> float:
        return self.plan_us + self.retire_us


async def drive(endpoint: str, workload: Workload, step_us: int) -> StepCost:
    async with AsyncClient(endpoint, name="bench") as client:
        prompts = workload.prompts(client.card.vocab_size, seed=0)

        async def run(tokens: int) -> None:
            await asyncio.gather(*(client.generate(prompt, greedy(tokens)) for prompt in prompts))

        await run(WARM_TOKENS)
        before, start = await client.stats(), time.perf_counter()
        await run(workload.output_len)
        wall_us, after = (time.perf_counter() - start) * 1e6, await client.stats()
        steps = after.steps - before.steps
        return StepCost(
            (after.plan_ns - before.plan_ns) / steps / 1e3,
            (after.retire_ns - before.retire_ns) / steps / 1e3,
            wall_us / steps - step_us,
        )


def measure(ranks: int, workload: Workload, step_us: int) -> StepCost:
    flags = ["--model", str(MODEL), "--fake-executor", "--device", "cpu", "--max-num-seqs", str(workload.batch)]
    env = {"ENGINE_FAKE_STEP_US": str(step_us)}
    with running_engine([*flags, "--tensor-parallel-size", str(ranks)], env) as engine:
        return asyncio.run(drive(engine.endpoint, workload, step_us))


def middle(costs: list[StepCost]) -> StepCost:
    """The median of each number."""
    return StepCost(*(statistics.median(values) for values in zip(*(asdict(c).values() for c in costs), strict=True)))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="1,8")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--output-len", type=int, default=300)
    parser.add_argument("--step-us", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    numbers = list(map(int, args.ranks.split(",")))
    workload = Workload("ranks", args.batch, 16, args.output_len)
    found: defaultdict[int, list[StepCost]] = defaultdict(list)
    for _ in range(args.rounds):
        for ranks in numbers:
            found[ranks].append(measure(ranks, workload, args.step_us))
    print(f"{'ranks':>5} {'plan us':>8} {'retire us':>9} {'cost us':>8} {'of the first':>12} {'step us':>8}")
    first = middle(found[numbers[0]])
    for ranks in numbers:
        cost = middle(found[ranks])
        ratio = cost.cost_us / first.cost_us
        verdict = "" if ranks == numbers[0] else f"  {'ok' if ratio <= TARGET else 'MISSED'} (<= {TARGET})"
        print(
            f"{ranks:5d} {cost.plan_us:8.1f} {cost.retire_us:9.1f} {cost.cost_us:8.1f} {ratio:12.2f} "
            f"{cost.beyond_us:8.0f}{verdict}"
        )
    if args.json:
        args.json.write_text(
            json.dumps({ranks: [asdict(c) for c in costs] for ranks, costs in found.items()}, indent=1)
        )


if __name__ == "__main__":
    main()
