"""Structured output: what a choice must match, as users say it and as the scheduler's grammar library takes it.

Called by the client before anything is sent. A specification at fault costs the scheduler nothing: it is compiled here
first, off the event loop and with a time limit, and a fault of the library can end this frontend only.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, Final

from ipc.errors import GrammarError, InvalidParameterError
from ipc.schema import MAX_GRAMMAR_CHARS

COMPILE_LIMIT_S: Final = 10.0
MAX_CHOICES: Final = 10_000
# One blank, or a new line and its indentation: a model that may write blanks for ever sometimes does.
WHITESPACE: Final = r"( |\r?\n[ \t]{0,32})?"
_MAX_MESSAGE_CHARS: Final = 500
_threads: Final = ThreadPoolExecutor(2, thread_name_prefix="grammar")


@dataclass(frozen=True, kw_only=True)
class StructuredOutputs:
    """What a choice must match: exactly one of these. vLLM's names."""

    json: Mapping[str, Any] | str | None = None  # a JSON schema, as an object or as text
    json_object: bool | None = None  # any JSON object
    regex: str | None = None  # of the whole output
    choice: Sequence[str] | None = None
    grammar: str | None = None  # Lark, or GBNF
    lark: str | None = None  # Lark for sure
    param: str = "structured_outputs"  # how the request calls it, for errors

    def __post_init__(self) -> None:
        given = [f.name for f in fields(self) if f.name != "param" and getattr(self, f.name) not in (None, False)]
        if len(given) != 1:
            names = " and ".join(given) or "nothing"
            raise self._fault(f"exactly one of json, json_object, regex, choice and grammar is needed, got {names}")
        name, value = given[0], getattr(self, given[0])
        if name in ("regex", "grammar", "lark") and not isinstance(value, str):
            raise self._fault(f"{name} must be a string, got {type(value).__name__}")
        if name == "json" and not isinstance(value, (Mapping, str)):
            raise self._fault(f"json must be a JSON schema, got {type(value).__name__}")
        if name == "choice":
            if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(c, str) for c in value):
                raise self._fault("choice must be a list of strings")
            if not 1 <= len(value) <= MAX_CHOICES:
                raise self._fault(f"choice must have 1 to {MAX_CHOICES} strings, got {len(value)}")

    def _fault(self, message: str) -> InvalidParameterError:
        return InvalidParameterError(f"{self.param}: {message}", param=self.param)

    async def compile(self) -> str:
        """The grammar as the scheduler takes it. Raises GrammarError if it is wrong, unsupported or too large."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(COMPILE_LIMIT_S):
                return await loop.run_in_executor(_threads, self._compile)
        except TimeoutError as error:
            raise GrammarError(f"not compiled within {COMPILE_LIMIT_S:.0f} s", param=self.param) from error

    def _compile(self) -> str:
        try:
            text = _short(self._normalized())
        except ImportError as error:
            message = "structured output needs llguidance: pip install 'tandem-engine[structured]'"
            raise InvalidParameterError(message, param=self.param) from error
        except (ValueError, TypeError, RecursionError) as error:
            raise GrammarError(f"{self.param}: {error}", param=self.param) from error
        fault = _fault_of(text)
        if fault:
            raise GrammarError(f"{self.param}: {fault}", param=self.param)
        return text

    def _normalized(self) -> str:
        from llguidance import LLMatcher, grammar_from  # optional, and only needed with the first specification

        if self.json_object:
            return _json_grammar({"type": "object"})
        if self.json is not None:
            return _json_grammar(json.loads(self.json) if isinstance(self.json, str) else self.json)
        if self.regex is not None:
            return str(LLMatcher.grammar_from_regex(self.regex))
        if self.choice is not None:
            # A terminal: llguidance's own rule of choices becomes too complex to follow beyond some two thousand.
            strings = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in self.choice)
            return str(LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {strings}"))
        if self.lark is not None:
            return str(LLMatcher.grammar_from_lark(self.lark))
        return str(grammar_from("grammar", _short(self.grammar or "")))


def of_request(
    response_format: Mapping[str, Any] | None, structured_outputs: Mapping[str, Any] | None, guided: Mapping[str, Any]
) -> StructuredOutputs | None:
    """What a request asks for, in OpenAI's field, in vLLM's, or in vLLM's older ones (`guided`: by name, without
    `guided_`). Raises InvalidParameterError if it asks twice, or for what is not supported."""
    asked = [
        spec for spec in (_of_format(response_format), _of_fields(structured_outputs, "structured_outputs")) if spec
    ]
    asked += [
        StructuredOutputs(**{name: value}, param=f"guided_{name}")
        for name, value in guided.items()
        if value is not None
    ]
    if len(asked) > 1:
        raise InvalidParameterError(f"{asked[0].param} and {asked[1].param} exclude each other", param=asked[1].param)
    return asked[0] if asked else None


def _of_format(value: Mapping[str, Any] | None) -> StructuredOutputs | None:
    kind = (value or {"type": "text"}).get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return StructuredOutputs(json_object=True, param="response_format")
    inner = (value or {}).get("json_schema")
    if kind != "json_schema" or not isinstance(inner, Mapping) or not isinstance(inner.get("schema"), Mapping):
        message = "response_format must be text, json_object, or json_schema with a schema"
        raise InvalidParameterError(message, param="response_format")
    return StructuredOutputs(json=inner["schema"], param="response_format")


def _of_fields(value: Mapping[str, Any] | None, param: str) -> StructuredOutputs | None:
    given = {name: field for name, field in (value or {}).items() if field is not None}
    unknown = given.keys() - StructuredOutputs.__dataclass_fields__.keys() | given.keys() & {"param"}
    if unknown:
        raise InvalidParameterError(f"{param}: {sorted(unknown)[0][:100]!r} is not supported", param=param)
    return StructuredOutputs(**given, param=param) if given else None


def _short(text: str) -> str:
    if len(text) > MAX_GRAMMAR_CHARS:
        raise ValueError(f"{len(text)} characters, the limit is {MAX_GRAMMAR_CHARS}")
    return text


def _json_grammar(schema: Any) -> str:
    from llguidance import LLMatcher

    if not isinstance(schema, Mapping):
        raise TypeError(f"a JSON schema must be an object, got {type(schema).__name__}")
    text = json.dumps(dict(schema), allow_nan=False)
    return str(LLMatcher.grammar_from_json_schema(text, defaults={"whitespace_pattern": WHITESPACE}))


@lru_cache(maxsize=256)
def _fault_of(grammar: str) -> str:
    """Why a grammar cannot be used; empty if it can."""
    from llguidance import LLMatcher

    message = " ".join(str(LLMatcher.validate_grammar(grammar)).split())
    return message[:_MAX_MESSAGE_CHARS]
