"""Tool calls: parsers give the same whatever the cut, and what a request says of tools is checked."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frontend.tools import ToolParser, make_parser, parser_for, template_calls, tool_use
from ipc.errors import InvalidParameterError

Calls = list[tuple[str, str]]
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"$ref": "#/$defs/city"}},
            "required": ["city"],
            "additionalProperties": False,
            "$defs": {"city": {"type": "string", "maxLength": 9}},
        },
    },
}
DEEP: dict[str, Any] = {}
for _ in range(5000):
    DEEP = {"items": DEEP}
TIME: dict[str, Any] = {"type": "function", "function": {"name": "get-time"}}


def parse(parser: ToolParser, pieces: list[str]) -> tuple[str, Calls]:
    content, calls, ids = "", Calls(), set()
    for i, piece in enumerate(pieces):
        parsed = parser.push(piece, i == len(pieces) - 1)
        content += parsed.content
        for delta in parsed.calls:
            if delta.id is not None:
                assert delta.name is not None
                assert delta.index == len(calls), "calls are numbered in order"
                ids.add(delta.id)
                calls.append((delta.name, delta.arguments))
            else:
                assert delta.index == len(calls) - 1, "arguments belong to the call that began last"
                calls[-1] = (calls[-1][0], calls[-1][1] + delta.arguments)
    assert len(ids) == len(calls) == parser.num_calls
    return content, calls


ARGUMENTS = '{"city": "Oslo \\"}{\\u00e9 é", "n": [1, {"a": null}]}'
F = '<tool_call>{"name": "f", "arguments": {"x": 1}}'
G = '<tool_call>{"name": "g", "arguments": {}}'
CASES: list[tuple[str, str, str, Calls]] = [
    ("hermes", "Hello there.\n", "Hello there.\n", []),
    ("hermes", '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>', "", [("f", "{}")]),
    (
        "hermes",
        f'I look.\n<tool_call>{{"name":"f","arguments":{ARGUMENTS}}}</tool_call>\n'
        '<tool_call> {"name": "g"} </tool_call>\n',
        "I look.",
        [("f", ARGUMENTS), ("g", "{}")],
    ),
    ("hermes", f'<tool_call>{{"arguments": {ARGUMENTS}, "name": "f"}}</tool_call> and', " and", [("f", ARGUMENTS)]),
    ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("f", '{"a": 1}')]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": [1, ', "", [("f", '{"a": [1, ')]),
    ("hermes", '<tool_call>{"id": 3, "name": "f", "arguments": 7 , "x": {}}</tool_call>', "", [("f", "7")]),
    ("hermes", "a < b <tool_cal l> <tool_call", "a < b <tool_cal l> <tool_call", []),
    ("hermes", "<tool_call>not json</tool_call> x", "<tool_call>not json</tool_call> x", []),
    ("hermes", '<tool_call>{"nam', '<tool_call>{"nam', []),
    ("hermes", '<tool_call>{"name": 5}</tool_call>', '<tool_call>{"name": 5}</tool_call>', []),
    ("hermes", f"{F}\n{G}</tool_call>", "", [("f", '{"x": 1}'), ("g", "{}")]),
    ("hermes", f"{F}\nHere is the answer: 42.", "\nHere is the answer: 42.", [("f", '{"x": 1}')]),
    ("hermes", f"{F} trailing\n</tool_call>\nmore", " trailing\nmore", [("f", '{"x": 1}')]),
    ("hermes", f"{F}\n</tool_call></tool_call>", "</tool_call>", [("f", '{"x": 1}')]),
    ("hermes", f"{F} </tool_x <tool_call>no</tool_call", " </tool_x <tool_call>no</tool_call", [("f", '{"x": 1}')]),
    ("hermes", f"{F[:-1]} oops</tool_call>", "oops", [("f", '{"x": 1}')]),
    ("hermes", f"{F[:-1]}\n{G[:-1]}</tool_call>", "", [("f", '{"x": 1}'), ("g", "{}")]),
    ("hermes", f"<tool_call>{F}", "<tool_call>", [("f", '{"x": 1}')]),
    ("llama3_json", f'{{"name": "f", "parameters": {ARGUMENTS}}}', "", [("f", ARGUMENTS)]),
    ("llama3_json", '{"name": "f", "parameters": {}}; {"name": "g", "parameters": ""}', "", [("f", "{}"), ("g", "{}")]),
    ("llama3_json", '{"name": "f", "parameters": {}}; {"name": "g"}', '{"name": "g"}', [("f", "{}")]),
    ("llama3_json", '{"name": "Bob", "age": 3}', '{"name": "Bob", "age": 3}', []),
    ("llama3_json", '{"name":"f","parameters":{"x":1} oops more', "oops more", [("f", '{"x":1}')]),
    ("llama3_json", ' \n{"name": "f", "arguments": {"a": 1}}', "", [("f", '{"a": 1}')]),
    ("llama3_json", 'The answer is {"name": "f"}', 'The answer is {"name": "f"}', []),
    ("llama3_json", '{"city": "Oslo"}', '{"city": "Oslo"}', []),
    ("llama3_json", '{"name" "f"}', '{"name" "f"}', []),
    ("llama3_json", "", "", []),
]


@pytest.mark.parametrize(("kind", "text", "content", "calls"), CASES)
def test_texts_become_calls_and_content(kind: str, text: str, content: str, calls: Calls) -> None:
    assert parse(make_parser(kind), [text]) == (content, calls)
    assert parse(make_parser(kind), [*text, ""]) == (content, calls)
    for cut in range(len(text) + 1):
        assert parse(make_parser(kind), [text[:cut], text[cut:]]) == (content, calls)


PARTS = st.sampled_from(
    [
        *(
            F,
            G,
            F[:-1],
            "<tool_call>",
            "</tool_call>",
            "<tool_",
            "</tool",
            "{",
            "}",
            '{"name": "f", ',
            '"arguments": ',
            '"parameters": ',
            ";",
        ),
        *('{"a": "b\\""}', " ", "\n", '"', "\\", "text", '{"name": "f", "arguments": {"a": [1, 2]}}', "[", "]", ","),
    ]
)


@settings(max_examples=600, deadline=None)
@given(st.sampled_from(["hermes", "llama3_json"]), st.lists(PARTS, max_size=14), st.data())
def test_any_cut_gives_the_same(kind: str, parts: list[str], data: st.DataObject) -> None:
    text = "".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = parse(make_parser(kind), [text])
    assert parse(make_parser(kind), pieces) == whole
    assert parse(make_parser(kind), [*text, ""]) == whole
    if not whole[1]:
        assert whole[0] == text, "what is no call is content, to the letter"


SEGMENTS = st.sampled_from(
    [(F, "f"), (G, "g"), (f"{F}\n</tool_call>", "f"), ("some text", ""), ("</tool", ""), ("<t", ""), ("\n", "")]
)


@settings(max_examples=300, deadline=None)
@given(st.lists(SEGMENTS, max_size=8))
def test_text_and_calls_survive_missing_closing_tags(segments: list[tuple[str, str]]) -> None:
    content, calls = parse(make_parser("hermes"), [*"".join(text for text, _ in segments), ""])
    assert [name for name, _ in calls] == [name for _, name in segments if name]
    said = "".join(text for text, name in segments if not name)
    assert "".join(content.split()) == "".join(said.split())


def test_arguments_stream_as_they_come() -> None:
    parser = make_parser("hermes")
    first = parser.push('<tool_call>{"name": "f", "arguments": {"a', False)
    assert [(c.name, c.arguments) for c in first.calls] == [("f", '{"a')]
    assert [(c.id, c.arguments) for c in parser.push('": 1', False).calls] == [(None, '": 1')]


def test_the_parser_follows_the_chat_template() -> None:
    assert parser_for("... <tool_call> ...") == "hermes"
    assert parser_for("... <|python_tag|> ...") == "llama3_json"
    assert parser_for("{{ messages }}") == "hermes"


@pytest.mark.parametrize(
    ("tools", "choice", "param"),
    [
        ([{"type": "function"}], None, "tools"),
        ([{"type": "x", "function": {"name": "f"}}], None, "tools"),
        ([{"type": "function", "function": {"name": "f g"}}], None, "tools"),
        ([{"type": "function", "function": {"name": "f", "parameters": 3}}], None, "tools"),
        ([WEATHER, WEATHER], None, "tools"),
        ([{"type": "function", "function": {"name": "f", "parameters": DEEP}}], "required", "tools"),
        (None, "required", "tool_choice"),
        ([WEATHER], "sometimes", "tool_choice"),
        ([WEATHER], {"type": "function"}, "tool_choice"),
        ([WEATHER], {"type": "function", "function": {"name": "g"}}, "tool_choice"),
    ],
)
def test_what_a_request_says_of_tools_is_checked(tools: Any, choice: Any, param: str) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        tool_use(tools, choice, True, "hermes")
    assert caught.value.param == param


def test_tools_are_used_or_not() -> None:
    assert tool_use(None, None, True, "hermes") is None
    assert tool_use([], "auto", True, "hermes") is None
    assert tool_use([WEATHER], "none", True, "hermes") is None
    auto = tool_use([WEATHER], None, True, "hermes")
    assert auto is not None
    assert auto.grammar is None


@pytest.mark.parametrize("kind", ["hermes", "llama3_json"])
def test_the_grammar_of_calls_is_what_the_parser_reads(kind: str) -> None:
    llguidance = pytest.importorskip("llguidance")
    tokens = llguidance.LLTokenizer("byte")
    named = {"type": "function", "function": {"name": "get_weather"}}
    for choice, parallel, count in (("required", True, 2), ("required", False, 1), (named, True, 1)):
        use = tool_use([WEATHER, TIME], choice, parallel, kind)
        assert use is not None and use.grammar is not None
        matcher = llguidance.LLMatcher(tokens, asyncio.run(use.grammar.compile()))
        calls = [("get_weather", '{"city": "Oslo"}'), ("get-time", "{}")][:count]
        key = "arguments" if kind == "hermes" else "parameters"
        bodies = [f'{{"name": "{name}", "{key}": {arguments}}}' for name, arguments in calls]
        text = (
            "\n".join(f"<tool_call>\n{body}\n</tool_call>" for body in bodies)
            if kind == "hermes"
            else "; ".join(bodies)
        )
        assert matcher.consume_tokens(tokens.tokenize_str(text)), matcher.get_error()
        assert matcher.is_accepting()
        assert parse(make_parser(kind), [text]) == ("", calls)


def test_earlier_calls_reach_the_template_as_objects() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    broken = {"function": {"name": "f", "arguments": "{"}}
    found = template_calls([call, broken])
    assert found[0]["function"]["arguments"] == {"a": 1}
    assert found[1] == broken
    assert json.loads(call["function"]["arguments"]) == {"a": 1}  # type: ignore[index]
