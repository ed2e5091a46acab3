"""The HTTP server in front of a real scheduler and the fake executor: answers, streams, errors, clients that leave."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from frontend.openai import MAX_BODY_BYTES, MAX_PROMPTS
from tests.e2e.engine import Engine, running_engine, wait_until
from tests.frontend.model_folder import CONTEXT_TOKENS, VOCAB_SIZE, tiny_model
from tests.frontend.tokenizers_for_tests import byte_level_tokenizer

WAIT_S = 30.0


@pytest.fixture(scope="module", params=[1, 3], ids=["one frontend", "three frontends"])
def engine(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Engine]:
    """Everything below holds with one frontend and with several behind one port."""
    folder = tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    flags = ("--fake-executor", "--device", "cpu", "--max-num-seqs", "64", "--frontends", str(request.param))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ENGINE_FAKE_STEP_US", "1000")
        with running_engine(*flags, model=folder) as engine:
            yield engine


@pytest.fixture
def http(engine: Engine) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=engine.root, timeout=WAIT_S) as client:
        yield client


@pytest.fixture
def sdk(engine: Engine) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=engine.url, api_key="none", max_retries=0, timeout=WAIT_S) as client:
        yield client


def complete(http: httpx.Client, **fields: Any) -> dict[str, Any]:
    response = http.post("/v1/completions", json={"prompt": "the end", "seed": 0, "max_tokens": 6, **fields})
    assert response.status_code == 200, response.text
    return response.json()


def events(text: str) -> list[Any]:
    """Payloads of a stream; the last is "[DONE]"."""
    blocks = text.removesuffix("\n\n").split("\n\n")
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks), text
    return [data if data == "[DONE]" else json.loads(data) for data in (block[6:] for block in blocks)]


def metric(http: httpx.Client, name: str, label: str = "") -> float:
    for line in http.get("/metrics").text.splitlines():
        if line.startswith((f"engine:{name}{{", f"engine:{name} ")) and label in line:
            return float(line.rpartition(" ")[2])
    raise AssertionError(f"no metric {name}")


# --- completions


def test_completion_counts_and_names(http: httpx.Client) -> None:
    answer = complete(http, return_token_ids=True)
    choice = answer["choices"][0]
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    assert answer["model"] == "tiny"
    assert choice["text"] == byte_level_tokenizer().decode(choice["token_ids"])
    assert choice["finish_reason"] == "length"
    assert choice["prompt_token_ids"] == byte_level_tokenizer().encode("the end")
    prompt_tokens = len(choice["prompt_token_ids"])
    assert answer["usage"] == {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": 6,
        "total_tokens": prompt_tokens + 6,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_default_length_is_16_tokens(http: httpx.Client) -> None:
    response = http.post("/v1/completions", json={"prompt": "the end"})
    assert response.json()["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize("stream", [False, True])
def test_all_kinds_of_prompt_and_n_are_numbered_by_prompt(http: httpx.Client, stream: bool) -> None:
    ids = byte_level_tokenizer().encode("the fox")
    for prompt, count in (("the fox", 1), (["the fox", "lazy dog"], 2), (ids, 1), ([ids, ids[:2], ids[:1]], 3)):
        body = {"prompt": prompt, "max_tokens": 3, "n": 2, "seed": 5, "stream": stream, "return_token_ids": True}
        body["stream_options"] = {"include_usage": True}
        response = http.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        parts = events(response.text)[:-1] if stream else [response.json()]
        tokens: dict[int, list[int]] = {}
        for part in parts:
            for choice in part["choices"]:
                tokens.setdefault(choice["index"], []).extend(choice["token_ids"])
        assert sorted(tokens) == list(range(2 * count))
        assert all(len(one) == 3 for one in tokens.values())
        # The fake executor counts up from seed + position, so the second choice is one ahead of the first.
        assert tokens[0] != tokens[1]
        assert tokens[0][1:] == tokens[1][:-1]
        assert parts[-1]["usage"]["completion_tokens"] == 6 * count


def test_streamed_text_and_usage_equal_the_whole_answer(http: httpx.Client) -> None:
    whole = complete(http, max_tokens=40, echo=True, n=2)
    body = {"prompt": "the end", "seed": 0, "max_tokens": 40, "echo": True, "n": 2, "stream": True}
    response = http.post("/v1/completions", json={**body, "stream_options": {"include_usage": True}})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["x-accel-buffering"] == "no"
    *parts, last, done = events(response.text)
    assert done == "[DONE]"
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"] == 80
    assert all(part["usage"] is None for part in parts)
    for choice in whole["choices"]:
        mine = [part["choices"][0] for part in parts if part["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in mine) == choice["text"]
        assert choice["text"].startswith("the end")
        assert [part["finish_reason"] for part in mine] == [None] * (len(mine) - 1) + ["length"]


def test_stop_string_ends_the_text_before_it(http: httpx.Client) -> None:
    text = complete(http, max_tokens=40)["choices"][0]["text"]
    stop = text[10:13]
    choice = complete(http, max_tokens=40, stop=[stop])["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (text[:10], "stop", stop)


def test_logprobs_of_both_apis(http: httpx.Client) -> None:
    logprobs = complete(http, logprobs=2, max_tokens=3)["choices"][0]["logprobs"]
    assert {len(logprobs[key]) for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset")} == {3}
    assert logprobs["text_offset"][0] == 0
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "logprobs": True, "top_logprobs": 2}
    content = http.post("/v1/chat/completions", json=body).json()["choices"][0]["logprobs"]["content"]
    assert len(content) == 3
    for entry in content:
        assert bytes(entry["bytes"]).decode(errors="replace") == entry["token"]
        assert len(entry["top_logprobs"]) == 2


@pytest.mark.parametrize("max_tokens", [3, 0])
@pytest.mark.parametrize("stream", [False, True])
def test_an_echo_has_the_logprobs_of_the_prompt(http: httpx.Client, stream: bool, max_tokens: int) -> None:
    """In the fake engine they are all 0; a prompt of 400 tokens takes several steps."""
    ids = [*byte_level_tokenizer().encode("the end"), *range(3, 400)]
    body = {"prompt": [ids, ids[:1]], "max_tokens": max_tokens, "echo": True, "logprobs": 1, "seed": 1}
    response = http.post(
        "/v1/completions", json={**body, "stream": stream, "stream_options": {"include_usage": stream}}
    )
    parts = events(response.text)[:-1] if stream else [response.json()]
    assert parts[-1]["usage"]["completion_tokens"] == 2 * max_tokens
    for index, prompt in enumerate((ids, ids[:1])):
        choices = [choice for part in parts for choice in part["choices"] if choice["index"] == index]
        text = "".join(choice["text"] for choice in choices)
        tokens = [token for choice in choices for token in choice["logprobs"]["tokens"]]
        values = [value for choice in choices for value in choice["logprobs"]["token_logprobs"]]
        echo = byte_level_tokenizer().decode(prompt, skip_special_tokens=False)
        assert text == echo if max_tokens == 0 else text.startswith(echo)
        assert values == [None] + [0.0] * (len(prompt) - 1 + max_tokens)
        assert choices[-1]["finish_reason"] == "length"
        assert tokens[: len(prompt)] == [byte_level_tokenizer().token_text(token) for token in prompt]
        assert choices[0]["logprobs"]["top_logprobs"][0] is None
        assert choices[0]["logprobs"]["text_offset"][:2] == [0, len(tokens[0])][: len(tokens)]


def test_prompt_logprobs_as_vllm_writes_them(http: httpx.Client) -> None:
    ids = byte_level_tokenizer().encode("the end of it")
    choice = complete(http, prompt=ids, prompt_logprobs=1)["choices"][0]
    assert choice["logprobs"] is None
    first, *rest = choice["prompt_logprobs"]
    assert first is None
    assert [next(iter(entry)) for entry in rest] == [str(token) for token in ids[1:]]
    assert rest[0][str(ids[1])]["decoded_token"] == byte_level_tokenizer().token_text(ids[1])
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "prompt_logprobs": 0}
    chat = http.post("/v1/chat/completions", json=body).json()
    assert len(chat["prompt_logprobs"]) == chat["usage"]["prompt_tokens"]


def test_cached_prompt_tokens_are_reported(http: httpx.Client) -> None:
    prompt = list(range(10, 110))
    first = complete(http, prompt=prompt, cache_salt="a")["usage"]["prompt_tokens_details"]["cached_tokens"]
    again = complete(http, prompt=prompt, cache_salt="a")["usage"]["prompt_tokens_details"]["cached_tokens"]
    other = complete(http, prompt=prompt, cache_salt="b")["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert (first, again, other) == (0, 96, 0)


# --- chat, through the openai client


def test_chat(sdk: openai.OpenAI) -> None:
    answer = sdk.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hello"}], max_completion_tokens=5, seed=1
    )
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 5


def test_chat_stream_has_role_first_text_then_usage(sdk: openai.OpenAI) -> None:
    fields: dict[str, Any] = {
        "model": "tiny",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}]}],
        "max_tokens": 8,
        "seed": 1,
    }
    parts = list(sdk.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
    assert parts[0].choices[0].delta.role == "assistant"
    assert all(part.choices[0].delta.role is None for part in parts[1:-1])
    assert parts[-2].choices[0].finish_reason == "length"
    assert parts[-1].choices == []
    assert parts[-1].usage is not None
    assert parts[-1].usage.completion_tokens == 8
    text = "".join(part.choices[0].delta.content or "" for part in parts[:-1])
    assert text == sdk.chat.completions.create(**fields).choices[0].message.content


def test_models(sdk: openai.OpenAI) -> None:
    assert [model.id for model in sdk.models.list()] == ["tiny"]
    assert sdk.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        sdk.models.retrieve("other")


# --- errors


BAD_BODIES = [
    (b"", None),
    (b"{", None),
    (b"[]", None),
    (b"\xff", None),
    (b'{"prompt": "\xff"}', None),
    (b'{"prompt": "\\ud800"}', None),
    (b'{"prompt": "a", "temperature": NaN}', None),
    (b'{"prompt": "a", "temperature": Infinity}', None),
    (b'{"prompt": "a", "x": ' + b"[" * 100_000 + b"}", None),
    (b"{}", "prompt"),
    (b'{"prompt": null}', "prompt"),
    (b'{"prompt": ""}', "prompt"),
    (b'{"prompt": []}', "prompt"),
    (b'{"prompt": [[]]}', "prompt"),
    (b'{"prompt": [1, "a"]}', "prompt"),
    (b'{"prompt": [-1]}', "prompt"),
    (b'{"prompt": [%d]}' % VOCAB_SIZE, "prompt"),
    (b'{"prompt": [99999999999999999999999]}', "prompt"),
    (b'{"prompt": [true]}', "prompt"),
    (b'{"prompt": [-1], "echo": true}', "prompt"),
    (b'{"prompt": [4294967296], "echo": true}', "prompt"),
    (b'{"prompt": ["a", []], "echo": true}', "prompt"),
    (b'{"prompt": "a", "max_tokens": 0}', "max_tokens"),
    (b'{"prompt": "a", "max_tokens": -1}', "max_tokens"),
    (b'{"prompt": "a", "max_tokens": "5"}', "max_tokens"),
    (b'{"prompt": "a", "max_tokens": true}', "max_tokens"),
    (b'{"prompt": "a", "max_tokens": 1.5}', "max_tokens"),
    (b'{"prompt": "a", "temperature": -1}', "temperature"),
    (b'{"prompt": "a", "temperature": 1e999}', "temperature"),
    (b'{"prompt": "a", "top_p": 0}', "top_p"),
    (b'{"prompt": "a", "n": 0}', "n"),
    (b'{"prompt": "a", "n": 1000000000}', "n"),
    (b'{"prompt": "a", "logprobs": 1000000000}', "logprobs"),
    (b'{"prompt": "a", "logit_bias": {"x": 1}}', "logit_bias"),
    (b'{"prompt": "a", "logit_bias": {"%d": 1}}' % VOCAB_SIZE, "logit_bias"),
    (b'{"prompt": "a", "stop": [""]}', "stop"),
    (b'{"prompt": "a", "stop": %s}' % json.dumps(["a"] * 100_000).encode(), "stop"),
    (b'{"prompt": "a", "stream_options": 3}', "stream_options"),
    (b'{"prompt": "a", "suffix": "b"}', "suffix"),
    (b'{"prompt": "a", "best_of": 3}', "best_of"),
    (b'{"prompt": "a", "response_format": {"type": "xml"}}', "response_format"),
    (b'{"prompt": "a", "prompt_logprobs": 1, "stream": true}', "prompt_logprobs"),
    (b'{"prompt": "a", "prompt_logprobs": 1000}', "prompt_logprobs"),
]


@pytest.mark.parametrize(("body", "param"), BAD_BODIES, ids=lambda value: repr(value)[:50])
def test_a_body_at_fault_is_400_naming_the_field(http: httpx.Client, body: bytes, param: str | None) -> None:
    response = http.post("/v1/completions", content=body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert http.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"content": "hello"}]}, "messages"),
        ({"messages": [{"role": "stranger", "content": "hello"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 10_000}, None),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template_kwargs"),
    ],
)
def test_a_chat_at_fault_is_400_naming_the_field(http: httpx.Client, fields: Any, param: str | None) -> None:
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3, **fields}
    response = http.post("/v1/chat/completions", json=body)
    assert response.status_code == 400, response.text
    assert param is None or response.json()["error"]["param"] == param


@pytest.mark.parametrize("stream", [False, True])
def test_too_long_a_prompt_states_the_numbers_and_is_never_a_stream(http: httpx.Client, stream: bool) -> None:
    body = {"prompt": [5] * CONTEXT_TOKENS, "max_tokens": 7, "stream": stream}
    response = http.post("/v1/completions", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "context_length_exceeded")
    expected = f"maximum context length is {CONTEXT_TOKENS} tokens; you requested {CONTEXT_TOKENS + 7} "
    assert error["message"] == expected + f"({CONTEXT_TOKENS} prompt + 7 completion)"


def test_as_many_prompts_as_a_request_may_have_are_all_answered(http: httpx.Client) -> None:
    answer = complete(http, prompt=["a"] * MAX_PROMPTS, max_tokens=2)
    assert [choice["index"] for choice in answer["choices"]] == list(range(MAX_PROMPTS))
    assert answer["usage"]["completion_tokens"] == 2 * MAX_PROMPTS


def test_one_bad_prompt_of_several_fails_the_request(http: httpx.Client) -> None:
    for stream in (False, True):
        body = {"prompt": [[5], [VOCAB_SIZE], [5]], "max_tokens": 3, "stream": stream}
        response = http.post("/v1/completions", json=body)
        assert response.status_code == 400
        assert str(VOCAB_SIZE) in response.json()["error"]["message"]


def test_typed_errors_of_the_openai_client(sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        sdk.completions.create(model="nobody", prompt="a")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        sdk.completions.create(model="tiny", prompt="a", temperature=-3)
    assert bad.value.param == "temperature"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nope", 404),
        ("POST", "/v1/nope", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/health", 405),
    ],
)
def test_paths_and_methods_that_do_not_exist(http: httpx.Client, method: str, path: str, status: int) -> None:
    response = http.request(method, path)
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_too_large_a_body_is_refused_before_it_is_read(http: httpx.Client, engine: Engine) -> None:
    host, port = engine.root.removeprefix("http://").split(":")
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {MAX_BODY_BYTES + 1}\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=WAIT_S) as raw:
        raw.sendall(head.encode())
        answer = b""
        while b"}}" not in answer:
            part = raw.recv(65536)
            assert part, answer
            answer += part
    assert answer.startswith(b"HTTP/1.1 413")
    assert b'{"error":{' in answer
    assert http.get("/health").status_code == 200


def test_unknown_fields_are_ignored(http: httpx.Client) -> None:
    assert complete(http, no_such_field={"a": [1]}, user="someone")["usage"]["completion_tokens"] == 6


# --- the rest of the API


@pytest.mark.parametrize("path", ["/health", "/ready", "/ping"])
def test_health(http: httpx.Client, path: str) -> None:
    for method in ("GET", "HEAD"):
        response = http.request(method, path)
        assert (response.status_code, response.content) == (200, b"")


def test_request_ids_are_echoed_only_when_harmless(http: httpx.Client) -> None:
    assert http.get("/version", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    for bad in ("x" * 129, "a b", ""):
        given = http.get("/nope", headers={"x-request-id": bad}).headers["x-request-id"]
        assert given != bad
        assert len(given) == 32


def test_tokenize_and_back(http: httpx.Client) -> None:
    answer = http.post("/tokenize", json={"prompt": "the end"}).json()
    assert answer["tokens"] == byte_level_tokenizer().encode("the end")
    assert (answer["count"], answer["max_model_len"]) == (len(answer["tokens"]), CONTEXT_TOKENS)
    assert http.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": "the end"}
    assert http.post("/tokenize", json={"prompt": "the end", "add_special_tokens": None}).json() == answer
    assert http.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}
    assert http.post("/detokenize", json={"tokens": [-1]}).status_code == 400
    chat = http.post("/tokenize", json={"messages": [{"role": "user", "content": "hi"}]}).json()
    assert chat["count"] > 3
    assert http.post("/tokenize", json={}).status_code == 400


def test_metrics_count_what_was_served(http: httpx.Client) -> None:
    before = metric(http, "generation_tokens_total"), metric(http, "request_generation_tokens_sum")
    complete(http, max_tokens=9)
    assert metric(http, "generation_tokens_total") == before[0] + 9
    assert metric(http, "request_generation_tokens_sum") == before[1] + 9
    assert metric(http, "dropped_messages_total") == 0
    assert http.get("/metrics").headers["content-type"].startswith("text/plain")


# --- clients that leave


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_aborts_its_request(http: httpx.Client, engine: Engine, stream: bool) -> None:
    host, port = engine.root.removeprefix("http://").split(":")
    aborted = metric(http, "request_success_total", 'finished_reason="aborted"')
    body = json.dumps({"prompt": [[5], [6]], "max_tokens": CONTEXT_TOKENS - 1, "n": 2, "stream": stream}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    with socket.create_connection((host, int(port)), timeout=WAIT_S) as raw:
        raw.sendall(head + body)
        wait_until(lambda: metric(http, "num_requests_running") == 4, WAIT_S, "four sequences run")
    wait_until(lambda: metric(http, "num_requests_running") == 0, WAIT_S, "nothing runs")
    assert metric(http, "request_success_total", 'finished_reason="aborted"') == aborted + 4
    assert metric(http, "kv_cache_usage_perc") == 0


def test_a_client_that_leaves_while_queued(http: httpx.Client, engine: Engine) -> None:
    host, port = engine.root.removeprefix("http://").split(":")
    body = json.dumps({"prompt": [5], "max_tokens": CONTEXT_TOKENS - 1, "n": 96}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    with socket.create_connection((host, int(port)), timeout=WAIT_S) as raw:
        raw.sendall(head + body)
        wait_until(lambda: metric(http, "num_requests_waiting") == 32, WAIT_S, "32 of 96 wait for a slot")
    wait_until(
        lambda: metric(http, "num_requests_running") + metric(http, "num_requests_waiting") == 0, WAIT_S, "none is left"
    )
