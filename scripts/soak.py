"""Many requests through a whole engine with made-up tokens: does anything grow that should not?

    python scripts/soak.py --requests 1000000

Real processes, fake executor. Most requests come from a Python client, some over HTTP, and some are given up half-way.
Prints memory, fds and threads of every process along the way. Exits with 0 if no process grows by more than 1 MiB per
100,000 requests after the first quarter, fds and threads are what they were, and the scheduler's counters add up to
what the clients sent and received. With fewer than 100,000 requests the growth is printed, not judged.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import httpx  # noqa: E402
import numpy as np  # noqa: E402
import psutil  # noqa: E402

from frontend import AsyncClient  # noqa: E402
from ipc.schema import Stats  # noqa: E402

GROWTH_MIB = 1.0  # allowed for 100,000 requests
JUDGED_FROM = 100_000
SAMPLES = 40
MIB = 1 << 20


class Soak:
    """The load, what it sent and received, and the samples taken meanwhile."""

    def __init__(self, args: argparse.Namespace, launcher: psutil.Process, url: str, client: AsyncClient) -> None:
        self.args, self.launcher, self.url, self.client = args, launcher, url, client
        self.rng = random.Random(args.seed)
        self.sent: Counter[str] = Counter()
        self.done = 0
        self.samples: list[tuple[int, dict[str, tuple[float, int, int]]]] = []  # (requests, role -> MiB, fds, threads)
        self.start_s = time.monotonic()

    async def run(self) -> None:
        numbers = iter(range(self.args.requests))
        async with httpx.AsyncClient(timeout=60) as http:
            await asyncio.gather(*(self.work(numbers, http) for _ in range(self.args.concurrency)))
        self.sample()

    async def work(self, numbers: Iterator[int], http: httpx.AsyncClient) -> None:
        for number in numbers:
            prompt = [self.rng.randrange(2, 2000) for _ in range(self.rng.randint(1, 40))]
            max_tokens = self.rng.randint(1, 8)
            self.sent["requests"] += 1
            self.sent["prompt_tokens"] += len(prompt)
            kind = number % 100
            if kind < self.args.http_percent:
                body = {"prompt": prompt, "max_tokens": max_tokens}
                answer = await http.post(f"{self.url}/completions", json=body)
                self.sent["received"] += answer.json()["usage"]["completion_tokens"]
            elif kind >= 95:  # given up half-way
                async with aclosing(self.client.stream(prompt, max_tokens=1000)) as chunks:
                    first = await anext(chunks)
                self.sent["received"] += len(first.token_ids)
            else:
                completion = await self.client.generate(prompt, max_tokens=max_tokens)
                self.sent["received"] += completion.completion_tokens
                assert completion.completion_tokens == max_tokens, completion
            self.done += 1
            if self.done % max(1, self.args.requests // SAMPLES) == 0:
                self.sample()

    def sample(self) -> None:
        seen = {"launcher": measure(self.launcher)}
        for child in self.launcher.children():
            match = re.search(r"engine-launch: (\w+)", " ".join(child.cmdline()))
            assert match, f"no role: {child}"
            seen[match[1]] = measure(child)
        self.samples.append((self.done, seen))
        if len(self.samples) % (SAMPLES // 8) == 1:
            rate = self.done / (time.monotonic() - self.start_s)
            table = ", ".join(f"{role} {mib:.1f} MiB {fds} fds {n} threads" for role, (mib, fds, n) in seen.items())
            print(f"{self.done:>8} requests, {rate:.0f}/s: {table}", flush=True)

    def judge(self, stats: Stats) -> list[str]:
        wrong = []
        settled = self.samples[len(self.samples) // 4 :]
        for role in settled[0][1]:
            requests = np.array([n for n, _ in settled], float)
            slope = float(np.polyfit(requests / 1e5, [seen[role][0] for _, seen in settled], 1)[0])
            print(f"{role}: {slope:+.2f} MiB per 100,000 requests")
            if slope > GROWTH_MIB and self.args.requests >= JUDGED_FROM:
                wrong.append(f"{role} grows by {slope:.2f} MiB per 100,000 requests")
            first, last = settled[0][1][role][1:], settled[-1][1][role][1:]
            if last[0] > first[0] + 4 or last[1] > first[1]:
                wrong.append(f"{role}: {first} -> {last} fds and threads")
        finished = sum(stats.requests_finished.values())
        print(f"sent {dict(self.sent)}; finished {stats.requests_finished}, rejected {stats.requests_rejected}")
        sums = {
            "requests sent and finished": (self.sent["requests"], finished + stats.requests_rejected),
            "prompt tokens sent and counted": (self.sent["prompt_tokens"], stats.prompt_tokens),
            "messages dropped": (0, stats.dropped_messages),
            "requests open": (0, stats.running + stats.waiting),
            "blocks free": (stats.blocks_total, stats.blocks_free),
            "tokens received beyond those generated": (0, max(0, self.sent["received"] - stats.generation_tokens)),
        }
        return wrong + [f"{what}: {a} and {b}" for what, (a, b) in sums.items() if a != b]


def measure(process: psutil.Process) -> tuple[float, int, int]:
    return process.memory_info().rss / MIB, process.num_fds(), process.num_threads()


async def soak(args: argparse.Namespace, launcher: psutil.Process, url: str, endpoint: str) -> list[str]:
    async with AsyncClient(endpoint, name="soak") as client:
        load = Soak(args, launcher, url, client)
        await load.run()
        stats = await client.stats()
        while stats.running or stats.waiting:  # the last aborts are on their way
            await asyncio.sleep(0.05)
            stats = await client.stats()
        return load.judge(stats)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--concurrency", type=int, default=256)
    parser.add_argument("--http-percent", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    command = [sys.executable, "-P", "-m", "frontend.launch", "--model", str(ROOT / "models" / "demo")]
    with tempfile.TemporaryFile() as log:
        # A small cache, so that the prefix index has its full size early on.
        process = subprocess.Popen(
            [*command, "--fake-executor", "--device", "cpu", "--port", "0", "--num-gpu-blocks-override", "16384"],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=ROOT,
        )
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            url, endpoint = re.search(r"http://\S+/v1", line), re.search(r"ipc://\S+\.sock", line)
            assert url and endpoint, line
            wrong = asyncio.run(soak(args, psutil.Process(process.pid), url.group(), endpoint.group()))
        finally:
            process.terminate()
            process.wait()
    for text in wrong:
        print(f"WRONG: {text}")
    print(f"{args.requests} requests: {len(wrong)} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
