"""Tool calls through the openai client and the demo model: forced by a grammar, streamed, and told back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.e2e.engine import Engine, running_engine

pytest.importorskip("llguidance")

WAIT_S = 120.0
ORDER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "order",
        "description": "Order a dish.",
        "parameters": {
            "type": "object",
            "properties": {
                "dish": {"enum": ["soup", "fish"]},
                "count": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["dish", "count"],
            "additionalProperties": False,
        },
    },
}
STOP: dict[str, Any] = {
    "type": "function",
    "function": {"name": "stop", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}},
}
NAMED: dict[str, Any] = {"type": "function", "function": {"name": "order"}}


@pytest.fixture(scope="module", params=[("hermes", 1), ("llama3_json", 3)], ids=["hermes", "llama3, three frontends"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    parser, frontends = request.param
    with running_engine("--max-num-seqs", "16", "--tool-call-parser", parser, "--frontends", str(frontends)) as engine:
        yield engine


@pytest.fixture
def sdk(engine: Engine) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=engine.url, api_key="none", max_retries=0, timeout=WAIT_S) as client:
        yield client


def options(**changes: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Something to eat, please."}]
    asked = {"model": "demo", "messages": messages, "tools": [ORDER, STOP], "seed": 4, "max_tokens": 600}
    return {**asked, **changes}


def check_call(call: Any) -> None:
    assert call.type == "function"
    assert call.id.startswith("call_")
    arguments = json.loads(call.function.arguments)
    if call.function.name == "order":
        assert arguments["dish"] in ("soup", "fish")
        assert arguments["count"] in range(1, 10)
    else:
        assert (call.function.name, arguments) == ("stop", {})


def test_calls_that_must_be_made_are_made(sdk: openai.OpenAI) -> None:
    for choice in ("required", NAMED):
        answer = sdk.chat.completions.create(**options(tool_choice=choice, parallel_tool_calls=False, n=3))
        for given in answer.choices:
            assert (given.finish_reason, given.message.content) == ("tool_calls", None)
            (call,) = given.message.tool_calls
            check_call(call)
            assert choice == "required" or call.function.name == "order"


def test_a_stream_brings_the_same_calls(sdk: openai.OpenAI) -> None:
    asked = options(tool_choice="required", parallel_tool_calls=False)
    whole = sdk.chat.completions.create(**asked).choices[0].message.tool_calls[0].function
    name, arguments, finish, ids = "", "", [], []
    for chunk in sdk.chat.completions.create(**asked, stream=True):
        (choice,) = chunk.choices
        finish.append(choice.finish_reason)
        for call in choice.delta.tool_calls or ():
            assert call.index == 0
            ids.append(call.id)
            assert (call.id is None) == (call.function.name is None), "the name comes with the id, once"
            name += call.function.name or ""
            arguments += call.function.arguments
        assert not choice.delta.content
    assert (name, arguments) == (whole.name, whole.arguments)
    assert [i is not None for i in ids] == [True] + [False] * (len(ids) - 1)
    assert finish[-1] == "tool_calls"
    assert set(finish[:-1]) == {None}


def test_calls_and_their_results_are_part_of_the_conversation(sdk: openai.OpenAI) -> None:
    first = sdk.chat.completions.create(**options(tool_choice=NAMED)).choices[0].message
    history = [
        {"role": "user", "content": "Something to eat, please."},
        first.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "It is on its way."},
    ]
    answer = sdk.chat.completions.create(**options(messages=history, tool_choice="none"))
    assert answer.choices[0].message.tool_calls is None
    assert isinstance(answer.choices[0].message.content, str)


def test_the_model_may_decide_not_to_call(sdk: openai.OpenAI) -> None:
    plain = sdk.chat.completions.create(**options(temperature=0, tools=openai.omit)).choices[0]
    auto = sdk.chat.completions.create(**options(temperature=0)).choices[0]
    assert auto.message.tool_calls is None
    assert auto.message.content.strip() == plain.message.content.strip()


@pytest.mark.parametrize(
    "changes",
    [
        {"tool_choice": "required", "tools": openai.omit},
        {"tool_choice": {"type": "function", "function": {"name": "fly"}}},
        {"tool_choice": "required", "response_format": {"type": "json_object"}},
        {
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "nothing"}}}],
            "tool_choice": "required",
        },
    ],
)
def test_what_cannot_be_is_400(sdk: openai.OpenAI, changes: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError):
        sdk.chat.completions.create(**options(**changes))
