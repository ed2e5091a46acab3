"""Speed of the serving path: HTTP in, server-sent events out, with everything but the model.

    python scripts/bench_frontend.py                       # all parts, 1 and 2 frontends
    python scripts/bench_frontend.py --parts stream --frontends 1 --step-us 10000

stream    the whole engine with the fake executor: 256 streams; tokens per second of wall time, and per second of CPU
          that each frontend process used. At --step-us 0 tokens come faster than they can leave and are coalesced;
          the paced run sends one event a token.
requests  the same engine: requests a second at 8-token outputs, streamed and not, 64 connections kept alive.
latency   this script plays the scheduler: HTTP request sent -> Admit received; Tokens frame sent -> its
          events written by the frontend, and read by the client. One frame every 20 ms to all streams at once. Client
          and scheduler are one process.
memory    this script plays the scheduler: resident memory of a frontend with 0, 1,000, 10,000 and again 10,000 streams
          open, at their start and 40 tokens later. Needs `ulimit -n 25000`.

The load generator and the engine share the machine, so CPU seconds of a process are the number to compare.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import psutil
import uvloop
from played_scheduler import DEMO, PlayedScheduler, played

from ipc.schema import FinishReason

PROMPT = "Return the number of items that are in the list"
LATENCY_STEP_S = 0.02
EVENT = b"data: "


class Connection(asyncio.Protocol):
    """One keep-alive connection: counts events as they arrive, and knows when a response is complete."""

    def __init__(self) -> None:
        self.events = 0
        self.bytes = 0
        self.first_ns = 0
        self.stamps: list[int] | None = None  # arrival of each event, if somebody wants them
        self.tail = b""
        self.done: asyncio.Future[None]
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def send(self, body: bytes) -> asyncio.Future[None]:
        """Post `body`; the future is done when the whole response is here."""
        self.done = asyncio.get_running_loop().create_future()
        self.first_ns = 0
        head = (
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        )
        self.transport.write(head % len(body) + body)
        return self.done

    def data_received(self, data: bytes) -> None:
        if not self.first_ns:
            self.first_ns = time.monotonic_ns()
            if not data.startswith(b"HTTP/1.1 200"):
                self.done.set_exception(RuntimeError(data.decode(errors="replace")))
                return
        count = data.count(EVENT)
        self.events += count
        self.bytes += len(data)
        if self.stamps is not None:
            self.stamps.extend([time.monotonic_ns()] * count)
        # A stream ends with an empty chunk, a whole answer with its JSON.
        self.tail = (self.tail + data)[-6:]
        if (self.tail.endswith(b"\n0\r\n\r\n") or self.tail.endswith(b"}}}")) and not self.done.done():
            self.done.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(error or ConnectionError("closed by the server"))


async def connect(port: int) -> Connection:
    _, connection = await asyncio.get_running_loop().create_connection(Connection, "127.0.0.1", port)
    return connection


def body(max_tokens: int, *, stream: bool) -> bytes:
    fields = {"prompt": PROMPT, "max_tokens": max_tokens, "ignore_eos": True, "seed": 300, "stream": stream}
    return json.dumps(fields).encode()


@dataclass
class Cpu:
    """CPU seconds of processes between two moments."""

    processes: list[psutil.Process]
    start: list[float] = field(default_factory=list)

    def __enter__(self) -> Cpu:
        self.start = [self._now(p) for p in self.processes]
        return self

    def __exit__(self, *_: object) -> None:
        self.used = [self._now(p) - before for p, before in zip(self.processes, self.start, strict=True)]

    @staticmethod
    def _now(process: psutil.Process) -> float:
        times = process.cpu_times()
        return times.user + times.system


@contextlib.contextmanager
def engine(frontends: int, step_us: int) -> Iterator[tuple[int, dict[str, list[psutil.Process]]]]:
    """(HTTP port, processes by role) of an engine with the fake executor."""
    command = [sys.executable, "-P", "-m", "frontend.launch", str(DEMO), "--port", "0", "--fake-executor"]
    command += ["--frontends", str(frontends)]
    environment = {**os.environ, "ENGINE_FAKE_STEP_US": str(step_us)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = re.search(r"http://[^:]+:(\d+)", line)
            if not found:
                raise SystemExit(f"the engine did not start: {line!r}")
            roles: dict[str, list[psutil.Process]] = {}
            for child in psutil.Process(process.pid).children():
                role = re.search(r"engine-launch: (\w+)", " ".join(child.cmdline()))
                roles.setdefault(role.group(1) if role else "?", []).append(child)
            yield int(found.group(1)), roles
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)


async def bench_stream(frontends: int, streams: int, tokens: int, step_us: int) -> None:
    with engine(frontends, step_us) as (port, roles):
        everyone = [p for role in ("frontend", "scheduler", "executor") for p in roles[role]]
        connections = [await connect(port) for _ in range(streams)]
        await asyncio.gather(*(c.send(body(4, stream=True)) for c in connections))
        before = sum(c.events for c in connections)
        start = time.perf_counter()
        with Cpu(everyone) as cpu:
            await asyncio.gather(*(c.send(body(tokens, stream=True)) for c in connections))
        wall_s = time.perf_counter() - start
        events = sum(c.events for c in connections) - before - streams  # less [DONE]
        for c in connections:
            c.transport.close()
    total, serving = streams * tokens, cpu.used[:frontends]
    print(
        f"stream    N={frontends} step {step_us:>5} us: {total / wall_s:8.0f} tok/s wall, "
        f"{total / sum(serving):8.0f} tok/s per frontend CPU s, {sum(serving) / events * 1e6:6.1f} us/event, "
        f"{total / events:5.2f} tok/event; CPU s: frontends {'+'.join(f'{s:.1f}' for s in serving)}, "
        f"scheduler {cpu.used[frontends]:.1f}, executor {cpu.used[frontends + 1]:.1f}, wall {wall_s:.1f}",
        flush=True,
    )


async def bench_requests(frontends: int, connections: int, seconds: float) -> None:
    with engine(frontends, 0) as (port, roles):
        for stream in (False, True):
            opened = [await connect(port) for _ in range(connections)]
            payload, deadline = body(8, stream=stream), time.perf_counter() + seconds

            async def repeat(connection: Connection, payload: bytes, deadline: float) -> list[float]:
                took = []
                while (start := time.perf_counter()) < deadline:
                    await connection.send(payload)
                    took.append(time.perf_counter() - start)
                return took

            start = time.perf_counter()
            with Cpu(roles["frontend"]) as cpu:
                answers = await asyncio.gather(*(repeat(c, payload, deadline) for c in opened))
            took = [second for each in answers for second in each]
            wall_s = time.perf_counter() - start
            for c in opened:
                c.transport.close()
            print(
                f"requests  N={frontends} {'streamed' if stream else 'whole   '}: "
                f"{len(took) / wall_s:6.0f} req/s wall, "
                f"{len(took) / sum(cpu.used):6.0f} per frontend CPU s; latency ms p50 "
                f"{np.percentile(took, 50) * 1e3:.1f} p99 {np.percentile(took, 99) * 1e3:.1f}",
                flush=True,
            )


def percentiles(values: list[int]) -> str:
    return " ".join(f"p{q} {np.percentile(values, q) / 1e6:.2f}" for q in (50, 99))


async def bench_latency(frontends: int, streams: int, ticks: int) -> None:
    async with played(frontends) as (scheduler, ports, processes):
        connections = [await connect(ports[i % frontends]) for i in range(streams)]
        admission: list[int] = []
        for connection in [*connections[:8], *connections]:  # the first ones warm up
            scheduler.admitted_ns.clear()
            start = time.monotonic_ns()
            finished = connection.send(body(1000, stream=True))
            while not scheduler.admitted_ns:
                await asyncio.sleep(0)
            admission.append(scheduler.admitted_ns[0] - start)
            if len(admission) <= 8:
                scheduler.tick(FinishReason.LENGTH)
                await finished
        scheduler.tick()  # a stream begins with its first token, which costs more than the others
        while min(c.events for c in connections) < 1:
            await asyncio.sleep(0.01)
        for connection in connections:
            connection.stamps = []
        sent = []
        with Cpu(processes) as cpu:
            for _ in range(ticks):
                sent.append(scheduler.tick())
                await asyncio.sleep(LATENCY_STEP_S)
        found = [c.stamps for c in connections if c.stamps is not None and len(c.stamps) == ticks]
        assert found, "every stream found several tokens in one event: overloaded"
        delays = [a - s for stamps in found for a, s in zip(stamps, sent, strict=True)]
        scheduler.tick(FinishReason.LENGTH)
        await asyncio.gather(*(c.done for c in connections))
        for c in connections:
            c.transport.close()
    # What was written between one frame and the next belongs to the first.
    frame = np.searchsorted(sent, scheduler.written_ns) - 1
    inside = (frame >= 0) & (scheduler.written_ns < sent[-1] + LATENCY_STEP_S * 1e9)
    written = (scheduler.written_ns[inside] - np.array(sent)[frame[inside]]).tolist()
    print(
        f"latency   N={frontends} {streams:>4} streams, {streams / LATENCY_STEP_S:.0f} tok/s: HTTP in -> admitted ms "
        f"{percentiles(admission[8:])}; token -> chunk out {percentiles(written)}, -> read by the client "
        f"{percentiles(delays)} ({len(written) / ticks / streams:.2f} events a token); "
        f"frontend CPU {sum(cpu.used) / ticks / streams * 1e6:.1f} us/event",
        flush=True,
    )


async def bench_memory(counts: list[int]) -> None:
    async with played(1) as (scheduler, (port,), (process,)):
        told = [f"idle {_mib(process)}"]
        idle = process.memory_info().rss
        for count in counts:
            connections = []
            while len(connections) < count:
                batch = [await connect(port) for _ in range(min(200, count - len(connections)))]
                for connection in batch:
                    connection.send(body(1000, stream=True))
                connections += batch
                while sum(map(len, scheduler.open.values())) < len(connections):
                    await asyncio.sleep(0.01)
            await stream_to(connections, scheduler, 4)
            told.append(f"{count:,} streams {_mib(process)}")
            each = (process.memory_info().rss - idle) / count / 1024
            await stream_to(connections, scheduler, 40)
            told.append(f"after 40 more tokens each {_mib(process)}")
            scheduler.tick(FinishReason.LENGTH)
            await asyncio.gather(*(c.done for c in connections))
            for c in connections:
                c.transport.close()
            await asyncio.sleep(1)
        told.append(f"all closed {_mib(process)}")
    print(f"memory    N=1: {', '.join(told)}; {each:.1f} KiB a stream", flush=True)


def _mib(process: psutil.Process) -> str:
    return f"{process.memory_info().rss / 2**20:.0f} MiB"


async def stream_to(connections: list[Connection], scheduler: PlayedScheduler, tokens: int) -> None:
    """One token after the other, each to all streams."""
    for _ in range(tokens):
        before = [c.events for c in connections]
        scheduler.tick()
        while any(c.events == seen for c, seen in zip(connections, before, strict=True)):
            await asyncio.sleep(0.05)


async def run(args: argparse.Namespace) -> None:
    for frontends in args.frontends:
        if "stream" in args.parts:
            for step_us in args.step_us:
                await bench_stream(frontends, args.streams, args.tokens, step_us)
        if "requests" in args.parts:
            await bench_requests(frontends, 64, args.seconds)
        if "latency" in args.parts:
            for streams in (32, 128, args.streams):
                await bench_latency(frontends, streams, args.ticks)
    if "memory" in args.parts:
        await bench_memory([1000, 10_000, 10_000])


VLLM = """vLLM's design (docs/design/arch_overview, pull request 17546): API server processes do text and
HTTP; one by default, more with --api-server-count, all on the head node; ZMQ between each of them and each engine core.
Benchmarks of the whole service are published there, tokens per second or latency of an API server alone are not."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=lambda s: s.split(","), default=["stream", "requests", "latency", "memory"])
    parser.add_argument("--frontends", type=lambda s: [int(n) for n in s.split(",")], default=[1, 2])
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=400, help="of each stream")
    parser.add_argument("--step-us", type=lambda s: [int(n) for n in s.split(",")], default=[0, 20_000])
    parser.add_argument("--seconds", type=float, default=5.0, help="of the requests part")
    parser.add_argument("--ticks", type=int, default=100, help="of the latency part")
    uvloop.run(run(parser.parse_args()))
    print(VLLM)


if __name__ == "__main__":
    main()
