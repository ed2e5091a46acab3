"""Sending the load and taking times: one aiohttp session, one task a request, nothing computed while it runs.

In an open loop requests leave when they are due, whether or not the server keeps up; in a closed loop a fixed number of
users each wait for their answer. A failed request is a result like any other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import aiohttp
import msgspec

from frontend.bench.workloads import Ask
from ipc.clock import now_s

_DATA: Final = b"data: "
_DONE: Final = b"[DONE]"
_SAID: Final = ("content", "reasoning_content", "reasoning", "tool_calls")  # of a delta


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: dict[str, Any] | None = None

    @property
    def says_something(self) -> bool:
        return bool(self.text or (self.delta and any(map(self.delta.get, _SAID))))


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: dict[str, Any] | None = None


_decode: Final = msgspec.json.Decoder(_Event).decode


@dataclass(slots=True)
class Answer:
    """What one request brought. Times in seconds of one monotonic clock."""

    due_s: float  # when it should have left
    sent_s: float = 0.0
    text_s: list[float] = field(default_factory=list)  # arrival of each event with text
    end_s: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0  # as the server counts
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go and what they all say."""

    url: str  # of the API, such as http://127.0.0.1:8000/v1
    model: str
    api_key: str | None
    chat: bool
    extra: dict[str, Any]

    @property
    def path(self) -> str:
        return self.url + ("/chat/completions" if self.chat else "/completions")

    def body(self, ask: Ask) -> bytes:
        content = {"messages": [{"role": "user", "content": ask.prompt}]} if self.chat else {"prompt": ask.prompt}
        fields = {"model": self.model, "max_tokens": ask.max_tokens, "stream": True, "temperature": 0.0}
        return msgspec.json.encode({**fields, **content, "stream_options": {"include_usage": True}, **self.extra})


async def ask_once(session: aiohttp.ClientSession, target: Target, ask: Ask, due_s: float) -> Answer:
    """Send one request and read its stream to the end; never raises for what the server does."""
    answer = Answer(due_s)
    body = target.body(ask)
    answer.sent_s = now_s()
    try:
        async with session.post(target.path, data=body) as response:
            if response.status != 200:
                answer.error = f"HTTP {response.status}: {(await response.text())[:200]}"
            else:
                await _read(response, answer)
    except (aiohttp.ClientError, OSError, TimeoutError, msgspec.DecodeError) as error:
        answer.error = f"{type(error).__name__}: {error}"
    answer.end_s = now_s()
    return answer


async def _read(response: aiohttp.ClientResponse, answer: Answer) -> None:
    async for line in response.content:
        if not line.startswith(_DATA):
            continue
        data = line[len(_DATA) :].strip()
        if data == _DONE:
            return
        event = _decode(data)
        if event.error is not None:
            answer.error = str(event.error.get("message", event.error))
            return
        if any(choice.says_something for choice in event.choices):
            answer.text_s.append(now_s())
        if event.usage is not None:
            answer.prompt_tokens, answer.output_tokens = event.usage.prompt_tokens, event.usage.completion_tokens
    answer.error = "the stream ended without [DONE]"


def open_session(target: Target, timeout_s: float) -> aiohttp.ClientSession:
    """As many connections as there are requests: the load decides, not the client."""
    headers = {"Content-Type": "application/json"}
    if target.api_key:
        headers["Authorization"] = f"Bearer {target.api_key}"
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, ttl_dns_cache=300),
        timeout=aiohttp.ClientTimeout(total=timeout_s),
        headers=headers,
        read_bufsize=1 << 20,
    )


async def run_load(
    target: Target,
    asks: Sequence[Ask],
    *,
    concurrency: int | None,
    timeout_s: float,
    on_answer: Callable[[Answer], None],
) -> tuple[list[Answer], float]:
    """Send all of `asks`; returns their answers and the seconds it took.

    `concurrency`: users of a closed loop. None: an open loop by `at_s`.
    """
    async with open_session(target, timeout_s) as session:
        start_s = now_s()
        if concurrency is None:
            answers = await asyncio.gather(*(_at_its_time(session, target, ask, start_s, on_answer) for ask in asks))
        else:
            waiting, answers = iter(asks), []

            async def user() -> None:
                for ask in waiting:
                    answers.append(await ask_once(session, target, ask, now_s()))
                    on_answer(answers[-1])

            await asyncio.gather(*(user() for _ in range(concurrency)))
        return list(answers), now_s() - start_s


async def _at_its_time(
    session: aiohttp.ClientSession, target: Target, ask: Ask, start_s: float, on_answer: Callable[[Answer], None]
) -> Answer:
    due_s = start_s + ask.at_s
    await asyncio.sleep(max(0.0, due_s - now_s()))
    answer = await ask_once(session, target, ask, due_s)
    on_answer(answer)
    return answer
