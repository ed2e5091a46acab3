"""Three frontends under load, one added, one removed by SIGTERM: what became of every request.

    python scripts/frontends_come_and_go.py [--seconds 6] [--streams 16] [--model DIR] [ENGINE FLAGS]

The engine has the fake executor unless `--model` names a folder. Each frontend is an `engine-frontend` on its own port
with `--streams` clients, which send the next request as soon as one is whole. Ends with 1 if a request failed that was
not sent to a closed port.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx

DEMO = Path(__file__).resolve().parents[1] / "models" / "demo"
FRONTEND = "from frontend.process import main; raise SystemExit(main())"
LIMIT_S = 60.0
TOKENS = 100


@dataclass
class Frontend:
    """One `engine-frontend`, and what its clients have seen."""

    process: subprocess.Popen[str]
    root: str
    whole: int = 0
    failures: list[str] = field(default_factory=list)
    refused: int = 0  # connections after it had closed its port
    leaving: bool = False

    async def load(self, client: httpx.AsyncClient, seed: int, stop: asyncio.Event) -> None:
        body = {"prompt": "the end", "max_tokens": TOKENS, "seed": seed, "stream": True, "ignore_eos": True}
        while not stop.is_set():
            try:
                answer = await client.post(f"{self.root}/v1/completions", json=body)
            except httpx.ConnectError as error:
                if self.leaving:
                    self.refused += 1
                    return
                self.failures.append(repr(error))
                return
            except httpx.HTTPError as error:
                self.failures.append(repr(error))
                return
            if answer.status_code == 200 and answer.text.endswith("data: [DONE]\n\n"):
                self.whole += 1
            else:
                self.failures.append(f"{answer.status_code} {answer.text[-200:]}")
                return


@contextlib.contextmanager
def process(command: list[str], **options: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A program and the first line that it prints; it is stopped in the end."""
    child = subprocess.Popen([sys.executable, "-P", *command], stdout=subprocess.PIPE, text=True, **options)  # type: ignore[call-overload]
    try:
        yield child, child.stdout.readline()
    finally:
        if child.poll() is None:
            child.send_signal(signal.SIGTERM)
            try:
                child.wait(LIMIT_S)
            except subprocess.TimeoutExpired:
                child.kill()


async def add(stack: contextlib.ExitStack, endpoint: str) -> Frontend:
    command = ["-c", FRONTEND, "--connect", endpoint, "--port", "0"]
    child, line = await asyncio.to_thread(stack.enter_context, process(command))
    found = re.search(r"http://\S+(?=/v1)", line)
    assert found, f"no address in {line!r}"
    async with httpx.AsyncClient() as client, asyncio.timeout(LIMIT_S):
        while (await client.get(f"{found.group()}/ready")).status_code != 200:
            await asyncio.sleep(0.05)
    return Frontend(child, found.group())


async def scene(endpoint: str, streams: int, seconds: float) -> list[tuple[str, Frontend]]:
    stop = asyncio.Event()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)  # a new connection for every request
    with contextlib.ExitStack() as stack:
        async with httpx.AsyncClient(timeout=LIMIT_S, limits=limits) as client, asyncio.TaskGroup() as group:

            def put_load_on(frontend: Frontend) -> None:
                for seed in range(streams):
                    group.create_task(frontend.load(client, seed, stop))

            first = [await add(stack, endpoint) for _ in range(3)]
            for frontend in first:
                put_load_on(frontend)
            await asyncio.sleep(seconds / 3)
            added = await add(stack, endpoint)
            put_load_on(added)
            await asyncio.sleep(seconds / 3)
            first[1].leaving = True
            first[1].process.send_signal(signal.SIGTERM)
            code = await asyncio.to_thread(first[1].process.wait, LIMIT_S)
            print(f"frontend 2 got SIGTERM under load and ended with code {code}", flush=True)
            await asyncio.sleep(seconds / 3)
            stop.set()
        return [("1", first[0]), ("2, removed", first[1]), ("3", first[2]), ("4, added", added)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--streams", type=int, default=16, help="of each frontend")
    parser.add_argument("--model", type=Path)
    args, flags = parser.parse_known_args()
    command = ["-m", "frontend.launch", str(args.model or DEMO), "--frontends", "0", *flags]
    command += [] if args.model else ["--fake-executor"]
    with process(command, env={"ENGINE_FAKE_STEP_US": "2000", **os.environ}) as (_, line):
        endpoint = re.search(r"ipc://\S+", line)
        assert endpoint, f"the engine did not start: {line!r}"
        found = asyncio.run(scene(endpoint.group(), args.streams, args.seconds))
    print(f"{'frontend':12} {'whole streams':>14} {'failed':>7} {'port closed':>12}")
    for name, frontend in found:
        print(f"{name:12} {frontend.whole:14} {len(frontend.failures):7} {frontend.refused:12}")
        for failure in frontend.failures[:3]:
            print(f"    {failure}")
    return int(any(frontend.failures for _, frontend in found))


if __name__ == "__main__":
    sys.exit(main())
