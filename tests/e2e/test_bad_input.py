"""Whatever a user gets wrong is answered with a typed error that names it, and nobody else notices."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from frontend.launch import cuda_devices
from frontend.openai import MAX_BODY_BYTES
from tests.e2e.engine import DEMO_MODEL, Engine, running_engine

WAIT_S = 60.0
CONTEXT_TOKENS = 4096
VOCAB_SIZE = 2048
COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
NESTED = b"[" * 1_000_000


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with running_engine("--device", "cpu", "--dtype", "float32") as engine:
        yield engine


@pytest.fixture(scope="module")
def http(engine: Engine) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=engine.root, timeout=WAIT_S) as client:
        yield client


@pytest.fixture(scope="module")
def first_answer(http: httpx.Client) -> str:
    return good_answer(http)


@pytest.fixture(scope="module")
def first_pids(engine: Engine) -> dict[str, int]:
    return pids(engine)


@pytest.fixture
def unharmed(engine: Engine, http: httpx.Client, first_answer: str, first_pids: dict[str, int]) -> Iterator[None]:
    """After the test the service answers as before it, from the same processes."""
    yield
    assert good_answer(http) == first_answer
    assert pids(engine) == first_pids
    metrics = http.get("/metrics").text
    assert 'engine:dropped_messages_total{engine="0",model_name="demo"} 0.0' in metrics
    assert 'engine:num_requests_running{engine="0",model_name="demo"} 0.0' in metrics


def pids(engine: Engine) -> dict[str, int]:
    return {role: process.pid for role, process in engine.children().items()}


def good_answer(http: httpx.Client) -> str:
    response = http.post(COMPLETIONS, json={"prompt": "Return the", "max_tokens": 4, "temperature": 0})
    assert response.status_code == 200, response.text
    text: str = response.json()["choices"][0]["text"]
    return text


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The OpenAI error object of a 4xx answer."""
    assert 400 <= response.status_code < 500, response.text
    assert response.headers["content-type"].startswith("application/json")
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


# --- requests

# fields of a completion request beside or instead of a good prompt, the field at fault
BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [""]}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": {"text": "a"}}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": [VOCAB_SIZE]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [2**31]}, "prompt"),
    ({"prompt": [2**63]}, "prompt"),
    ({"prompt": [10**30]}, "prompt"),
    ({"prompt": [1.5]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": [[1], [VOCAB_SIZE]]}, "prompt"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 10**9}, "max_tokens"),
    ({"max_tokens": 10**30}, "max_tokens"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.01}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"seed": 2**64}, "seed"),
    ({"n": 0}, "n"),
    ({"n": 10**9}, "n"),
    ({"logprobs": 10**9}, "logprobs"),
    ({"logprobs": -1}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"logit_bias": {str(VOCAB_SIZE): 1}}, "logit_bias"),
    ({"logit_bias": {"1": 1e9}}, "logit_bias"),
    ({"stop": 5}, "stop"),
    ({"stop": ["x"] * 1000}, "stop"),
    ({"stop_token_ids": [VOCAB_SIZE]}, "stop_token_ids"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": []}, "stream_options"),
    ({"model": 5}, "model"),
]


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_field_at_fault_is_named(http: httpx.Client, stream: bool) -> None:
    found = {}
    for fields, _ in BAD_FIELDS:
        response = http.post(COMPLETIONS, json={"prompt": "Return the", "stream": stream, **fields})
        found[str(fields)[:60]] = response.status_code, error_of(response)["param"]
    assert found == {str(fields)[:60]: (400, param) for fields, param in BAD_FIELDS}


BAD_CHATS: list[tuple[dict[str, Any], str]] = [
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "hello"}, "messages"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages"),
    ({"messages": [{"content": "no role"}]}, "messages"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_completion_tokens": -1}, "max_completion_tokens"),
    ({"logprobs": 5}, "logprobs"),
    ({"logprobs": True, "top_logprobs": 10**9}, "top_logprobs"),
    ({"n": 10**9}, "n"),
    ({"messages": [{"role": "user", "content": "long " * 5000}]}, "messages"),
    ({"max_completion_tokens": 10**9}, "max_completion_tokens"),
]


@pytest.mark.usefixtures("unharmed")
def test_a_field_of_a_chat_at_fault_is_named(http: httpx.Client) -> None:
    found = {}
    for fields, _ in BAD_CHATS:
        response = http.post(CHAT, json={"messages": [{"role": "user", "content": "hello"}], **fields})
        found[str(fields)[:60]] = response.status_code, error_of(response)["param"]
    assert found == {str(fields)[:60]: (400, param) for fields, param in BAD_CHATS}


# bodies that are no JSON, or no text; where Python's and the standard's JSON disagree, the standard is right
BAD_BODIES = {
    "empty": b"",
    "cut off": b'{"prompt": "Return the',
    "an array": b"[]",
    "a number": b"5",
    "a key twice quoted": b'{""prompt"": "a"}',
    "NaN": b'{"prompt": "a", "temperature": NaN}',
    "minus NaN": b'{"prompt": "a", "temperature": -NaN}',
    "infinity": b'{"prompt": "a", "temperature": Infinity}',
    "a number too large": b'{"prompt": "a", "temperature": 1e999}',
    "an integer of 5000 digits": b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
    "not UTF-8": b'{"prompt": "\xff\xfe"}',
    "cut inside a character": b'{"prompt": "\xe2\x82"}',
    "binary": bytes(range(256)),
    "a lone surrogate": b'{"prompt": "\\ud800"}',
    "lone surrogates in a stop string": b'{"prompt": "a", "stop": "\\udfff"}',
    "an encoded surrogate": b'{"prompt": "\xed\xa0\x80"}',
    "deep nesting": b'{"prompt": ' + NESTED,
    "deep nesting in a field that is ignored": b'{"prompt": "a", "user": ' + NESTED + b"]" * len(NESTED) + b"}",
    "deep nesting of objects": b'{"prompt": "a", "x": ' + b'{"a":' * 200_000 + b"1" + b"}" * 200_000 + b"}",
    "a null byte": b'{"prompt": "a"}\x00',
}


@pytest.mark.usefixtures("unharmed")
def test_a_body_that_is_no_json_is_400(http: httpx.Client) -> None:
    for name, body in BAD_BODIES.items():
        for path in (COMPLETIONS, CHAT):
            response = http.post(path, content=body)
            assert (name, response.status_code) == (name, 400)
            assert error_of(response)["type"] == "invalid_request_error"


@pytest.mark.usefixtures("unharmed")
def test_an_unknown_model_is_404(http: httpx.Client) -> None:
    for path in (COMPLETIONS, CHAT):
        body = {"model": "gpt-9", "prompt": "a", "messages": [{"role": "user", "content": "a"}]}
        response = http.post(path, json=body)
        error = error_of(response)
        assert (response.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
        assert "'gpt-9'" in error["message"]
    assert http.get("/v1/models/gpt-9").status_code == 404


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_too_long_a_prompt_states_both_numbers(http: httpx.Client, stream: bool) -> None:
    for prompt, max_tokens in ([5] * 5000, 16), ([5] * CONTEXT_TOKENS, 1), ([5] * 4000, 97):
        response = http.post(COMPLETIONS, json={"prompt": prompt, "max_tokens": max_tokens, "stream": stream})
        error = error_of(response)
        assert (response.status_code, error["code"]) == (400, "context_length_exceeded")
        assert f"{CONTEXT_TOKENS} tokens" in error["message"]
        assert f"{len(prompt) + max_tokens} ({len(prompt)} prompt + {max_tokens} completion)" in error["message"]


@pytest.mark.usefixtures("unharmed")
def test_routes_and_methods_that_do_not_exist(http: httpx.Client) -> None:
    for method, path, status in (
        ("GET", "/", 404),
        ("POST", "/v1/embeddings", 404),
        ("POST", "/v1/completions/..%2f..%2fetc", 404),
        ("GET", COMPLETIONS, 405),
        ("PUT", CHAT, 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/metrics", 405),
    ):
        response = http.request(method, path)
        assert (path, response.status_code) == (path, status)
        error_of(response)


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("chunked", [False, True], ids=["announced", "chunked"])
def test_a_huge_body_is_413(engine: Engine, chunked: bool) -> None:
    """An announced one is refused before it is read, and one of unknown length once it is too long."""
    host, port = engine.root.removeprefix("http://").split(":")
    length = "transfer-encoding: chunked" if chunked else f"content-length: {MAX_BODY_BYTES + 1}"
    mib = b"a" * (1 << 20)
    with socket.create_connection((host, int(port)), timeout=WAIT_S) as raw:
        raw.sendall(f"POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\n{length}\r\n\r\n".encode())
        if chunked:
            for _ in range(MAX_BODY_BYTES // len(mib)):
                raw.sendall(b"%x\r\n%s\r\n" % (len(mib), mib))
            raw.sendall(b"1\r\na\r\n")  # one byte too many, and nothing unread that would reset the connection
        answer = b""
        while b"}}" not in answer and (part := raw.recv(65536)):
            answer += part
    assert answer.startswith(b"HTTP/1.1 413")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]


@pytest.mark.usefixtures("unharmed")
def test_bytes_that_are_no_http(engine: Engine) -> None:
    host, port = engine.root.removeprefix("http://").split(":")
    for garbage in (b"\x00" * 1000 + b"\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc"):
        with socket.create_connection((host, int(port)), timeout=WAIT_S) as raw:
            raw.sendall(garbage)
            raw.shutdown(socket.SHUT_WR)
            answer = raw.recv(65536)
        assert not answer or answer.startswith(b"HTTP/1.1 4"), answer


# --- the launcher


def launch(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "frontend.launch", "--port", "0", *flags],
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )


def fault_of(*flags: str) -> str:
    """The one line a launch at fault writes, without its prefix."""
    ended = launch(*flags)
    assert ended.returncode == 2, ended.stderr
    assert ended.stdout == ""
    line, newline, rest = ended.stderr.partition("\n")
    assert (newline, rest) == ("\n", "")
    role, error, fault = line.partition(": error: ")
    assert (role in ("engine-launch", "executor"), error) == (True, ": error: "), line
    return fault


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the demo model to be damaged."""
    return Path(shutil.copytree(DEMO_MODEL, tmp_path / "model"))


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_an_unknown_model_folder_or_hub_name(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    assert fault_of("--model", str(missing)) == f"--model: no such folder: {missing}"
    assert fault_of("--model", "nobody/no-such-model").startswith("--model: 'nobody/no-such-model' is no folder")
    assert fault_of("--model", str(DEMO_MODEL / "config.json")).startswith("--model: ")


def test_a_damaged_model_folder(model: Path) -> None:
    weights, config = model / "model.safetensors", model / "config.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1000])
    sizes = f"is truncated: expected {len(whole)} bytes, found {len(whole) - 1000}"
    assert fault_of(str(model), "--device", "cpu") == f"--model: {weights} {sizes}"
    weights.unlink()
    assert fault_of(str(model), "--device", "cpu") == f"--model: {model} has no safetensors file"
    config.write_text("{")
    assert fault_of(str(model), "--device", "cpu").startswith(f"--model: {config} is not readable JSON")
    config.unlink()
    assert fault_of(str(model), "--device", "cpu") == f"--model: {model} has no config.json"


def test_an_architecture_that_transformers_does_not_know(model: Path) -> None:
    change_config(model, model_type="no_such_type", architectures=["NoSuchModel"])
    fault = fault_of(str(model), "--device", "cpu")
    assert fault.startswith(f"--model: cannot load {model}: ")
    assert "no_such_type" in fault


def test_a_taken_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        fault = fault_of("--model", str(DEMO_MODEL), "--port", str(port))
    assert fault.startswith(f"--port: cannot listen on 127.0.0.1 port {port}: ")


@pytest.mark.skipif(cuda_devices() > 0, reason="there is a GPU here")
def test_cuda_without_a_gpu() -> None:
    assert fault_of("--model", str(DEMO_MODEL), "--device", "cuda").startswith("--device: ")


@pytest.mark.parametrize(
    ("flags", "flag"),
    [
        (["--max-num-sequences", "5"], "--max-num-sequences"),
        (["--dtype", "float31"], "--dtype"),
        (["--port", "http"], "--port"),
        (["--max-model-len", "99999"], "--max-model-len"),
        (["--device", "tpu"], "--device"),
        (["--kv-cache-memory-bytes", "1"], "--kv-cache-memory-bytes"),
    ],
)
def test_a_flag_at_fault_is_named(flags: list[str], flag: str) -> None:
    device = [] if flag == "--device" else ["--device", "cpu"]
    assert fault_of("--model", str(DEMO_MODEL), *device, *flags).startswith(f"{flag}: ")


def test_a_folder_for_sockets_whose_path_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    assert fault_of("--model", str(DEMO_MODEL), "--device", "cpu").startswith("TMPDIR: ")
    assert list(long.iterdir()) == []
