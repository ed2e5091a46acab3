"""Kill, stop and desert a serving engine for a while, and check that no stream was lost or changed.

    python scripts/chaos.py --seconds 300 --seed 1                                   # demo model, CPU, float32
    python scripts/chaos.py --seconds 300 --seed 1 --device cuda --random-weights --model FOLDER

Real processes. Many streams at once, greedy and seeded, with stop strings and log-probabilities, over HTTP and over the
Python client; some clients hang up at a random byte, some clients join and leave. Every few seconds a random process of
the engine is killed, or stopped for a while, now and then for longer than the watchdog allows. Exits with 0 if

- every stream that its client kept open is what transformers says, or ended with an error that the fault explains;
- /debug/invariants held at every look, and nothing is owned at the end;
- file descriptors and threads are what they were, and nothing is left in /dev/shm once the launcher is killed.

With random weights there is no reference: streams must be complete. GPU memory must be free at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import httpx  # noqa: E402
import psutil  # noqa: E402

from frontend import AsyncClient  # noqa: E402
from ipc.errors import TandemError  # noqa: E402

WATCHDOG_S = 8.0
START_S, SETTLE_S, GONE_S = 300.0, 180.0, 5.0
ROLES = ("scheduler", "executor", "frontend")
# what happens, and how often relative to the others
FAULTS = {
    ("kill", "scheduler"): 4,
    ("kill", "executor"): 2,
    ("kill", "frontend"): 2,
    ("stop", "scheduler"): 2,
    ("stop", "executor"): 2,
    ("stop", "frontend"): 2,
    ("hang", "executor"): 1,
    ("hang", "scheduler"): 1,
}


@dataclass(frozen=True)
class Case:
    """A request and the tokens it must produce; None: only their number is known."""

    prompt: list[int]
    sampling: dict[str, Any]
    tokens: list[int] | None
    text: str


@dataclass
class Faults:
    """How often each fault has struck, by kind and role: what may excuse a stream that failed."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)

    def of(self, role: str) -> int:
        return sum(n for (_, hit), n in self.counts.items() if hit == role)


class Engine:
    """`engine-launch` in a temporary folder of its own, with what it prints to stderr in a file."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.log = folder / "stderr"
        flags = ["--device", args.device, "--frontends", "2", "--port", "0", "--max-restarts", "100000"]
        flags += ["--watchdog-timeout", str(WATCHDOG_S), "--enable-debug-endpoints"]
        flags += ["--random-weights"] if args.random_weights else []
        flags += ["--dtype", "float32"] if args.device == "cpu" else []
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "frontend.launch", "--model", str(args.model), *flags],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=ROOT,
                env={**os.environ, "TMPDIR": str(folder)},
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        url, endpoint = re.search(r"http://\S+/v1", line), re.search(r"ipc://\S+\.sock", line)
        if url is None or endpoint is None:
            sys.exit(f"the engine did not start: {line!r}\n{self.log.read_text()}")
        self.url, self.endpoint = url.group(), endpoint.group()

    @property
    def root(self) -> str:
        return self.url.removesuffix("/v1")

    def processes(self) -> list[tuple[str, psutil.Process]]:
        """(role, process) of the launcher and its children that are alive."""
        found = [("launcher", psutil.Process(self.process.pid))]
        for child in found[0][1].children():
            try:
                if match := re.search(r"engine-launch: (\w+)", " ".join(child.cmdline())):
                    found.append((match[1], child))
            except psutil.Error:
                continue  # it ended just now
        return found

    def resources(self) -> dict[str, tuple[int, int]]:
        """role -> (fds, threads), the most of any process of the role."""
        seen: dict[str, tuple[int, int]] = {}
        for role, process in self.processes():
            fds, threads = seen.get(role, (0, 0))
            seen[role] = max(fds, process.num_fds()), max(threads, process.num_threads())
        return seen

    def pauses_s(self) -> dict[str, list[float]]:
        """What the launcher says about each recovery: from the end of a process until the engine serves."""
        found: dict[str, list[float]] = {}
        for role, pause in re.findall(r"(\w+) restarted, .* after ([\d.]+) s", self.log.read_text()):
            found.setdefault(role, []).append(float(pause))
        return found


class Chaos:
    """The streams, the faults, and the tally of how streams ended."""

    def __init__(self, args: argparse.Namespace, engine: Engine, cases: list[Case], rng: random.Random) -> None:
        self.args, self.engine, self.cases, self.rng = args, engine, cases, rng
        self.faults = Faults()
        self.ends: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.longest_gap_s = 0.0
        self.looks = 0
        self.deadline = time.monotonic() + args.seconds
        self.http = httpx.AsyncClient(timeout=SETTLE_S, limits=httpx.Limits(max_connections=None))

    @property
    def running(self) -> bool:
        return time.monotonic() < self.deadline

    async def run(self) -> None:
        async with self.http, AsyncClient(self.engine.endpoint, name="chaos") as client:
            streams = [asyncio.create_task(self.stream(client)) for _ in range(self.args.streams)]
            others = [asyncio.create_task(work()) for work in (self.strike, self.watch, self.join_and_leave)]
            done, late = await asyncio.wait([*streams, *others], timeout=self.args.seconds + SETTLE_S)
            if late:
                self.wrong.append(f"{len(late)} streams did not end within {SETTLE_S:.0f} s after the last fault")
            for task in late:
                task.cancel()
            for task in done:
                task.result()
            await self.settle()

    # -- streams

    async def stream(self, client: AsyncClient) -> None:
        """One stream after the other, until the time is over."""
        while self.running:
            case = self.rng.choice(self.cases)
            kind = self.rng.choice((self.over_http, self.over_http, self.whole, self.over_client))
            before = Counter(self.faults.counts)
            try:
                self.ends[await kind(case, client)] += 1
            except TandemError as error:
                self.declare(error.code, before)
            except httpx.TransportError as error:
                if self.faults.of("frontend") == sum(n for (_, role), n in before.items() if role == "frontend"):
                    self.wrong.append(f"a connection broke, but no frontend died: {error!r}")
                self.ends["connection of a dead frontend"] += 1
                await asyncio.sleep(0.1)

    def declare(self, code: str, before: Counter[tuple[str, str]]) -> None:
        """A stream ended with a typed error; it must be one that the faults since it began explain."""
        since = self.faults.counts - before
        executor = sum(n for (_, role), n in since.items() if role == "executor")
        if code == "request_crashed_executor":
            explained = executor >= 2
        else:
            explained = code in ("unavailable", "timeout") and bool(self.faults.counts)
        if not explained:
            self.wrong.append(f"error {code!r} after {dict(since)}")
        self.ends[f"error {code}"] += 1

    def body(self, case: Case) -> tuple[dict[str, Any], str, str | None]:
        """(request, expected text, expected stop string)."""
        body = {"prompt": case.prompt, "return_token_ids": True, **case.sampling}
        text, stop = case.text, None
        if case.tokens is not None and len(text) > 12 and "min_tokens" not in case.sampling and self.rng.random() < 0.3:
            at = self.rng.randrange(4, len(text) - 4)
            stop = text[at : at + self.rng.randint(2, 4)]
            body["stop"], text = [stop], text[: text.index(stop)]
        if self.rng.random() < 0.3:
            body["logprobs"] = 2
        return body, text, stop

    def check(self, case: Case, stop: str | None, expected: str, text: str, tokens: list[int], finish: str) -> str:
        if case.tokens is None:
            good = len(tokens) == case.sampling["max_tokens"] and finish == "length"
        elif stop is not None:
            good = text == expected and finish == "stop" and tokens == case.tokens[: len(tokens)]
        else:
            good = text == expected and tokens == case.tokens
        if not good:
            self.wrong.append(f"{finish}: got {tokens} {text!r}, expected {case.tokens} {expected!r}")
        return "complete"

    async def over_http(self, case: Case, _: AsyncClient) -> str:
        body, expected, stop = self.body(case)
        leave_at = self.rng.randrange(4000) if self.rng.random() < 0.15 else None
        text, tokens, finish, last, read = "", list[int](), "", time.monotonic(), 0
        async with self.http.stream("POST", f"{self.engine.url}/completions", json={**body, "stream": True}) as answer:
            if answer.status_code != 200:
                raise await refused(answer)
            async for line in answer.aiter_lines():
                read += len(line)
                if leave_at is not None and read > leave_at:
                    return "client left"
                if not line.startswith("data: {"):
                    continue
                now, event = time.monotonic(), json.loads(line[6:])
                self.longest_gap_s, last = max(self.longest_gap_s, now - last), now
                if "error" in event:
                    assert not finish, "an error after the end"
                    raise declared(event["error"])
                for choice in event["choices"]:
                    text += choice["text"]
                    tokens += choice.get("token_ids") or []
                    finish = choice["finish_reason"] or finish
            if line != "data: [DONE]" and not line == "":
                raise httpx.RemoteProtocolError("a stream without [DONE]")
        if not finish:
            raise httpx.RemoteProtocolError("a stream without an end")
        return self.check(case, stop, expected, text, tokens, finish)

    async def whole(self, case: Case, _: AsyncClient) -> str:
        body, expected, stop = self.body(case)
        answer = await self.http.post(f"{self.engine.url}/completions", json=body)
        if answer.status_code != 200:
            raise await refused(answer)
        (choice,), usage = answer.json()["choices"], answer.json()["usage"]
        if usage["completion_tokens"] != len(choice["token_ids"]) or usage["prompt_tokens"] != len(case.prompt):
            self.wrong.append(f"usage {usage} of {len(choice['token_ids'])} tokens")
        return self.check(case, stop, expected, choice["text"], choice["token_ids"], choice["finish_reason"])

    async def over_client(self, case: Case, client: AsyncClient) -> str:
        if not client.ready:
            await asyncio.sleep(0.05)
            return "client waited for the scheduler"
        options, tokens, text, finish = dict(case.sampling), list[int](), "", ""
        if self.rng.random() < 0.3:
            options["logprobs"] = 2
        async with aclosing(client.stream(case.prompt, **options)) as chunks:
            async for chunk in chunks:
                tokens += chunk.token_ids
                text += chunk.text
                finish = chunk.finish_reason or finish
                if "logprobs" in options and len(chunk.logprobs or ()) != len(chunk.token_ids):
                    self.wrong.append(f"{len(chunk.logprobs or ())} logprobs of {len(chunk.token_ids)} tokens")
        return self.check(case, None, case.text, text, tokens, finish)

    async def join_and_leave(self) -> None:
        """Clients that come, ask, and go without waiting for the answer."""
        while self.running:
            try:
                async with asyncio.timeout(30), AsyncClient(self.engine.endpoint, name="guest") as guest:
                    asked = [asyncio.create_task(guest.generate(c.prompt, **c.sampling)) for c in self.cases[:4]]
                    await asyncio.sleep(self.rng.uniform(0.05, 0.5))
                await asyncio.gather(*asked, return_exceptions=True)
                self.ends["guest"] += 1
            except (TandemError, TimeoutError):
                self.ends["guest not welcome"] += 1
            await asyncio.sleep(self.rng.uniform(0.5, 2))

    # -- faults

    async def strike(self) -> None:
        while self.running:
            await asyncio.sleep(self.rng.uniform(1.0, 5.0))
            what, role = self.rng.choices(list(FAULTS), list(FAULTS.values()))[0]
            alive = [process for name, process in self.engine.processes() if name == role]
            if not alive or not self.running:
                continue
            victim = self.rng.choice(alive)
            self.faults.counts[what, role] += 1
            try:
                if what == "kill":
                    victim.kill()
                    continue
                victim.suspend()
                # A hang ends when the launcher has noticed it; a stop is shorter than that.
                await asyncio.sleep(WATCHDOG_S + 3 if what == "hang" else self.rng.uniform(0.2, 2.0))
                victim.resume()
            except psutil.NoSuchProcess:
                continue

    async def watch(self) -> None:
        """The scheduler's books must balance at any time."""
        while self.running:
            await asyncio.sleep(0.5)
            try:
                answer = await self.http.get(f"{self.engine.root}/debug/invariants", timeout=WATCHDOG_S)
            except httpx.HTTPError:
                continue  # this frontend died
            if answer.status_code == 200:
                self.looks += 1
            elif answer.status_code != 503:
                self.wrong.append(f"invariants: {answer.text}")

    async def settle(self) -> None:
        """Wait until nothing is open, and see that nothing is owned."""
        limit, found = time.monotonic() + SETTLE_S, ""
        while time.monotonic() < limit:
            try:
                answer = await self.http.get(f"{self.engine.root}/debug/invariants")
                found = answer.text
                numbers = answer.json() if answer.status_code == 200 else {}
                if numbers.get("requests") == 0 and numbers["plans_in_flight"] == 0 and numbers["blocks_total"]:
                    assert numbers["blocks_free"] == numbers["blocks_total"], found
                    assert numbers["slots_free"] == numbers["slots_total"], found
                    return
            except httpx.HTTPError:
                pass
            await asyncio.sleep(0.2)
        self.wrong.append(f"the engine did not come to rest: {found}")


async def refused(answer: httpx.Response) -> TandemError:
    await answer.aread()
    return declared(answer.json()["error"])


def declared(error: dict[str, Any]) -> TandemError:
    """The error object of the API as an exception."""
    found = TandemError(error["message"])
    found.code = error["code"]  # type: ignore[misc]
    return found


def make_cases(args: argparse.Namespace) -> list[Case]:
    if args.random_weights:
        rng = random.Random(args.seed)
        sampling = {"max_tokens": args.max_tokens, "temperature": 0.7, "ignore_eos": True}
        prompts = [[rng.randrange(1000) for _ in range(rng.randint(1, 200))] for _ in range(args.cases)]
        return [Case(prompt, {**sampling, "seed": i}, None, "") for i, prompt in enumerate(prompts)]
    from transformers import AutoTokenizer

    from tests.e2e.reference import greedy_cases, sampled_cases

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    half = args.cases // 2
    made = greedy_cases(half, 120, args.max_tokens) + sampled_cases(half, 120, args.max_tokens)
    return [
        Case(
            list(case.prompt),
            {"max_tokens": case.max_tokens, **case.sampling},
            list(case.output),
            tokenizer.decode(case.output, skip_special_tokens=True),
        )
        for case in made
    ]


def gpu_memory_mib() -> int:
    shown = subprocess.run(
        ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"], capture_output=True, text=True
    )
    return sum(map(int, shown.stdout.split()))


def end(engine: Engine, wrong: list[str], shared_memory: set[str], gpu_mib: int) -> None:
    """Kill the launcher, and look for what is left."""
    children = [process for _, process in engine.processes()][1:]
    engine.process.send_signal(signal.SIGKILL)
    start = time.monotonic()
    _, alive = psutil.wait_procs(children, timeout=GONE_S)
    engine.process.wait()
    print(f"launcher killed: {len(children)} processes gone after {time.monotonic() - start:.2f} s")
    wrong += [f"still alive {GONE_S:.0f} s after the launcher was killed: {process}" for process in alive]
    if left := {name for name in os.listdir("/dev/shm") if "tandem" in name} - shared_memory:
        wrong.append(f"left in /dev/shm: {left}")
    if gpu_mib >= 0:
        time.sleep(1)
        print(f"GPU memory: {gpu_mib} MiB before, {gpu_memory_mib()} MiB after")
        if gpu_memory_mib() > gpu_mib + 64:
            wrong.append("GPU memory is still held")


def report(chaos: Chaos, engine: Engine, before: dict[str, tuple[int, int]]) -> None:
    print("faults: " + ", ".join(f"{what} {role} {n}" for (what, role), n in sorted(chaos.faults.counts.items())))
    print("streams: " + ", ".join(f"{end} {n}" for end, n in chaos.ends.most_common()))
    print(f"invariants held at {chaos.looks} looks; longest pause of a stream {chaos.longest_gap_s:.1f} s")
    for role, pauses in engine.pauses_s().items():
        print(
            f"{role} recovered {len(pauses)} times: median {statistics.median(pauses):.2f} s, max {max(pauses):.2f} s"
        )
    after = engine.resources()
    for role, (fds, threads) in before.items():
        print(f"{role}: {fds} -> {after[role][0]} fds, {threads} -> {after[role][1]} threads")
        if after[role][0] > fds + 4 or after[role][1] > threads + 2:
            chaos.wrong.append(f"{role} leaks: {(fds, threads)} -> {after[role]} fds and threads")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--streams", type=int, default=200, help="at once")
    parser.add_argument("--cases", type=int, default=40, help="different requests")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "demo")
    parser.add_argument("--random-weights", action="store_true")
    args = parser.parse_args()
    shared_memory, gpu_mib = set(os.listdir("/dev/shm")), gpu_memory_mib() if args.device == "cuda" else -1
    cases = make_cases(args)
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine(args, Path(folder))
        try:
            asyncio.run(warm_up(engine, cases[0]))
            before = engine.resources()
            chaos = Chaos(args, engine, cases, random.Random(args.seed))
            asyncio.run(chaos.run())
            report(chaos, engine, before)
            end(engine, chaos.wrong, shared_memory, gpu_mib)
        finally:
            if engine.process.poll() is None:
                engine.process.kill()
            if sys.exc_info()[0] is not None:
                print(engine.log.read_text()[-5000:], file=sys.stderr)
    for text in chaos.wrong[:20]:
        print(f"WRONG: {text[:1000]}")
    print(f"seed {args.seed}: {len(chaos.wrong)} wrong")
    return 1 if chaos.wrong or not chaos.ends["complete"] else 0


async def warm_up(engine: Engine, case: Case) -> None:
    async with httpx.AsyncClient(timeout=START_S) as http:
        body = {"prompt": case.prompt, **case.sampling}
        for _ in range(4):  # both frontends, probably
            (await http.post(f"{engine.url}/completions", json=body)).raise_for_status()


if __name__ == "__main__":
    sys.exit(main())
