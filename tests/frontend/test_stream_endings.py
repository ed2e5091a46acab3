"""What an HTTP stream sends as it goes, fails or is left, of scripted chunks and without an engine."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from frontend.jobs import EventStream, Job, run_whole
from frontend.openai import CompletionRequest, StreamOptions
from frontend.request import Chunk, GenerateParams
from frontend.shapes import CompletionShape
from ipc.errors import UnavailableError
from tests.frontend.test_server import WAIT_S, events


class _Source:
    """These chunks, one at a time; an exception among them is raised."""

    def __init__(self, *parts: Chunk | Exception) -> None:
        self._parts = list(parts)
        self.closed = False

    async def chunks(self) -> list[Chunk]:
        part = self._parts.pop(0) if self._parts else None
        if isinstance(part, Exception):
            raise part
        return [part] if part else []

    def close(self) -> None:
        self.closed = True


def _chunks_then(error: Exception | None) -> _Source:
    """Two chunks, with `error` between them if there is one."""
    return _Source(Chunk(0, "b", (2,), None, None, None, 0), error or Chunk(0, "c", (3,), "stop", None, None, 0))


def _job(*prompts: list[int], n: int = 1) -> Job:
    request = CompletionRequest(prompt="x", stream=True, stream_options=StreamOptions(include_usage=n > 1))
    shape = CompletionShape(
        request,
        response_id="cmpl-1",
        created=1,
        model="m",
        prompts=prompts,
        echoes=None,
        token_bytes=lambda _, text: text.encode(),
    )
    return Job(prompts, GenerateParams(n=n), shape)


def _run_stream(source: _Source, *, job: Job | None = None, leave: bool = False) -> tuple[str, bool]:
    """What is sent for "a" and then `source`, and whether `source` was closed."""
    job = job or _job([1])
    sent: list[dict[str, Any]] = []

    async def main() -> None:
        async def receive() -> Any:
            if not leave:
                await asyncio.Event().wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)
            await asyncio.sleep(0)

        await EventStream(job, [Chunk(0, "a", (1,), None, None, None, 0)], source)({}, receive, send)  # type: ignore[typeddict-item]

    asyncio.run(asyncio.wait_for(main(), WAIT_S))
    assert sent[0]["status"] == 200
    body = b"".join(message["body"] for message in sent[1:]).decode()
    assert leave or [message["more_body"] for message in sent[1:]][-1] is False
    return body, source.closed


def test_a_whole_stream_ends_with_done() -> None:
    body, closed = _run_stream(_chunks_then(None))
    parts = events(body)
    assert [part["choices"][0]["text"] for part in parts[:-1]] == ["a", "b", "c"]
    assert parts[-1] == "[DONE]"
    assert closed


@pytest.mark.parametrize(
    ("error", "message", "code"),
    [
        (UnavailableError("gone"), "gone", "unavailable"),
        (ZeroDivisionError("secret"), "internal error", "internal_error"),
    ],
)
def test_a_failure_after_200_is_an_error_event_without_finish_or_done(
    error: Exception, message: str, code: str
) -> None:
    body, closed = _run_stream(_chunks_then(error))
    *parts, last = events(body)
    assert [part["choices"][0]["finish_reason"] for part in parts] == [None, None]
    assert (last["error"]["message"], last["error"]["code"]) == (message, code)
    assert "DONE" not in body
    assert closed


def test_a_client_that_leaves_closes_the_source() -> None:
    body, closed = _run_stream(_chunks_then(None), leave=True)
    assert "DONE" not in body
    assert closed


def test_a_stream_reports_the_cached_tokens_that_the_whole_answer_does() -> None:
    """Those of the first choice of each prompt, whichever comes first."""
    cached = {1: 176, 0: 0, 3: 32, 2: 16}
    ends = [Chunk(index, "c", (3,), "stop", None, None, tokens) for index, tokens in cached.items()]
    job = _job([1], [2], n=2)

    class Client:
        async def start(self, *_: Any, whole: bool) -> _Source:
            return _Source(*ends)

    whole = json.loads(asyncio.run(run_whole(Client(), job)))  # type: ignore[arg-type]
    *_, last, done = events(_run_stream(_Source(*ends), job=job)[0])
    assert done == "[DONE]"
    assert whole["usage"]["prompt_tokens_details"] == last["usage"]["prompt_tokens_details"] == {"cached_tokens": 16}
