"""What requests may ask for as structured output, and what is refused before anything is sent."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from frontend.request import GenerateParams
from frontend.structured import MAX_CHOICES, StructuredOutputs, of_request
from ipc.errors import GrammarError, InvalidParameterError, RequestError

pytest.importorskip("llguidance")

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}


def compiled(**spec: Any) -> str:
    return asyncio.run(StructuredOutputs(**spec).compile())


def test_every_way_to_ask_means_the_same() -> None:
    ways = [
        of_request(FORMAT, None, {}),
        of_request(None, {"json": SCHEMA}, {}),
        of_request(None, {"json": json.dumps(SCHEMA), "regex": None}, {}),
        of_request({"type": "text"}, None, {"json": SCHEMA, "regex": None}),
    ]
    assert len({asyncio.run(way.compile()) for way in ways if way is not None}) == 1
    assert None not in ways
    assert of_request(None, None, {"json": None}) is None
    assert of_request({"type": "text"}, {}, {}) is None


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        (({"type": "xml"}, None, {}), "response_format"),
        (({}, None, {}), None),
        (({"type": "json_schema"}, None, {}), "response_format"),
        (({"type": "json_schema", "json_schema": {"schema": [1]}}, None, {}), "response_format"),
        ((None, {"json": SCHEMA, "regex": "a"}, {}), "structured_outputs"),
        ((None, {"structural_tag": "x"}, {}), "structured_outputs"),
        ((None, {"param": "x"}, {}), "structured_outputs"),
        ((None, {"regex": 5}, {}), "structured_outputs"),
        ((None, {"json": 5}, {}), "structured_outputs"),
        ((None, {"choice": []}, {}), "structured_outputs"),
        ((None, {"choice": "yes"}, {}), "structured_outputs"),
        ((None, {"choice": ["yes", 5]}, {}), "structured_outputs"),
        ((FORMAT, {"regex": "a"}, {}), "structured_outputs"),
        ((FORMAT, None, {"regex": "a"}), "guided_regex"),
        ((FORMAT, None, {"regex": ""}), "guided_regex"),
        ((None, None, {"choice": []}), "guided_choice"),
    ],
)
def test_what_is_not_one_specification_is_refused(asked: tuple[Any, Any, Any], param: str | None) -> None:
    if param is None:
        assert of_request(*asked) is None
        return
    with pytest.raises(InvalidParameterError) as caught:
        of_request(*asked)
    assert caught.value.param == param


def outcome(asked: StructuredOutputs | None) -> str:
    """The grammar, or what is said against it."""
    assert asked is not None, "it was ignored"
    try:
        return asyncio.run(asked.compile())
    except GrammarError as error:
        return error.message.removeprefix(f"{asked.param}: ")


@pytest.mark.parametrize(("name", "value"), [("json", {}), ("json", ""), ("regex", ""), ("grammar", "")])
def test_an_empty_guided_field_means_what_structured_outputs_means(name: str, value: Any) -> None:
    assert outcome(of_request(None, None, {name: value})) == outcome(of_request(None, {name: value}, {}))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"regex": "(a"}, "unclosed group"),
        ({"regex": "(" * 100_000 + "a" + ")" * 100_000}, "regex"),
        ({"regex": "a" * 300_000}, "300"),
        ({"json": {"type": "objec"}}, "Invalid type"),
        ({"json": {"if": {}}}, "Unimplemented keys"),
        ({"json": "{"}, "Expecting"),
        ({"json": "[]"}, "must be an object"),
        ({"json": json.loads('{"properties":{"a":' * 300 + "{}" + "}}" * 300)}, "recursion"),
        ({"json": {"enum": ["value" * 4 + str(i) for i in range(9_000)] * 2}}, "the limit is"),
        ({"grammar": "root ::= ("}, "grammar"),
        ({"grammar": "start: undefined"}, "undefined"),
        ({"grammar": "start: " + "(" * 50_000 + '"a"' + ")" * 50_000}, "nested"),
    ],
)
def test_a_specification_at_fault_says_why(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(GrammarError, match=message) as caught:
        compiled(**spec)
    assert caught.value.status == 400
    assert len(caught.value.message) < 700


@pytest.mark.parametrize(
    "spec",
    [
        {"json_object": True},
        {"regex": r"(a{1,1000}){1,1000}"},
        {"regex": r"(a|b)*a(a|b){30}"},
        {"choice": ["a", 'quote"', "line\nbreak", "Zürich"]},
        {"grammar": 'root ::= "a" root | "b"'},
        {"grammar": 'start: "a" start | "b"'},
    ],
)
def test_what_is_right_compiles(spec: dict[str, Any]) -> None:
    assert compiled(**spec)


def test_all_choices_that_are_allowed_can_be_followed() -> None:
    import llguidance

    demo = Path(__file__).resolve().parents[2] / "models" / "demo" / "tokenizer.json"
    tokenizer = llguidance.LLTokenizer(demo.read_text(), eos_token=[0])
    choices = [f"{i * 7919 % 100_003:05}" for i in range(MAX_CHOICES)]
    limits = llguidance.LLParserLimits(verbose_errors=False)
    matcher = llguidance.LLMatcher(tokenizer, compiled(choice=choices), log_level=0, limits=limits)
    assert matcher.consume_tokens(tokenizer.tokenize_str(choices[77])), matcher.get_error()
    assert matcher.is_accepting()


def test_min_tokens_cannot_hold_back_a_grammar_that_is_complete() -> None:
    with pytest.raises(RequestError, match="min_tokens must be 0"):
        GenerateParams(min_tokens=3, structured_outputs=StructuredOutputs(regex="a"))
    with pytest.raises(InvalidParameterError, match="structured_outputs"):
        GenerateParams(structured_outputs={"regex": "a"})  # type: ignore[arg-type]
