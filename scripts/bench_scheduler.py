"""Host time of the scheduler per step, plan + retire, without a GPU: rows x waiting requests.

    python scripts/bench_scheduler.py

Drives the real planner and retire at depth 2 with results that come back at once; every row decodes. Includes writing
the plan into its frame and reading the result, as the process does. Times are medians over the steps.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time

import numpy as np

from ipc.config import EngineConfig
from ipc.frames import Result, write_plan
from ipc.schema import Admit, ModelCard, SamplingParams, pack_tokens
from scheduler.planner import make_plan
from scheduler.retire import retire
from scheduler.state import SchedulerState


def measure(rows: int, waiting: int, steps: int) -> tuple[float, float, float]:
    """Median microseconds of (plan, retire, hashing and registering blocks) at `rows` decoding rows."""
    card = ModelCard("bench", "", 4096, 128_256, (2,), 20)
    config = EngineConfig(card=card, max_num_seqs=rows, num_blocks=rows * 256 + 1, max_num_queued_reqs=10**9)
    state = SchedulerState(config)
    list(state.executor_attached(1, rows * 256 + 1))
    rng = np.random.default_rng(0)
    for i in range(rows + waiting):
        prompt = pack_tokens(rng.integers(3, 1000, 16, dtype=np.int32))
        state.admit(0, Admit(i, prompt, SamplingParams(max_tokens=4000, temperature=0.0)))
    payload = np.zeros(config.limits.plan_bytes, np.uint8)
    tokens = rng.integers(3, 1000, rows, dtype=np.int32)
    gc.collect()
    gc.freeze()
    plan_us, retire_us, shadow_us = list[float](), list[float](), list[float]()
    pending = []
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
        if len(pending) == config.pipeline_depth:
            done = pending.pop(0)
            result = Result(done.seq, 1, 0, 0, 0, True, tokens[: done.num_rows], None, None, None, None)
            start = time.perf_counter_ns()
            retire(state, result)
            retire_us.append((time.perf_counter_ns() - start) / 1e3)
    state.check()
    half = steps // 2
    return statistics.median(plan_us[half:]), statistics.median(retire_us[half:]), statistics.mean(shadow_us[half:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,32,128,512")
    parser.add_argument("--waiting", default="0,1000,100000")
    parser.add_argument("--steps", type=int, default=600)
    args = parser.parse_args()
    print(f"{'rows':>5} {'waiting':>8} {'plan us':>9} {'retire us':>10} {'sum us':>8} {'shadow us':>10}")
    for waiting in map(int, args.waiting.split(",")):
        for rows in map(int, args.rows.split(",")):
            plan, retired, shadow = measure(rows, waiting, args.steps)
            print(f"{rows:5d} {waiting:8d} {plan:9.1f} {retired:10.1f} {plan + retired:8.1f} {shadow:10.1f}")


if __name__ == "__main__":
    main()
