"""What decode rows feel when something else arrives: the procedures of the workloads `latency` and `burst`.

Used by `bench_offline.py` on a running engine. Both keep a batch decoding and time each row's tokens in this process.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import numpy as np
from workloads import Workload, greedy

from frontend import AsyncClient
from ipc.schema import Stats

REPEATS = 3  # of what arrives
_PATIENCE_S = 600.0


@dataclass(frozen=True)
class Latency:
    """Inter-token latencies of the decode rows, milliseconds, alone and while a long prompt is read."""

    arriving_len: int
    alone_p50_ms: float
    alone_p99_ms: float
    meanwhile_p50_ms: float
    meanwhile_p99_ms: float
    meanwhile_max_ms: float
    decode_step_ms: float  # on the device, alone
    chunk_ms: float  # the longest step on the device, less a decode step
    bound_ms: float  # 2 decode steps + one chunk
    first_token_ms: float  # of the long prompt, mean

    @property
    def holds(self) -> bool:
        return self.meanwhile_p99_ms <= self.bound_ms


@dataclass(frozen=True)
class Disturbance:
    """What the device saw while one thing happened beside a decoding batch."""

    what: str
    steps: int
    hidden: float  # share of steps that were queued before the device ran dry
    bubbles: int
    bubble_ms: float
    longest_bubble_us: float
    longest_step_ms: float
    compilations: int


class TimedRows:
    """A batch of streams, and when each of their tokens came. `counts[i]` tokens of row i are here."""

    def __init__(self, client: AsyncClient, workload: Workload, prompts: list[list[int]]) -> None:
        self._client, self._workload, self._prompts = client, workload, prompts
        self.arrivals: list[list[float]] = [[] for _ in prompts]
        self.counts = [0] * len(prompts)
        self._moved = asyncio.Event()
        self._failed: BaseException | None = None

    async def run(self, row: int) -> None:
        try:
            async for chunk in self._client.stream(self._prompts[row], greedy(self._workload.output_len)):
                self.arrivals[row].append(time.perf_counter())  # several tokens at once count as one late token
                self.counts[row] += len(chunk.token_ids)
                self._moved.set()
            if self.counts[row] < self._workload.output_len:
                raise RuntimeError(f"row {row} ended after {self.counts[row]} tokens")
        except Exception as error:
            self._failed = error
            self._moved.set()

    async def advance(self, tokens: int) -> None:
        """Until every row has `tokens` more than now. Raises RuntimeError if a row ends before."""
        goal = [count + tokens for count in self.counts]
        if max(goal) > self._workload.output_len:
            raise RuntimeError(f"rows of {self._workload.output_len} tokens are too short for this procedure")
        async with asyncio.timeout(_PATIENCE_S):
            while any(count < want for count, want in zip(self.counts, goal, strict=True)):
                if self._failed is not None:
                    raise RuntimeError("a decode row failed") from self._failed
                self._moved.clear()
                await self._moved.wait()

    def latencies_ms(self, since_s: float, until_s: float) -> list[float]:
        """Time from a row's token to its next, for those that came in (since, until]."""
        return [
            (later - earlier) * 1e3
            for times in self.arrivals
            for earlier, later in itertools.pairwise(times)
            if since_s < later <= until_s
        ]


@asynccontextmanager
async def decoding_rows(client: AsyncClient, workload: Workload) -> AsyncIterator[TimedRows]:
    """The workload's batch, decoding steadily; aborted at the end."""
    rows = TimedRows(client, workload, workload.prompts(client.card.vocab_size, seed=11))
    tasks = [asyncio.create_task(rows.run(row)) for row in range(workload.batch)]
    try:
        await rows.advance(max(2, workload.output_len // 64))
        yield rows
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def measure_latency(client: AsyncClient, workload: Workload) -> Latency:
    """Rows alone, then while a long prompt is read, several times; a prompt's end is its first token."""
    rng = np.random.default_rng(12)
    async with decoding_rows(client, workload) as rows:
        before = await client.stats()
        since = time.perf_counter()
        await rows.advance(workload.output_len // 8)
        alone = rows.latencies_ms(since, time.perf_counter())
        after = await client.stats(restart_longest=True)
        decode_ms = (after.device_ns - before.device_ns) / max(1, after.steps - before.steps) / 1e6
        meanwhile: list[float] = []
        waits: list[float] = []
        for _ in range(REPEATS):
            prompt = rng.integers(1, client.card.vocab_size, workload.arriving_len).tolist()
            start = time.perf_counter()
            await client.generate(prompt, greedy(1))
            end = time.perf_counter()
            waits.append((end - start) * 1e3)
            await rows.advance(max(2, workload.output_len // 64))
            # The gap that the last chunk made ends with the row's first token after it.
            meanwhile += rows.latencies_ms(start, end + decode_ms / 1e3)
        longest_ms = (await client.stats()).longest_step_ns / 1e6
    alone_p50, alone_p99 = np.percentile(alone, (50, 99)).tolist()
    p50, p99, most = np.percentile(meanwhile, (50, 99, 100)).tolist()
    chunk_ms = max(0.0, longest_ms - decode_ms)
    return Latency(
        arriving_len=workload.arriving_len,
        alone_p50_ms=alone_p50,
        alone_p99_ms=alone_p99,
        meanwhile_p50_ms=p50,
        meanwhile_p99_ms=p99,
        meanwhile_max_ms=most,
        decode_step_ms=decode_ms,
        chunk_ms=chunk_ms,
        bound_ms=2 * decode_ms + chunk_ms,
        first_token_ms=float(np.mean(waits)),
    )


def disturbance(what: str, before: Stats, after: Stats) -> Disturbance:
    steps = after.steps - before.steps
    return Disturbance(
        what=what,
        steps=steps,
        hidden=(after.hidden_steps - before.hidden_steps) / max(1, steps),
        bubbles=after.bubbles - before.bubbles,
        bubble_ms=(after.bubble_ns - before.bubble_ns) / 1e6,
        longest_bubble_us=after.longest_bubble_ns / 1e3,
        longest_step_ms=after.longest_step_ns / 1e6,
        compilations=after.compilations - before.compilations,
    )


async def measure_burst(client: AsyncClient, workload: Workload) -> list[Disturbance]:
    """The device's bubbles while the rows decode alone, and through each kind of disturbance."""
    rng = np.random.default_rng(13)
    vocab = client.card.vocab_size
    pause = max(2, workload.output_len // 64)

    async def arrivals() -> None:
        prompts = rng.integers(1, vocab, (workload.arrivals, 16)).tolist()
        await asyncio.gather(*(client.generate(prompt, greedy(4)) for prompt in prompts))

    async def admission() -> None:
        for _ in range(REPEATS):
            await client.generate(rng.integers(1, vocab, workload.arriving_len).tolist(), greedy(1))

    async def collections() -> None:
        ballast = [[i] for i in range(1_000_000)]
        for _ in range(REPEATS):
            gc.collect()
            await asyncio.sleep(0)
        del ballast

    async with decoding_rows(client, workload) as rows:
        found: list[Disturbance] = []

        async def observe(what: str, happen: Callable[[], Awaitable[None]]) -> None:
            before = await client.stats(restart_longest=True)
            await happen()
            await rows.advance(pause)
            found.append(disturbance(what, before, await client.stats()))

        await observe("decode alone", lambda: rows.advance(workload.output_len // 8))
        await observe(f"{workload.arrivals} arrivals at once", arrivals)
        await observe(f"{REPEATS} prompts of {workload.arriving_len}", admission)
        await observe(f"{REPEATS} full collections in the client", collections)
    return found
