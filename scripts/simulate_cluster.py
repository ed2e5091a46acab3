"""A cluster of 1 to 1024 replicas in virtual time: throughput, latency, prefix hits, balance, and what saturates first.

    python scripts/simulate_cluster.py                              # the table, twelve minutes on one core
    python scripts/simulate_cluster.py --replicas 1,64 --arrivals bursty --rate 60
    python scripts/simulate_cluster.py --json runs.json --plot docs/cluster.png
    python scripts/simulate_cluster.py --from runs.json --plot docs/cluster.png

The scheduler and the router are the real ones; steps take the time they take on an H200 (cluster_model.py). Columns:

    fe            frontends: as many as their CPU cost asks for at 60 % of a core each, unless --frontends says
    TTFT, ITL     first token, and gap between tokens, at the client: p50 and p99 in ms
    hits          prompt tokens found in the prefix cache; --replicas 1 is what one cache can do with these prompts
    most          tokens computed by the busiest replica over the mean
    device        share of the time in which the device had work, mean over replicas
    sched, front  share of one core: the scheduler (measured in this run), the frontend (from its measured costs)
    pick          us of the router for one request, measured in this run
    real          seconds that the simulation took

Virtual time is shorter for many replicas, so that no run takes long: 1 s of real time for one replica, 70 for 64, 85
for 256, and three minutes for 1024, of which it simulates 2.5 seconds. After the tables: how far the parts that are not
replicated go.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import numpy as np
from cluster_model import TO_CLIENT_S, TO_SCHEDULER_S, Cluster, Outcome, Scenario, StepTime

# CPU of a frontend and of a scheduler's sends on two shared cores (docs/operations.md, docs/cluster.md).
EVENT_US: Final = 31.0  # a token to its stream: bench_frontend.py --parts stream
FRAME_US: Final = 15.0  # a frame of tokens, of any number of rows; measured by hand
REQUEST_US: Final = 260.0  # an HTTP request, streamed: bench_frontend.py --parts requests, less its events
TOKENIZE_US: Final = 1.33  # a token of a prompt; by hand
SEND_US: Final = 12.0  # scheduler: a frame from the outbox to the socket; by hand
REPLICA_SECONDS: Final = 1500  # replicas x virtual seconds of a run, if the warm-up allows: 1 to 3 minutes
TARGET_UTILISATION: Final = 0.6


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    arrivals: str
    replicas: int
    frontends: int
    requests_s: float
    tokens_s: float
    ttft_ms: tuple[float, float]
    itl_ms: tuple[float, float]
    hits: float
    most: float
    device: float
    scheduler: float
    frontend: float
    pick_us: float
    report_us: float
    reports_s: float  # to one frontend
    frames_per_step: float
    step_ms: float
    scheduler_step_us: float
    admit_us: float
    preemptions: int
    virtual_s: float
    real_s: float

    HEAD = (
        f"{'arrivals':>8} {'replicas':>8} {'fe':>4} {'req/s':>7} {'tokens/s':>9} {'TTFT p50':>8} {'p99':>6} "
        f"{'ITL p50':>7} {'p99':>6} {'hits':>6} {'most':>5} {'device':>6} {'sched':>6} {'front':>6} {'pick':>5} "
        f"{'real':>5}"
    )

    def __str__(self) -> str:
        return (
            f"{self.arrivals:>8} {self.replicas:8d} {self.frontends:4d} {self.requests_s:7.0f} {self.tokens_s:9.0f} "
            f"{self.ttft_ms[0]:8.1f} {self.ttft_ms[1]:6.0f} {self.itl_ms[0]:7.2f} {self.itl_ms[1]:6.1f} "
            f"{self.hits:6.1%} {self.most:5.2f} {self.device:6.1%} {self.scheduler:6.1%} {self.frontend:6.1%} "
            f"{self.pick_us:5.1f} {self.real_s:5.0f}"
        )


def frontend_us(scenario: Scenario, rows_per_frame: float) -> float:
    """CPU of a frontend for one request, all its tokens included; the router apart."""
    prompt_len = scenario.shared_len + scenario.own_len
    events = scenario.output_len * (EVENT_US + FRAME_US / rows_per_frame)
    return REQUEST_US + TOKENIZE_US * prompt_len + events


def frontends_for(scenario: Scenario) -> int:
    """How many keep each below the target when each frame brings it one token, the worst case."""
    load = scenario.rate * scenario.replicas * frontend_us(scenario, 1.0) * 1e-6
    return max(1, math.ceil(load / TARGET_UTILISATION))


def simulate(scenario: Scenario) -> Row:
    start = time.perf_counter()
    outcome = Cluster(scenario).run()
    return summarize(scenario, outcome, time.perf_counter() - start)


def summarize(scenario: Scenario, outcome: Outcome, real_s: float) -> Row:
    seconds, replicas, frontends = outcome.seconds, scenario.replicas, scenario.frontends
    gaps = np.concatenate(outcome.gaps_s) if outcome.gaps_s else np.zeros(1)
    first = np.array(outcome.first_token_s or [0.0]) + TO_SCHEDULER_S + TO_CLIENT_S
    serving_us = outcome.requests * frontend_us(scenario, math.inf) + outcome.frames * FRAME_US
    router_us = (outcome.pick.ns + outcome.report.ns) / 1e3
    scheduler_us = (outcome.step.ns + outcome.admit.ns) / 1e3 + outcome.frames * SEND_US
    return Row(
        arrivals=scenario.arrivals,
        replicas=replicas,
        frontends=frontends,
        requests_s=outcome.requests / seconds,
        tokens_s=outcome.tokens / seconds,
        ttft_ms=_percentiles(first),
        itl_ms=_percentiles(gaps),
        hits=outcome.hit_tokens / max(1, outcome.prompt_tokens),
        most=float(outcome.tokens_of.max() / max(1.0, outcome.tokens_of.mean())),
        device=min(1.0, float(outcome.busy_s.mean()) / seconds),
        scheduler=scheduler_us * 1e-6 / seconds / replicas,
        frontend=(serving_us + router_us) * 1e-6 / seconds / frontends,
        pick_us=outcome.pick.us,
        report_us=outcome.report.us,
        reports_s=outcome.frames / seconds / frontends,
        frames_per_step=outcome.frames / max(1, outcome.steps),
        step_ms=float(outcome.busy_s.sum()) / max(1, outcome.steps) * 1e3,
        scheduler_step_us=outcome.step.us,
        admit_us=outcome.admit.us,
        preemptions=outcome.preemptions,
        virtual_s=scenario.seconds,
        real_s=real_s,
    )


def _percentiles(seconds: np.ndarray) -> tuple[float, float]:
    return float(np.percentile(seconds, 50)) * 1e3, float(np.percentile(seconds, 99)) * 1e3


def saturation(row: Row, scenario: Scenario) -> str:
    """How far the parts go that every replica or every frontend talks to, by the costs of one run."""
    tokens = row.tokens_s / row.replicas
    one_us = frontend_us(scenario, 1.0) / scenario.output_len
    many_us = frontend_us(scenario, math.inf) / scenario.output_len
    worst_step_us = row.scheduler_step_us + row.tokens_s / row.replicas * row.step_ms * 1e-3 * SEND_US
    picks = 1e6 / row.pick_us
    return "\n".join(
        (
            f"At {row.replicas} replicas, {row.arrivals} arrivals; costs of this machine:",
            f"  frontend   {many_us:.0f} us a token when a frame has many, {one_us:.0f} when each has one: a core "
            f"takes {1e6 / one_us:,.0f} to {1e6 / many_us:,.0f} tokens/s,",
            f"             {1e6 / one_us / tokens:.1f} to {1e6 / many_us / tokens:.1f} replicas of this load",
            f"  router     {row.pick_us:.1f} us a pick, {row.report_us:.2f} us a report: {row.reports_s:,.0f} "
            f"reports/s take {row.reports_s * row.report_us * 1e-4:.1f} % of a frontend;",
            f"             it alone would route {picks:,.0f} requests/s, "
            f"{picks / (row.requests_s / row.frontends):,.0f} times what its frontend has",
            f"  scheduler  {row.scheduler_step_us:.0f} us a step, and {row.frames_per_step:.1f} frames of "
            f"{SEND_US:.0f} us; with a frame for each row, the most there can be, {worst_step_us:.0f} us",
            f"             of the {row.step_ms * 1e3:,.0f} us that its step takes",
            f"  sockets    {row.frontends} at each scheduler, {row.replicas} at each frontend",
        )
    )


def run(args: argparse.Namespace) -> list[Row]:
    rows = []
    print(Row.HEAD, flush=True)
    for arrivals in args.arrivals:
        for replicas in args.replicas:
            scenario = scenario_of(args, arrivals, replicas)
            rows.append(simulate(scenario))
            print(rows[-1], flush=True)
    return rows


def scenario_of(args: argparse.Namespace, arrivals: str, replicas: int) -> Scenario:
    seconds = min(args.seconds, max(args.warm_up + 1.0, REPLICA_SECONDS / replicas))
    base = Scenario(
        replicas=replicas,
        frontends=1,
        arrivals=arrivals,
        rate=args.rate,
        seconds=seconds,
        warm_up=args.warm_up,
        groups=args.groups,
        shared_len=args.shared_len,
        own_len=args.own_len,
        output_len=args.output_len,
        seed=args.seed,
    )
    frontends = args.frontends or frontends_for(base)
    return Scenario(**{**asdict(base), "frontends": frontends})


def describe(args: argparse.Namespace) -> str:
    step = StepTime()
    return (
        f"Prompts of {args.shared_len} + {args.own_len} tokens, {args.groups:g} beginnings a replica; "
        f"{args.output_len} output tokens; {args.rate:g} requests a second and replica. A decode step of 32 rows "
        f"at context 1,200: {step.decode_s(32, 1200) * 1e3:.2f} ms; a prompt token more: {step.token_ms * 1e3:.1f} us."
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=lambda s: [int(n) for n in s.split(",")], default=[1, 4, 16, 64, 256, 1024])
    parser.add_argument("--arrivals", type=lambda s: s.split(","), default=["poisson", "bursty"])
    parser.add_argument("--rate", type=float, default=40.0, help="requests a second and replica (default: %(default)s)")
    parser.add_argument("--frontends", type=int, default=0, help="default: what their CPU cost asks for")
    parser.add_argument("--seconds", type=float, default=20.0, help="virtual, at most")
    parser.add_argument("--warm-up", type=float, default=1.5, help="virtual seconds that do not count")
    parser.add_argument("--groups", type=float, default=4.0, help="different beginnings of prompts, a replica")
    parser.add_argument("--shared-len", type=int, default=1024, help="tokens of a beginning")
    parser.add_argument("--own-len", type=int, default=128, help="further tokens of a prompt")
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--from", dest="source", type=Path, help="draw what --json wrote earlier, simulate nothing")
    parser.add_argument("--plot", type=Path, help="PNG or SVG")
    args = parser.parse_args(argv)
    if args.source is not None:
        rows = [Row(**row) for row in json.loads(args.source.read_text())]
    else:
        print(describe(args))
        rows = run(args)
        for arrivals in args.arrivals:
            last = [row for row in rows if row.arrivals == arrivals][-1]
            print("\n" + saturation(last, scenario_of(args, arrivals, last.replicas)))
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    if args.plot:
        from plot_cluster import draw

        draw(rows, args.plot)


if __name__ == "__main__":
    main()
