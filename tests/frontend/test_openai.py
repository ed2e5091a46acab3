"""Requests and answers of the OpenAI API as data: what is decoded, what is written."""

from __future__ import annotations

import json
import logging
import math
from typing import Any

import pytest

from frontend.openai import (
    MAX_PROMPTS,
    ChatRequest,
    CompletionRequest,
    chat_params,
    completion_params,
    decode_body,
    error_body,
    messages_of,
    prompts_of,
)
from frontend.request import Choice, Chunk, GenerateParams, TokenLogprob
from frontend.shapes import LOWEST_LOGPROB, ChatShape, CompletionShape, Echo, make_usage
from ipc.errors import InvalidParameterError, RequestError

EVERY_FIELD: dict[str, Any] = {
    "max_tokens": 7,
    "min_tokens": 2,
    "temperature": 0.5,
    "top_k": 3,
    "top_p": 0.25,
    "min_p": 0.125,
    "repetition_penalty": 1.5,
    "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
    "seed": 11,
    "prompt_logprobs": 2,
    "logit_bias": {"5": 1.5},
    "stop": ["x", "y"],
    "stop_token_ids": [3, 4],
    "ignore_eos": True,
    "n": 2,
    "include_stop_str_in_output": True,
    "skip_special_tokens": False,
    "priority": 4,
    "cache_salt": "s",
}


def completion(**fields: Any) -> CompletionRequest:
    return decode_body(json.dumps({"prompt": "p", **fields}).encode(), CompletionRequest)


def chat(**fields: Any) -> ChatRequest:
    body = {"messages": [{"role": "user", "content": "hi"}], **fields}
    return decode_body(json.dumps(body).encode(), ChatRequest)


def test_every_parameter_arrives() -> None:
    assert set(EVERY_FIELD) == set(GenerateParams.__dataclass_fields__) - {"logprobs", "structured_outputs"}
    expected = {**EVERY_FIELD, "logit_bias": {5: 1.5}}
    for params in (completion_params(completion(**EVERY_FIELD)), chat_params(chat(**EVERY_FIELD))):
        assert {name: getattr(params, name) for name in EVERY_FIELD} == expected


def test_null_means_the_default() -> None:
    nulls = dict.fromkeys(EVERY_FIELD)
    assert completion_params(completion(**nulls)) == GenerateParams(max_tokens=16)
    assert chat_params(chat(**nulls)) == GenerateParams()


def test_logprobs_of_the_two_apis() -> None:
    assert completion_params(completion(logprobs=3)).logprobs == 3
    assert completion_params(completion(logprobs=0)).logprobs == 0
    assert chat_params(chat(logprobs=True)).logprobs == 0
    assert chat_params(chat(logprobs=True, top_logprobs=3)).logprobs == 3
    assert chat_params(chat(logprobs=False)).logprobs is None
    assert chat_params(chat(top_logprobs=0)).logprobs is None, "the default may be said"


def test_max_completion_tokens_wins() -> None:
    assert chat_params(chat(max_tokens=3, max_completion_tokens=5)).max_tokens == 5


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
        ([], [[]]),
    ],
)
def test_prompts(prompt: Any, expected: Any) -> None:
    assert prompts_of(completion(prompt=prompt)) == expected


@pytest.mark.parametrize("prompt", [[1, "a"], [[1], 2], ["a"] * (MAX_PROMPTS + 1)])
def test_bad_prompts(prompt: Any) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        prompts_of(completion(prompt=prompt))
    assert caught.value.param == "prompt"


def test_text_parts_are_joined_and_absent_fields_stay_away() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = chat(messages=[{"role": "user", "content": parts}, {"role": "assistant", "content": None, "name": "x"}])
    assert messages_of(request.messages) == [
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": "", "name": "x"},
    ]


def test_bad_json_is_no_fault_of_a_field() -> None:
    with pytest.raises(RequestError) as caught:
        decode_body(b'{"prompt": "a",}', CompletionRequest)
    assert caught.value.param is None


def test_messages_are_not_without_number() -> None:
    many = b'{"role":"user"},' * (1 << 16)
    with pytest.raises(InvalidParameterError, match="length <= 65536") as caught:
        decode_body(b'{"messages": [%b{"role":"user"}]}' % many, ChatRequest)
    assert caught.value.param == "messages"


def test_unknown_fields_are_named_in_the_debug_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="tandem.openai"):
        completion(wat=1, temperature=0)
    assert "['wat']" in caplog.text


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, "invalid_request_error"), (404, "invalid_request_error"), (429, "rate_limit_error"), (500, "server_error")],
)
def test_error_types(status: int, kind: str) -> None:
    assert error_body("m", status, code="c", param="p") == {
        "error": {"message": "m", "type": kind, "param": "p", "code": "c"}
    }


def logprob(token: str, value: float = -0.5) -> TokenLogprob:
    return TokenLogprob(7, token, value, 1, ((7, token, value), (8, "z", -math.inf)))


def completion_shape(**fields: Any) -> CompletionShape:
    return CompletionShape(
        completion(**fields),
        response_id="cmpl-1",
        created=5,
        model="m",
        prompts=[[0, 1, 2, 7]],
        echoes=[Echo("漢a", "\ufffd")] if fields.get("echo") else None,
        token_bytes=lambda token, text: "漢".encode()[token : token + 1] or text.encode(),
    )


def payload(event: bytes) -> Any:
    assert event.startswith(b"data: ")
    assert event.endswith(b"\n\n")
    return json.loads(event[6:])


def test_offsets_of_logprobs_go_on_from_chunk_to_chunk() -> None:
    shape = completion_shape(logprobs=1, stream=True)
    first = payload(shape.event(0, Chunk(0, "abc", (7, 7), None, None, (logprob("ab"), logprob("c")), 0)))
    second = payload(shape.event(0, Chunk(0, "d", (7,), "stop", 9, (logprob("d", -math.inf),), 0)))
    assert first["choices"][0]["logprobs"]["text_offset"] == [0, 2]
    entry = second["choices"][0]["logprobs"]
    assert entry["text_offset"] == [3]
    assert entry["token_logprobs"] == [LOWEST_LOGPROB]
    assert entry["top_logprobs"] == [{"d": LOWEST_LOGPROB, "z": LOWEST_LOGPROB}]
    assert second["choices"][0]["stop_reason"] == 9


def test_offsets_count_a_character_of_several_tokens_once() -> None:
    part = [TokenLogprob(i, "\ufffd", -0.5, 1, ((i, "\ufffd", -0.5),)) for i in range(3)]
    entries = (*part, logprob("a"), *part, logprob("b"))
    whole = json.loads(
        completion_shape(logprobs=1).whole([Choice(0, "漢a漢b", (7,) * 8, "stop", None, entries)], make_usage(1, 8, 0))
    )
    assert whole["choices"][0]["logprobs"]["text_offset"] == [0, 0, 0, 1, 2, 2, 2, 3]
    stream, found = completion_shape(logprobs=1, stream=True), []
    for text, tokens in (("", entries[:2]), ("漢a", entries[2:5]), ("漢b", entries[5:])):
        event = payload(stream.event(0, Chunk(0, text, (7,), None, None, tokens, 0)))
        found += event["choices"][0]["logprobs"]["text_offset"]
    assert found == [0, 0, 0, 1, 2, 2, 2, 3]
    echo = completion_shape(logprobs=1, echo=True)
    choice = Choice(0, "b", (7,), "stop", None, (logprob("b"),), (*part[1:], logprob("a")))
    told = json.loads(echo.whole([choice], make_usage(4, 1, 0)))["choices"][0]["logprobs"]
    assert told["text_offset"] == [0, 0, 0, 1, 2]


def test_a_chunk_that_says_nothing_is_not_sent() -> None:
    silent = Chunk(0, "", (7,), None, None, None, 0)
    assert completion_shape(stream=True).event(0, silent) == b""
    assert payload(completion_shape(stream=True, return_token_ids=True).event(0, silent))["choices"][0][
        "token_ids"
    ] == [7]


def test_usage_chunk_only_when_asked() -> None:
    usage = make_usage(2, 3, 1)
    assert completion_shape(stream=True).closing(usage) == b""
    asked = completion_shape(stream=True, stream_options={"include_usage": True})
    assert payload(asked.closing(usage))["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": 3,
        "total_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": 1},
    }


def test_chat_opening_gives_every_choice_its_role() -> None:
    shape = ChatShape(
        chat(n=2, stream=True, return_token_ids=True),
        response_id="chatcmpl-1",
        created=5,
        model="m",
        prompt=[1, 2],
        token_bytes=lambda token, text: text.encode(),
    )
    first, second = (payload(part + b"\n\n") for part in shape.opening().split(b"\n\n")[:-1])
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert first["prompt_token_ids"] == [1, 2]
    assert second["choices"][0]["index"] == 1
    assert "prompt_token_ids" not in second
    last = payload(shape.event(1, Chunk(1, "", (0,), "stop", None, None, 0)))["choices"][0]
    assert (last["delta"], last["finish_reason"]) == ({}, "stop")


def test_chat_logprobs_carry_the_exact_bytes_of_half_a_character() -> None:
    shape = ChatShape(
        chat(logprobs=True, top_logprobs=1),
        response_id="chatcmpl-1",
        created=5,
        model="m",
        prompt=[1],
        token_bytes=lambda token, text: b"\xe2\x82" if token == 7 else text.encode(),
    )
    choice = Choice(0, "x", (7,), "stop", None, (logprob("\ufffd"),))
    content = json.loads(shape.whole([choice], make_usage(1, 1, 0)))["choices"][0]["logprobs"]["content"]
    assert content[0]["bytes"] == [0xE2, 0x82]
    assert content[0]["top_logprobs"][1] == {"token": "z", "logprob": LOWEST_LOGPROB, "bytes": [ord("z")]}
