"""The clients of an engine under chaos: many streams at once, of which each is checked, and a tally of how they ended.

Used by `chaos.py`. Requests are greedy and seeded, with stop strings, log-probabilities and penalties, over HTTP
(streamed and whole) and over the Python client. Some clients hang up at a random byte, some join and leave.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import httpx
from chaos_engine import NOTICE_S, WATCHDOG_S, Engine, Faults, strike

from frontend import AsyncClient
from ipc.errors import TandemError

SETTLE_S = 180.0
AT_ONCE_S = 5.0  # what is refused sooner had not begun; later, a stream was cut that had waited for the engine
RESTART_S = 90.0  # so long after a fault the engine may still be on its way back


@dataclass(frozen=True)
class Case:
    """A request and the tokens it must produce; None: only their number is known."""

    prompt: list[int]
    sampling: dict[str, Any]
    tokens: list[int] | None
    text: str


class Chaos:
    """The streams, the faults, and the tally of how streams ended."""

    def __init__(self, engine: Engine, cases: list[Case], rng: random.Random, *, seconds: float, streams: int) -> None:
        self.engine, self.cases, self.rng = engine, cases, rng
        self.seconds, self.num_streams = seconds, streams
        self.faults, self.fault_rng = Faults(), random.Random(rng.random())  # the same faults for the same seed
        self.ends: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.tokens = 0
        self.longest_gap_s = 0.0
        self.looks = 0
        self.deadline_s = time.monotonic() + seconds
        self.http = httpx.AsyncClient(timeout=SETTLE_S, limits=httpx.Limits(max_connections=None))

    @property
    def running(self) -> bool:
        return time.monotonic() < self.deadline_s

    async def run(self) -> None:
        async with self.http, AsyncClient(self.engine.endpoint, name="chaos") as client:
            works = [self.stream(client) for _ in range(self.num_streams)]
            works += [
                strike(self.engine, self.faults, self.fault_rng, self.deadline_s),
                self.watch(),
                self.join_and_leave(),
            ]
            tasks = [asyncio.create_task(work) for work in works]
            done, late = await asyncio.wait(tasks, timeout=self.seconds + SETTLE_S)
            if late:
                self.wrong.append(f"{len(late)} streams did not end within {SETTLE_S:.0f} s after the last fault")
            for task in late:
                task.cancel()
            for task in done:
                task.result()
            await self.settle()

    async def stream(self, client: AsyncClient) -> None:
        """One stream after the other, until the time is over."""
        while self.running:
            case = self.rng.choice(self.cases)
            kind = self.rng.choice((self.over_http, self.over_http, self.whole, self.over_client))
            start_s = time.monotonic()
            try:
                self.ends[await kind(case, client)] += 1
            except TandemError as error:
                self.declare(error, start_s)
            except httpx.TransportError as error:
                if not self.faults.since("frontend", start_s - NOTICE_S):
                    self.wrong.append(f"a connection broke, but no frontend died: {error!r}")
                self.ends["connection of a dead frontend"] += 1
                await asyncio.sleep(0.1)

    def declare(self, error: TandemError, start_s: float) -> None:
        """A stream ended with a typed error; it must be one that the faults explain."""
        code = error.code
        if code == "request_crashed_executor":
            crashes = sum(self.faults.since(role, start_s - NOTICE_S) for role in ("executor", "replica"))
            explained = crashes >= 2
        else:
            gone = {role for role in self.faults.ended_s if self.faults.since(role, start_s - RESTART_S)}
            # A frontend that starts while the executor is away may not serve yet.
            explained = code == "unavailable" and bool(
                gone & {"scheduler", "replica"} or gone >= {"executor", "frontend"}
            )
        waited_s = time.monotonic() - start_s
        if not explained:
            self.wrong.append(f"error {code!r} ({error.message}) after {waited_s:.1f} s and {dict(self.faults.counts)}")
        self.ends[f"error {code}, {'at once' if waited_s < AT_ONCE_S else 'after waiting'}"] += 1

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
        self.tokens += len(tokens)
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
