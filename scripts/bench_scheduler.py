"""Host time of the scheduler per step, plan + retire, without a GPU: rows x waiting requests.

    python scripts/bench_scheduler.py

Drives the real planner and retire at depth 2 with results that come back at once; every row decodes. Includes writing
the plan into its frame and reading the result, as the process does. Plan, retire and their sum are medians over the
steps, p90 is of the sum; shadow is the mean of what runs while the device is busy: hashing and registering blocks.
Targets: 100 us at 32 rows, 400 us at 512, whatever the number waiting. Then, what requests cost on their way in: taking
a message, and the plan that places them.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ipc.config import EngineConfig
from ipc.frames import Plan, write_plan
from ipc.results import Result
from ipc.schema import Admit, ModelCard, SamplingParams, pack_tokens
from scheduler.planner import make_plan
from scheduler.retire import retire
from scheduler.state import SchedulerState

TARGET_US = ((32, 100.0), (512, 400.0))  # up to so many rows
PROMPT_LEN = 16


@dataclass(frozen=True)
class StepCost:
    """Microseconds of a step with `rows` decoding rows."""

    rows: int
    waiting: int
    plan_us: float
    retire_us: float
    sum_us: float
    p90_us: float
    shadow_us: float

    @property
    def verdict(self) -> str:
        target = next((limit for rows, limit in TARGET_US if self.rows <= rows), None)
        return "" if target is None else f"{'ok' if self.sum_us <= target else 'MISSED'} (<= {target:.0f})"


@dataclass(frozen=True)
class AdmitCost:
    """When `count` short requests arrive at once: microseconds to take one, and of the next plan, which places some."""

    count: int
    arrive_us: float
    placed: int
    plan_us: float


def make_state(rows: int, waiting: int) -> SchedulerState:
    card = ModelCard("bench", "", 4096, 128_256, (2,), 20)
    blocks = rows * 256 + 1
    config = EngineConfig(card=card, max_num_seqs=rows, num_blocks=blocks, max_num_queued_reqs=10**9)
    state = SchedulerState(config)
    list(state.executor_attached(1, blocks))
    admit(state, 0, rows + waiting)
    return state


def admit(state: SchedulerState, first_id: int, count: int) -> None:
    rng = np.random.default_rng(first_id)
    params = SamplingParams(max_tokens=4000, temperature=0.0)
    for i in range(first_id, first_id + count):
        state.admit(0, Admit(i, pack_tokens(rng.integers(3, 1000, PROMPT_LEN, dtype=np.int32)), params))


def answer(plan: Plan, tokens: np.ndarray) -> Result:
    return Result(plan.seq, 1, 0, 0, 0, True, tokens[: plan.num_rows], None, None, None, None)


def measure_steps(rows: int, waiting: int, steps: int) -> StepCost:
    state = make_state(rows, waiting)
    payload = np.zeros(state.limits.plan_bytes, np.uint8)
    tokens = np.random.default_rng(0).integers(3, 1000, rows, dtype=np.int32)
    gc.collect()
    gc.freeze()
    plan_us, retire_us, shadow_us = list[float](), list[float](), list[float]()
    pending: deque[Plan] = deque()
    for _ in range(steps):
        start = time.perf_counter_ns()
        plan = make_plan(state)
        assert plan is not None
        write_plan(payload, plan)
        planned = time.perf_counter_ns()
        state.register_new_blocks()
        shadow_us.append((time.perf_counter_ns() - planned) / 1e3)
        plan_us.append((planned - start) / 1e3)
        pending.append(plan)
        if len(pending) == state.depth.steps:
            result = answer(pending.popleft(), tokens)
            start = time.perf_counter_ns()
            retire(state, result)
            retire_us.append((time.perf_counter_ns() - start) / 1e3)
    state.check()
    half = steps // 2  # the first ones admit
    sums = [plan + retired for plan, retired in zip(plan_us[half:], retire_us[half - 1 :], strict=False)]
    return StepCost(
        rows,
        waiting,
        statistics.median(plan_us[half:]),
        statistics.median(retire_us[half:]),
        statistics.median(sums),
        float(np.percentile(sums, 90)),
        statistics.mean(shadow_us[half:]),
    )


def measure_admission(count: int) -> AdmitCost:
    """`count` short requests arrive beside one that decodes."""
    state = make_state(count + 1, 0)
    for request in list(state.requests.values())[1:]:
        state.finish(request)
    payload = np.zeros(state.limits.plan_bytes, np.uint8)
    tokens = np.full(count + 1, 5, np.int32)
    for _ in range(3):
        plan = make_plan(state)
        assert plan is not None
        retire(state, answer(plan, tokens))
    start = time.perf_counter_ns()
    admit(state, 10_000, count)
    arrived = time.perf_counter_ns()
    plan = make_plan(state)
    assert plan is not None
    write_plan(payload, plan)
    placed = time.perf_counter_ns()
    placed_requests = plan.num_rows - 1  # the one that decodes comes first
    return AdmitCost(count, (arrived - start) / 1e3 / count, placed_requests, (placed - arrived) / 1e3)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,32,128,512")
    parser.add_argument("--waiting", default="0,1000,100000")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    costs = []
    print(f"{'rows':>5} {'waiting':>8} {'plan us':>9} {'retire us':>10} {'sum us':>8} {'p90 us':>8} {'shadow us':>10}")
    for waiting in map(int, args.waiting.split(",")):
        for rows in map(int, args.rows.split(",")):
            cost = measure_steps(rows, waiting, args.steps)
            costs.append(cost)
            print(
                f"{cost.rows:5d} {cost.waiting:8d} {cost.plan_us:9.1f} {cost.retire_us:10.1f} {cost.sum_us:8.1f} "
                f"{cost.p90_us:8.1f} {cost.shadow_us:10.1f}  {cost.verdict}",
                flush=True,
            )
    admissions = [measure_admission(count) for count in (1, 16, 256)]
    for each in admissions:
        print(
            f"{each.count:4d} arrive: {each.arrive_us:6.1f} us each; "
            f"the next plan places {each.placed}: {each.plan_us:6.0f} us"
        )
    if args.json:
        found = {"steps": [asdict(c) for c in costs], "admissions": [asdict(a) for a in admissions]}
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
