"""Tool calls: what a request may offer, how a model is made to call, and how its text becomes calls.

Used by the HTTP server. Pure: parsers are small state machines over the text of one choice, and any cut of that text
into pieces gives the same content and the same calls. Nothing that a model writes is lost: what turns out to be no
call is content.

    hermes       <tool_call>{"name": ..., "arguments": {...}}</tool_call>, any number, text around them (Qwen, Hermes);
                 the closing tag may be missing, and so may the arguments
    llama3_json  {"name": ..., "parameters": {...}}, separated by ';', from the first character on (Llama 3)
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from frontend.call_scanner import CallScanner
from frontend.structured import WHITESPACE, StructuredOutputs
from ipc.errors import InvalidParameterError

PARSERS: Final = ("hermes", "llama3_json")
MAX_TOOLS: Final = 512
_NAME: Final = re.compile(r"[a-zA-Z0-9_.-]{1,64}")
_OPEN: Final = "<tool_call>"
_CLOSE: Final = "</tool_call>"


@dataclass(slots=True)
class CallDelta:
    """A part of the call number `index` of a choice; the first one has the id and the name."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(slots=True)
class Parsed:
    """What one piece of text brought."""

    content: str = ""
    calls: list[CallDelta] = field(default_factory=list)


class ToolParser(Protocol):
    """The text of one choice, piece by piece."""

    num_calls: int

    def push(self, text: str, final: bool) -> Parsed:
        """What `text` adds; with `final` nothing is held back any more."""


class _Parser:
    """What the formats share: the call being read, and blanks held back because a call may follow them."""

    def __init__(self) -> None:
        self.num_calls = 0
        self._buffer = ""
        self._blanks = ""
        self._call: CallScanner | None = None
        self._parsed = Parsed()

    def push(self, text: str, final: bool) -> Parsed:
        self._parsed = Parsed()
        self._buffer += text
        while self._step(final):
            pass
        if final:
            self._end()
        return self._parsed

    def _step(self, final: bool) -> bool:
        """Take something off the buffer; False if more text is needed."""
        raise NotImplementedError

    def _end(self) -> None:
        if self._call is not None:
            self._say(self._call.unannounced)
            self._call = None
        if not self.num_calls:
            self._parsed.content += self._blanks
        self._blanks = ""

    def _say(self, text: str) -> None:
        """Content, but for the blanks before and between calls."""
        text = self._blanks + text
        kept = text.rstrip()
        self._blanks = text[len(kept) :]
        self._parsed.content += kept

    def _read_call(self) -> bool:
        """Feed the buffer to the call being read; True once it has ended, well or not."""
        call = self._call
        assert call is not None, "no call is being read"
        used = call.push(self._buffer)
        self._buffer = self._buffer[used:]
        if call.take_announcement():
            self._parsed.calls.append(CallDelta(self.num_calls, f"call_{uuid.uuid4().hex[:24]}", call.name))
            self.num_calls += 1
            self._blanks = ""
        if arguments := call.take_arguments():
            last = self._parsed.calls[-1] if self._parsed.calls else None
            if last is None or last.index != self.num_calls - 1:
                last = CallDelta(self.num_calls - 1)
                self._parsed.calls.append(last)
            last.arguments += arguments
        return call.done or call.failed


class HermesParser(_Parser):
    """Calls between tags, content elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self._unclosed = False  # the closing tag of the last call has not come; it may be missing

    def _step(self, final: bool) -> bool:
        if self._call is not None:
            if not self._read_call():
                return False
            if self._call.failed and not self._call.announced:
                self._say(_OPEN + self._call.unannounced)
            else:
                self._unclosed = True
            self._call = None
            return True
        tags = (_OPEN, _CLOSE) if self._unclosed else (_OPEN,)
        tag = min((tag for tag in tags if tag in self._buffer), key=self._buffer.index, default="")
        if not tag:
            held = "" if final else max((_partial(self._buffer, tag) for tag in tags), key=len)
            self._say(self._buffer[: len(self._buffer) - len(held)])
            self._buffer = held
            return False
        before, _, self._buffer = self._buffer.partition(tag)
        self._say(before)
        self._unclosed = False
        if tag == _OPEN:
            self._call = CallScanner("arguments", "parameters")
        else:
            self._blanks = ""  # those before the tag are the call's, not content
        return bool(self._buffer) or final

    def _end(self) -> None:
        if self._call is not None and not self._call.announced:
            self._say(_OPEN)
        super()._end()


class Llama3JsonParser(_Parser):
    """Calls one after the other from the start; text that does not start as a call is content to its end."""

    def __init__(self) -> None:
        super().__init__()
        self._is_text = False

    def _step(self, final: bool) -> bool:
        if self._is_text:
            self._say(self._buffer)
            self._buffer = ""
            return False
        if self._call is not None:
            if not self._read_call():
                return False
            if self._call.failed:
                self._is_text = True
                self._say(self._call.unannounced)
            self._call = None
            return True
        rest = self._buffer.lstrip(" \n\t;" if self.num_calls else " \n\t")
        skipped, self._buffer = self._buffer[: len(self._buffer) - len(rest)], rest
        if not self.num_calls:
            self._blanks += skipped
        if not rest:
            return False
        if rest[0] == "{":
            # Nothing but the arguments tells a call from an answer in JSON that happens to have a name.
            self._call = CallScanner("parameters", "arguments", needs_arguments=True)
        else:
            self._is_text = True
        return True


def _partial(text: str, tag: str) -> str:
    """The longest end of `text` that may become `tag`."""
    for n in range(min(len(tag) - 1, len(text)), 0, -1):
        if text.endswith(tag[:n]):
            return tag[:n]
    return ""


def parser_for(chat_template: str) -> str:
    """The name of the parser that goes with a chat template."""
    return "llama3_json" if _OPEN not in chat_template and "<|python_tag|>" in chat_template else "hermes"


def make_parser(name: str) -> ToolParser:
    return Llama3JsonParser() if name == "llama3_json" else HermesParser()


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools of one request, checked."""

    tools: Sequence[Mapping[str, Any]]  # as the chat template gets them
    parser: str
    grammar: StructuredOutputs | None  # None: the model decides whether to call


def tool_use(tools: Sequence[Mapping[str, Any]] | None, choice: Any, parallel: bool, parser: str) -> ToolUse | None:
    """What a request says of tools; None if there are none or they are not to be called.

    Raises InvalidParameterError naming the field.
    """
    functions = _check_tools(tools or ())
    if choice is None:
        choice = "auto" if functions else "none"
    if choice == "none" or (choice == "auto" and not functions):
        return None
    named = choice.get("function") if isinstance(choice, Mapping) and choice.get("type") == "function" else None
    if named is None and choice not in ("auto", "required"):
        raise InvalidParameterError("tool_choice must be none, auto, required or a named function", param="tool_choice")
    if not functions:
        raise InvalidParameterError("tool_choice needs tools", param="tool_choice")
    grammar = None
    if named is not None:
        name = named.get("name") if isinstance(named, Mapping) else None
        functions = [function for function in functions if function["name"] == name]
        if not functions:
            raise InvalidParameterError(f"tool_choice names {str(name)[:64]!r}, which is no tool", param="tool_choice")
    if choice != "auto":
        grammar = _call_grammar(functions, parallel and named is None, parser)
    return ToolUse(list(tools or ()), parser, grammar)


def _check_tools(tools: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    if len(tools) > MAX_TOOLS:
        raise InvalidParameterError(f"{len(tools)} tools, the limit is {MAX_TOOLS}", param="tools")
    functions: list[Mapping[str, Any]] = []
    for tool in tools:
        function = tool.get("function")
        if tool.get("type") != "function" or not isinstance(function, Mapping):
            raise InvalidParameterError("each tool must have the type function, and a function", param="tools")
        name, parameters = function.get("name"), function.get("parameters")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise InvalidParameterError("a tool's name must be 1 to 64 letters, digits, _, . or -", param="tools")
        if parameters is not None and not isinstance(parameters, Mapping):
            raise InvalidParameterError(f"parameters of {name} must be a JSON schema", param="tools")
        if any(name == other["name"] for other in functions):
            raise InvalidParameterError(f"two tools are called {name}", param="tools")
        functions.append(function)
    return functions


def _call_grammar(functions: Sequence[Mapping[str, Any]], parallel: bool, parser: str) -> StructuredOutputs:
    """A grammar of one call or, if `parallel`, of several, in the format that the parser reads."""
    before, after, between, key = (
        (f"{_OPEN}\n", f"\n{_CLOSE}", "\n", "arguments") if parser == "hermes" else ("", "", "; ", "parameters")
    )
    lines = [f"start: call ({json.dumps(between)} call)*" if parallel else "start: call"]
    lines.append("call: " + " | ".join(f"call_{i}" for i in range(len(functions))))
    for i, function in enumerate(functions):
        schema = {
            "type": "object",
            **(function.get("parameters") or {}),
            "x-guidance": {"whitespace_pattern": WHITESPACE},
        }
        head = f'{before}{{"name": {json.dumps(function["name"])}, "{key}": '
        lines.append(f"call_{i}: {json.dumps(head)} arguments_{i} {json.dumps('}' + after)}")
        try:
            lines.append(f"arguments_{i}: %json {json.dumps(schema)}")
        except (ValueError, RecursionError) as error:
            message = f"parameters of {function['name']} cannot be used: {error}"
            raise InvalidParameterError(message, param="tools") from error
    return StructuredOutputs(lark="\n".join(lines) + "\n", param="tools")


def template_calls(calls: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Calls of an earlier answer as chat templates expect them: arguments as an object, not as JSON text."""
    return [_with_object(call) for call in calls]


def _with_object(call: Mapping[str, Any]) -> Mapping[str, Any]:
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}}
