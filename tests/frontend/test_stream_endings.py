"""What an HTTP stream sends as it goes, fails or is left, of scripted chunks and without an engine."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from frontend.jobs import EventStream, Job
from frontend.openai import CompletionRequest
from frontend.request import Chunk, GenerateParams
from frontend.shapes import CompletionShape
from ipc.errors import UnavailableError
from tests.frontend.test_server import WAIT_S, events


class _ChunksThen:
    """Two chunks, with `error` between them if there is one."""

    def __init__(self, error: Exception | None) -> None:
        self._parts = [Chunk(0, "b", (2,), None, None, None, 0), error or Chunk(0, "c", (3,), "stop", None, None, 0)]
        self.closed = False

    async def chunks(self) -> list[Chunk]:
        part = self._parts.pop(0) if self._parts else None
        if isinstance(part, Exception):
            raise part
        return [part] if part else []

    def close(self) -> None:
        self.closed = True


def _run_stream(source: _ChunksThen, *, leave: bool = False) -> tuple[str, bool]:
    """What is sent for "a" and then `source`, and whether `source` was closed."""
    request = CompletionRequest(prompt="x", stream=True)
    shape = CompletionShape(request, response_id="cmpl-1", created=1, model="m", prompts=[[1]], echoes=None)
    job = Job([[1]], GenerateParams(), shape)
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
    body, closed = _run_stream(_ChunksThen(None))
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
    body, closed = _run_stream(_ChunksThen(error))
    *parts, last = events(body)
    assert [part["choices"][0]["finish_reason"] for part in parts] == [None, None]
    assert (last["error"]["message"], last["error"]["code"]) == (message, code)
    assert "DONE" not in body
    assert closed


def test_a_client_that_leaves_closes_the_source() -> None:
    body, closed = _run_stream(_ChunksThen(None), leave=True)
    assert "DONE" not in body
    assert closed
