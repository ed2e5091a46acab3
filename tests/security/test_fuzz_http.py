"""Whatever is sent to the HTTP port: a 4xx or a proper answer, from processes that live on, in bounded memory."""

from __future__ import annotations

import contextlib
import json
import socket
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.security.conftest import FILE_KEY, WAIT_S, Service
from tests.security.strategies import EVIL_PICKLE, QUIET

PATHS = ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"]
HEADERS = {"authorization": f"Bearer {FILE_KEY}"}
GOOD: dict[str, Any] = {
    "prompt": "the end",
    "messages": [{"role": "user", "content": "the end"}],
    "tokens": [1, 2],
    "max_tokens": 2,
}
FIELDS = [
    *("model", "prompt", "messages", "tokens", "max_tokens", "min_tokens", "temperature", "top_k", "top_p", "min_p"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "seed", "logit_bias", "stop", "stop_token_ids"),
    *("n", "best_of", "logprobs", "top_logprobs", "echo", "suffix", "stream", "stream_options", "priority"),
    *("cache_salt", "return_token_ids", "response_format", "structured_outputs", "tools", "tool_choice"),
    *("chat_template_kwargs", "add_generation_prompt", "ignore_eos", "prompt_logprobs", "unknown"),
]
# NaN, infinities, integers no machine word holds and lone surrogates are written by Python's json as a client might
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 1, 2, 129, 2**31, 2**63, 2**64, 10**400, -(10**400)]),
    st.integers(-(2**63), 2**63),
    st.floats(),
    st.text(max_size=30),
    st.sampled_from(["\ud800", "\x00", "\udfff" * 3, "<|im_end|>", "{{ 1 }}", "x" * 5000]),
)
json_values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner, max_size=5),
    max_leaves=12,
)
BOMBS = {
    "arrays": b"[" * 300_000,
    "objects": b'{"a":' * 200_000,
    "nested in a known field": b'{"prompt":' + b"[" * 300_000 + b"]" * 300_000 + b"}",
    "nested in an unknown field": b'{"prompt":"a","x":' + b"[" * 300_000 + b"]" * 300_000 + b"}",
    "a schema in itself": b'{"prompt":"a","response_format":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001,
    "a million stop strings": b'{"prompt":"a","stop":[' + b'"x",' * 1_000_000 + b'"x"]}',
    "a million biases": b'{"prompt":"a","logit_bias":{' + b",".join(b'"%d":1' % i for i in range(500_000)) + b"}}",
    "a million prompts": b'{"prompt":[' + b'"a",' * 1_000_000 + b'"a"]}',
    "many choices of many prompts": json.dumps({"prompt": ["a"] * 2000, "n": 128}).encode(),
    "a long number": b'{"prompt":"a","seed":' + b"9" * 1_000_000 + b"}",
    "a pickle": EVIL_PICKLE,
}


@pytest.mark.usefixtures("unharmed")
def test_bodies_of_good_and_bad_fields(service: Service) -> None:
    @settings(max_examples=250, **QUIET)
    @given(
        path=st.sampled_from(PATHS),
        fields=st.dictionaries(st.sampled_from(FIELDS), json_values, min_size=1, max_size=3),
    )
    def send(path: str, fields: dict[str, Any]) -> None:
        body = json.dumps({**GOOD, **fields}, ensure_ascii=True).encode()
        expect_an_answer(service, path, body)

    send()


@pytest.mark.usefixtures("unharmed")
def test_bodies_of_any_bytes(service: Service) -> None:
    good = json.dumps(GOOD).encode()

    @settings(max_examples=100, **QUIET)
    @given(
        path=st.sampled_from(PATHS),
        body=st.one_of(st.binary(max_size=300), st.integers(0, len(good) - 1).map(lambda at: good[:at])),
    )
    def send(path: str, body: bytes) -> None:
        expect_an_answer(service, path, body)

    send()


@pytest.mark.usefixtures("unharmed")
def test_every_route_with_any_method_query_and_body(service: Service) -> None:
    paths = sorted(service.http.get("/openapi.json", headers=HEADERS).json()["paths"])
    assert {*PATHS, "/health", "/metrics", "/v1/models"} <= set(paths)
    segments = st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.sampled_from(
        ["..", "%00", "a" * 3000]
    )

    @settings(max_examples=200, **QUIET)
    @given(
        path=st.sampled_from(paths),
        method=st.sampled_from(["GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "X"]),
        segment=segments,
        query=st.dictionaries(segments, segments, max_size=3),
        body=st.sampled_from([b"", b"{}", b"[]", b"null", b"\xff", EVIL_PICKLE]) | st.binary(max_size=50),
        kind=st.sampled_from(
            ["application/json", "text/plain", "multipart/form-data", "application/x-msgpack", "\xff"]
        ),
    )
    def send(path: str, method: str, segment: str, query: dict[str, str], body: bytes, kind: str) -> None:
        where = "/".join(quote(segment, safe="%") if part.startswith("{") else part for part in path.split("/"))
        headers = [(b"content-type", kind.encode("latin-1")), (b"authorization", HEADERS["authorization"].encode())]
        response = service.http.request(method, where, params=query, content=body, headers=headers)
        assert response.status_code < 500, f"{method} {where}: {response.text}"

    send()


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("name", BOMBS)
def test_bodies_that_would_blow_up(service: Service, name: str) -> None:
    for path in PATHS[:2]:
        response = service.http.post(path, content=BOMBS[name], headers=HEADERS)
        assert response.status_code == 400, response.text[:200]
        assert len(response.content) < 2000, "the answer repeats what was sent"


def expect_an_answer(service: Service, path: str, body: bytes) -> None:
    """200, or a fault of the request told as one; never a fault of the server."""
    response = service.http.post(path, content=body, headers=HEADERS)
    assert response.status_code == 200 or 400 <= response.status_code < 500, response.text
    if response.status_code != 200:
        assert response.json()["error"]["message"]


@pytest.mark.usefixtures("unharmed")
def test_bytes_that_are_hardly_http(service: Service) -> None:
    host, port = service.engine.root.removeprefix("http://").split(":")
    start = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"
    pieces = [
        *(b"\r\n", b"\r\n\r\n", b"\x00", b"\xff" * 100, b"GET /%00%ff%0a HTTP/1.1\r\n\r\n", b"GET * HTTP/1.1\r\n\r\n"),
        *(start, start + b"content-length: -1\r\n\r\n", start + b"content-length: 99999999999999999999\r\n\r\n"),
        *(
            start + b"transfer-encoding: chunked\r\n\r\n",
            b"ffffffffffffffff\r\n",
            b"0\r\n\r\n",
            b"5\r\nabc",
            EVIL_PICKLE,
        ),
        *(start + b"content-length: 2\r\nexpect: 100-continue\r\n\r\n{}", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
        *(b"GET /health HTTP/1.1\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n", b"x: y\r\n", b"\n", b"HEAD / "),
    ]

    @settings(max_examples=150, **QUIET)
    @given(parts=st.lists(st.sampled_from(pieces) | st.binary(max_size=100), min_size=1, max_size=6))
    def send(parts: list[bytes]) -> None:
        raw = socket.create_connection((host, int(port)), timeout=WAIT_S)
        with raw, contextlib.suppress(OSError):  # the server closes as soon as it has seen enough
            for part in parts:
                raw.sendall(part)
            raw.shutdown(socket.SHUT_WR)

    send()
