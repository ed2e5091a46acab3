"""Overload: ten times the load an engine can carry. What becomes of the requests it takes, and how soon it is well.

    python scripts/bench_overload.py                 # 60 s of overload
    python scripts/bench_overload.py --seconds 10 --factor 20

The engine has the fake executor: 16 requests in a step of 10 ms, 32 tokens each, so 50 requests a second, and room for
32 waiting ones. Requests come at fixed times, whatever became of those before (an open loop): 15 s at 0.8 of the
capacity, then the overload, then 15 s at 0.8 again. Latencies are those of requests that were answered 200, from the
time at which they were due. Recovered: when the last request was due that was refused, or took over 1.5 times the p99
from before the overload.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import uvloop

DEMO = Path(__file__).resolve().parents[1] / "models" / "demo"
ROWS, STEP_S, TOKENS, QUEUE = 16, 0.01, 32, 32
CAPACITY = ROWS / (STEP_S * TOKENS)  # requests a second
CALM_S, CALM_LOAD = 15.0, 0.8
BODY = json.dumps({"prompt": "a", "max_tokens": TOKENS, "ignore_eos": True}).encode()
REQUEST = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(BODY) + BODY
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request. Times in seconds of the event loop; `retry_after`: a refusal said when to come back."""

    due_s: float
    latency_s: float
    status: int
    retry_after: bool


class Load:
    """Sends requests at their times over connections that are kept."""

    def __init__(self, host: str, port: int) -> None:
        self._address = host, port
        self._idle: list[Connection] = []
        self._tasks: set[asyncio.Future[None]] = set()
        self.outcomes: list[Outcome] = []

    async def run(self, rate: float, seconds: float) -> float:
        """`rate` requests a second for `seconds`; returns when the first one was due, without waiting for the last."""
        loop = asyncio.get_running_loop()
        start_s = loop.time()
        for i in range(int(rate * seconds)):
            due_s = start_s + i / rate
            await asyncio.sleep(max(0.0, due_s - loop.time()))
            task = asyncio.ensure_future(self._request(due_s))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return start_s

    async def finish(self) -> None:
        await asyncio.gather(*self._tasks)
        for _, writer in self._idle:
            writer.close()

    async def _request(self, due_s: float) -> None:
        connection = self._idle.pop() if self._idle else await asyncio.open_connection(*self._address)
        reader, writer = connection
        writer.write(REQUEST)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = re.search(rb"content-length: (\d+)", head)
        await reader.readexactly(int(length[1]) if length else 0)
        now_s = asyncio.get_running_loop().time()
        self.outcomes.append(Outcome(due_s, now_s - due_s, int(head.split()[1]), b"retry-after:" in head))
        self._idle.append(connection)


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(int(share * len(values)), len(values) - 1)] if values else float("nan")


def report(name: str, outcomes: list[Outcome], seconds: float) -> float:
    """Print a row; returns the 99th percentile of the latency of accepted requests."""
    taken = [outcome.latency_s for outcome in outcomes if outcome.status == 200]
    refused = [outcome for outcome in outcomes if outcome.status == 429]
    other = len(outcomes) - len(taken) - len(refused)
    assert all(outcome.retry_after for outcome in refused), "a 429 without Retry-After"
    p50, p99 = quantile(taken, 0.5), quantile(taken, 0.99)
    print(
        f"{name:10} {len(outcomes) / seconds:8.0f} {len(taken) / seconds:8.1f} {len(refused):8} {other:6} "
        f"{1e3 * p50:9.0f} {1e3 * p99:9.0f} {1e3 * max(taken, default=0):9.0f}",
        flush=True,
    )
    return p99


async def measure(url: str, factor: float, seconds: float) -> None:
    host, port = url.split("/")[2].split(":")
    load = Load(host, int(port))
    starts = [
        await load.run(CAPACITY * CALM_LOAD, CALM_S),
        await load.run(CAPACITY * factor, seconds),
        await load.run(CAPACITY * CALM_LOAD, CALM_S),
    ]
    await load.finish()
    ends = [*starts[1:], float("inf")]
    phases = [[o for o in load.outcomes if start <= o.due_s < end] for start, end in zip(starts, ends, strict=True)]
    print(f"{'':10} {'offered':>8} {'accepted':>8} {'429':>8} {'other':>6} {'p50 ms':>9} {'p99 ms':>9} {'max ms':>9}")
    p99 = report("before", phases[0], CALM_S)
    report(f"{factor:g}x", phases[1], seconds)
    report("after", phases[2], CALM_S)
    unwell = [o.due_s - starts[2] for o in phases[2] if o.status != 200 or o.latency_s > 1.5 * p99]
    print(f"recovered after {max(unwell, default=0.0):.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="of overload")
    parser.add_argument("--factor", type=float, default=10.0, help="offered load over capacity")
    options = parser.parse_args()
    flags = ["--model", str(DEMO), "--port", "0", "--fake-executor", "--device", "cpu", "--log-level", "warning"]
    flags += ["--max-num-seqs", str(ROWS), "--max-num-queued-reqs", str(QUEUE)]
    command = [sys.executable, "-P", "-m", "frontend.launch", *flags]
    environment = {**os.environ, "ENGINE_FAKE_STEP_US": str(int(STEP_S * 1e6))}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as engine:
        assert engine.stdout is not None
        try:
            found = re.search(r"http://\S+", engine.stdout.readline())
            if found is None:
                sys.exit("the engine did not start")
            print(f"capacity {CAPACITY:.0f} requests/s, {ROWS} run, {QUEUE} may wait", flush=True)
            uvloop.run(measure(found.group(), options.factor, options.seconds))
        finally:
            engine.terminate()


if __name__ == "__main__":
    main()
