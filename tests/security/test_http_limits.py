"""Limits of the HTTP protocol, with a real uvicorn on a real socket, and with the whole service."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import pytest
import uvicorn

from frontend.http_protocol import MAX_HEAD_BYTES, MAX_HEADERS, MAX_URL_BYTES, LimitedHttp
from ipc.lifetime import file_limit
from tests.security.conftest import FILE_KEY, FORGED, SECRET_PROMPT, Service

WAIT_S = 30.0
SHORT_S = 0.2
BIG = b"x" * (8 << 20)
T = TypeVar("T")


class Hasty(LimitedHttp):
    head_timeout_s = body_timeout_s = write_timeout_s = SHORT_S


class Application:
    """Answers with BIG to /big, else with the size of the body; notes who disconnected."""

    def __init__(self) -> None:
        self.disconnected = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        size, message = 0, await receive()
        while message["type"] == "http.request":
            size += len(message["body"])
            if not message["more_body"]:
                break
            message = await receive()
        if message["type"] == "http.disconnect":
            self.disconnected.set()
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        if scope["path"] == "/big":
            writer = asyncio.ensure_future(self._send_big(send))
            await receive()
            writer.cancel()
            self.disconnected.set()
        else:
            await send({"type": "http.response.body", "body": b"%d" % size})

    async def _send_big(self, send: Any) -> None:
        while True:
            await send({"type": "http.response.body", "body": BIG, "more_body": True})
            await asyncio.sleep(0)  # sending to nobody does not wait


@asynccontextmanager
async def serving(protocol: type[LimitedHttp]) -> AsyncIterator[tuple[Application, int]]:
    application = Application()
    config = uvicorn.Config(
        application, http=protocol, ws="none", lifespan="off", log_config=None, timeout_keep_alive=30
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(config)
        task = asyncio.ensure_future(server.serve(sockets=[listener]))
        try:
            yield application, listener.getsockname()[1]
        finally:
            server.should_exit = server.force_exit = True
            await task


def run(protocol: type[LimitedHttp], talk: Callable[[Application, int], Awaitable[T]]) -> T:
    async def main() -> T:
        async with asyncio.timeout(WAIT_S), serving(protocol) as (application, port):
            return await talk(application, port)

    return asyncio.run(main())


async def answer_to(port: int, *parts: bytes) -> bytes:
    """All that comes back until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for part in parts:
            writer.write(part)
            await writer.drain()
        return await reader.read()
    except ConnectionResetError:
        return b""
    finally:
        writer.close()


def status_of(answer: bytes) -> int:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert json.loads(body)["error"]["message"]
    assert b"connection: close" in head
    return int(answer.split()[1])


HEADERS = b"".join(b"h%d: x\r\n" % i for i in range(MAX_HEADERS + 1))
REFUSED = {
    "many headers": (431, b"GET / HTTP/1.1\r\n" + HEADERS + b"\r\n"),
    "long header": (431, b"GET / HTTP/1.1\r\na: " + b"x" * MAX_HEAD_BYTES + b"\r\n\r\n"),
    "header without end": (431, b"GET / HTTP/1.1\r\na: " + b"x" * (MAX_HEAD_BYTES + 1)),
    "long URL": (414, b"GET /" + b"x" * MAX_URL_BYTES + b" HTTP/1.1\r\n\r\n"),
    "no HTTP": (400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc"),
    "both lengths": (400, b"POST / HTTP/1.1\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_head_beyond_the_limits_is_refused(name: str) -> None:
    status, request = REFUSED[name]
    assert status_of(run(LimitedHttp, lambda _, port: answer_to(port, request))) == status


def test_a_connection_that_leaves_too_few_files_is_refused_and_the_others_are_served() -> None:
    class Narrow(LimitedHttp):
        reserved_files = file_limit() - 1

    async def talk(_: Application, port: int) -> tuple[bytes, bytes]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\n\r\n")
        assert (await reader.readuntil(b"0\r\n\r\n")).startswith(b"HTTP/1.1 200")
        refused = await answer_to(port, b"GET / HTTP/1.1\r\n\r\n")
        writer.write(b"GET / HTTP/1.1\r\nconnection: close\r\n\r\n")
        served = await reader.read()
        writer.close()
        return refused, served

    refused, served = run(Narrow, talk)
    assert status_of(refused) == 503
    assert b"2 connections are open, the limit is 1" in refused
    assert served.startswith(b"HTTP/1.1 200")


SLOW = {
    "nothing": b"",
    "half a head": b"GET / HTTP/1.1\r\nhost: ",
    "half a body": b"POST / HTTP/1.1\r\ncontent-length: 10\r\n\r\n12345",
    "a chunk without end": b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n5\r\n123",
    "empty lines": b"\r\n\r\n",
}


@pytest.mark.parametrize("name", SLOW)
def test_who_is_slow_to_ask_is_answered_408(name: str) -> None:
    assert status_of(run(Hasty, lambda _, port: answer_to(port, SLOW[name]))) == 408


def test_empty_lines_after_an_answer_do_not_hold_the_connection() -> None:
    async def talk(_: Application, port: int) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\n\r\n")
        assert (await reader.readuntil(b"0\r\n\r\n")).startswith(b"HTTP/1.1 200")
        writer.write(b"\r\n")
        answer = await reader.read()
        writer.close()
        return answer

    assert status_of(run(Hasty, talk)) == 408


def test_who_does_not_read_loses_the_connection_and_the_others_do_not() -> None:
    async def talk(application: Application, port: int) -> bytes:
        _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1)
        writer.write(b"GET /big HTTP/1.1\r\n\r\n")
        await application.disconnected.wait()
        writer.close()
        return await answer_to(port, b"GET / HTTP/1.1\r\nconnection: close\r\n\r\n")

    assert run(Hasty, talk).startswith(b"HTTP/1.1 200")


def test_a_large_body_and_several_requests_on_a_connection_are_served() -> None:
    big = b"POST / HTTP/1.1\r\ncontent-length: %d\r\n\r\n" % len(BIG) + BIG
    last = b"GET / HTTP/1.1\r\nconnection: close\r\n\r\n"
    answer = run(LimitedHttp, lambda _, port: answer_to(port, big, b"GET / HTTP/1.1\r\n\r\n", last))
    assert answer.count(b"HTTP/1.1 200") == 3
    assert str(len(BIG)).encode() in answer


# --- the whole service

pytestmark_service = pytest.mark.usefixtures("unharmed")
HEADERS_OK = {"authorization": f"Bearer {FILE_KEY}"}
REQUEST_IDS = ["x" * 129, "a b", "a\tb", "ä", "", "a\x7f"]


OFFER = b"Host: x\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AA\r\n"


@pytest.mark.parametrize(
    "parts",
    [
        (b"Content-Length: 28\r\n\r\nGET /big HTTP/1.1\r\nHost: x\r\n",),
        (b"Content-Length: 28\r\n\r\n", b"GET /big HTTP/1.1\r\n", b"Host: x\r\n"),
        (b"Transfer-Encoding: chunked\r\n\r\n", b"1c\r\nGET /big HTTP/1.1\r\nHost: x\r\n\r\n0\r\n\r\n"),
    ],
    ids=["one packet", "several", "chunked"],
)
def test_the_body_of_who_offers_to_upgrade_is_a_body(parts: tuple[bytes, ...]) -> None:
    """`curl --http2` and Java's own client offer HTTP/2; taken for another protocol, a body is the next request."""
    first = b"POST / HTTP/1.1\r\n" + OFFER + parts[0]
    last = b"POST / HTTP/1.1\r\n" + OFFER + b"Connection: close\r\nContent-Length: 2\r\n\r\nhi"
    answer = run(LimitedHttp, lambda _, port: answer_to(port, first, *parts[1:], last))
    bodies = [found.partition(b"\r\n\r\n")[2] for found in answer.split(b"HTTP/1.1 200 OK")[1:]]
    assert bodies == [b"2\r\n28\r\n0\r\n\r\n", b"1\r\n2\r\n0\r\n\r\n"]


@pytestmark_service
def test_request_ids_are_echoed_if_short_and_clean(service: Service) -> None:
    def echoed(given: str) -> str:
        headers = [(k.encode(), v.encode()) for k, v in HEADERS_OK.items()] + [(b"x-request-id", given.encode())]
        return service.http.get("/v1/models", headers=headers).headers["x-request-id"]

    assert echoed("abc-123") == "abc-123"
    for given in REQUEST_IDS[:4]:
        assert len(echoed(given)) == 32
        assert echoed(given) != echoed(given)


@pytestmark_service
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        (
            {"chat_template_kwargs": {"chat_template": "{% for i in range(10**9) %}{% endfor %}"}},
            "chat_template_kwargs",
        ),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"conversation": []}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"tokenizer_kwargs": {}}}, "chat_template_kwargs"),
    ],
)
def test_a_request_brings_no_template(service: Service, fields: dict[str, Any], param: str) -> None:
    body = {"messages": [{"role": "user", "content": "the end"}], "max_tokens": 2, **fields}
    response = service.http.post("/v1/chat/completions", json=body, headers=HEADERS_OK)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


@pytestmark_service
def test_prompts_and_forged_lines_do_not_reach_the_log(service: Service) -> None:
    """The log is read when the engine has ended, by the fixture that started it."""
    evil = f"\n{FORGED}\r\n{FORGED}\x1b[2J"
    for path, body in (
        ("/v1/completions", {"prompt": SECRET_PROMPT}),
        ("/v1/completions", {"prompt": SECRET_PROMPT * 10_000}),
        ("/v1/completions", {"prompt": SECRET_PROMPT, "model": evil, evil: 1}),
        ("/v1/chat/completions", {"messages": [{"role": evil, "content": SECRET_PROMPT}]}),
        ("/tokenize", {"prompt": SECRET_PROMPT}),
        ("/v1/models/%0a" + FORGED.replace(" ", "%20"), {}),
    ):
        service.http.post(path, json=body, headers=HEADERS_OK)
        service.http.get(path, headers=HEADERS_OK)
