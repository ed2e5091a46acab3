"""How finished choices and stream chunks are written in the two formats of the OpenAI API.

Called by the HTTP server, once a chunk: pure, and encoded once. A shape knows one response: its id, model and prompts.
"""

from __future__ import annotations

import uuid
from codecs import IncrementalDecoder
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple, Protocol, TypeVar

import msgspec
from msgspec import UNSET, UnsetType

from frontend.openai import ChatRequest, CompletionRequest, sse
from frontend.request import Choice, Chunk, TokenLogprob
from frontend.tokenizer import new_utf8_decoder
from frontend.tools import CallDelta, ToolParser, make_parser

LOWEST_LOGPROB: Final = -9999.0  # JSON has no infinity
TokenBytes = Callable[[int, str], bytes]
P = TypeVar("P", Chunk, Choice)
_HOLE: Final = uuid.uuid4().hex  # stands for a text while the rest of its event is encoded; nobody can guess it
_encode_json: Final = msgspec.json.Encoder().encode


class PromptDetails(msgspec.Struct, frozen=True):
    cached_tokens: int


class Usage(msgspec.Struct, frozen=True):
    """Tokens of a response: each prompt once, all choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


def make_usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> Usage:
    return Usage(prompt_tokens, completion_tokens, prompt_tokens + completion_tokens, PromptDetails(cached_tokens))


class CompletionChoice(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    text: str
    logprobs: dict[str, Any] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    prompt_logprobs: Sequence[dict[str, Any] | None] | UnsetType = UNSET
    token_ids: Sequence[int] | UnsetType = UNSET
    prompt_token_ids: Sequence[int] | UnsetType = UNSET


class FunctionCall(msgspec.Struct, frozen=True, kw_only=True):
    name: str | UnsetType = UNSET
    arguments: str


class ToolCall(msgspec.Struct, frozen=True, kw_only=True):
    """A call, or in a delta a part of one: only its first part has an id and a name."""

    index: int | UnsetType = UNSET
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET
    function: FunctionCall


class ChatText(msgspec.Struct, frozen=True, kw_only=True):
    """A message or a delta."""

    role: str | UnsetType = UNSET
    content: str | UnsetType | None = UNSET
    tool_calls: Sequence[ToolCall] | UnsetType = UNSET


class ChatChoice(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    message: ChatText | UnsetType = UNSET
    delta: ChatText | UnsetType = UNSET
    logprobs: dict[str, Any] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: Sequence[int] | UnsetType = UNSET


class Body(msgspec.Struct, frozen=True, kw_only=True):
    """A whole response, or one event of a stream."""

    id: str
    object: str
    created: int
    model: str
    choices: Sequence[CompletionChoice | ChatChoice]
    usage: Usage | UnsetType | None = UNSET
    prompt_logprobs: Sequence[dict[str, Any] | None] | UnsetType = UNSET
    prompt_token_ids: Sequence[int] | UnsetType = UNSET


class Shape(Protocol):
    """One response being written."""

    def opening(self) -> bytes:
        """Events before any token."""

    def event(self, index: int, chunk: Chunk) -> bytes:
        """The event of one chunk of choice `index`; empty if there is nothing to say."""

    def closing(self, usage: Usage) -> bytes:
        """Events after the last chunk, without [DONE]."""

    def whole(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        """The JSON of a response that is not streamed."""


class Echo(NamedTuple):
    """A prompt to be repeated: its text, and that of its first token alone."""

    text: str
    first_token: str


class PlainEvents:
    """Events that say nothing but a piece of text: everything around it is encoded once a choice."""

    def __init__(self, encode_with: Callable[[int, str], bytes]) -> None:
        """`encode_with` gives the whole event of choice `index` with some text."""
        self._encode_with = encode_with
        self._around: dict[int, list[bytes]] = {}

    def event(self, index: int, text: str) -> bytes:
        around = self._around.get(index)
        if around is None:
            around = self._around[index] = self._encode_with(index, _HOLE).split(_HOLE.encode())
            assert len(around) == 2, "the text stands once in its event"
        return around[0] + _encode_json(text)[1:-1] + around[1]


class CompletionShape:
    """/v1/completions. `prompts` are token ids, `echoes` the prompts if they are to be repeated, `token_bytes` that of
    ChatShape."""

    def __init__(
        self,
        request: CompletionRequest,
        *,
        response_id: str,
        created: int,
        model: str,
        prompts: Sequence[Sequence[int]],
        echoes: Sequence[Echo] | None,
        token_bytes: TokenBytes,
    ) -> None:
        self._head = _head(response_id, "text_completion", created, model)
        self._request = request
        self._choices_per_prompt = request.n or 1
        self._prompts = prompts
        self._echoes = echoes
        self._token_bytes = token_bytes
        self._written: dict[int, int] = {}  # characters so far, by choice
        self._decoders = defaultdict[int, IncrementalDecoder](new_utf8_decoder)  # by choice
        self._plain = PlainEvents(self._plain_event)

    def opening(self) -> bytes:
        return b""

    def _offsets(self, decoder: IncrementalDecoder, entries: Sequence[TokenLogprob], offset: int) -> list[int]:
        """Where the text of each token begins, in characters; a token inside of a character begins where that does."""
        offsets = []
        for entry in entries:
            offsets.append(offset)
            offset += len(decoder.decode(self._token_bytes(entry.token_id, entry.token)))
        return offsets

    def _choice(self, index: int, part: Chunk | Choice) -> CompletionChoice:
        prompt = index // self._choices_per_prompt
        first = index not in self._written
        echo = self._echoes[prompt] if self._echoes and first else None
        text = part.text if echo is None else echo.text + part.text
        offset = self._written.get(index, 0)
        self._written[index] = offset + len(text)
        logprobs = None
        if part.logprobs is not None:
            start = offset if echo is None else len(echo.text)
            offsets = self._offsets(self._decoders[index], part.logprobs, start)
            logprobs = _completion_logprobs(part.logprobs, offsets)
            if echo is not None:
                self._add_prompt(logprobs, echo, self._prompts[prompt], part.prompt_logprobs or ())
        wants_ids = bool(self._request.return_token_ids)
        return CompletionChoice(
            index=index,
            text=text,
            logprobs=logprobs,
            finish_reason=part.finish_reason,
            stop_reason=part.stop_reason,
            prompt_logprobs=_prompt_logprobs(self._request.prompt_logprobs, part),
            token_ids=part.token_ids if wants_ids else UNSET,
            prompt_token_ids=self._prompts[prompt] if wants_ids and first else UNSET,
        )

    def event(self, index: int, chunk: Chunk) -> bytes:
        if _is_plain(chunk) and index in self._written and not self._request.return_token_ids:
            self._written[index] += len(chunk.text)
            return self._plain.event(index, chunk.text)
        if _says_nothing(chunk, bool(self._request.return_token_ids)) and not (
            self._echoes and index not in self._written
        ):
            return b""
        usage = None if self._request.include_usage else UNSET
        return sse(Body(**self._head, choices=[self._choice(index, chunk)], usage=usage))

    def _add_prompt(
        self, generated: dict[str, Any], echo: Echo, prompt: Sequence[int], scored: Sequence[TokenLogprob]
    ) -> None:
        """Put the log-probabilities of an echoed prompt, whose first token has none, before those generated."""
        decoder = new_utf8_decoder()
        start = len(decoder.decode(self._token_bytes(prompt[0], echo.first_token)))
        rest = _completion_logprobs(scored, self._offsets(decoder, scored, start), self._request.logprobs or 0)
        first = {"tokens": echo.first_token, "token_logprobs": None, "top_logprobs": None, "text_offset": 0}
        for name, value in first.items():
            generated[name] = [value, *rest[name], *generated[name]]

    def _plain_event(self, index: int, text: str) -> bytes:
        usage = None if self._request.include_usage else UNSET
        return sse(Body(**self._head, choices=[CompletionChoice(index=index, text=text)], usage=usage))

    def closing(self, usage: Usage) -> bytes:
        return sse(Body(**self._head, choices=[], usage=usage)) if self._request.include_usage else b""

    def whole(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        return msgspec.json.encode(
            Body(**self._head, choices=[self._choice(choice.index, choice) for choice in choices], usage=usage)
        )


class ChatShape:
    """/v1/chat/completions. `token_bytes` gives the exact bytes of a token whose text is part of a character."""

    def __init__(
        self,
        request: ChatRequest,
        *,
        response_id: str,
        created: int,
        model: str,
        prompt: Sequence[int],
        token_bytes: TokenBytes,
        tool_parser: str | None = None,
    ) -> None:
        """`tool_parser` names the format of tool calls, if any may be made."""
        kind = "chat.completion.chunk" if request.stream else "chat.completion"
        self._head = _head(response_id, kind, created, model)
        self._request = request
        self._prompt = prompt if request.return_token_ids else UNSET
        self._token_bytes = token_bytes
        self._tool_parser = tool_parser
        self._parsers: dict[int, ToolParser] = {}  # by choice
        self._plain = PlainEvents(self._plain_event)

    def _read(self, index: int, part: P) -> tuple[P, list[CallDelta]]:
        """Take the tool calls out of the text of a part."""
        if self._tool_parser is None:
            return part, []
        if index not in self._parsers:
            self._parsers[index] = make_parser(self._tool_parser)
        parser, finish = self._parsers[index], part.finish_reason
        parsed = parser.push(part.text, final=finish is not None)
        if finish == "stop" and parser.num_calls:
            finish = "tool_calls"
        calls = parsed.calls
        if self._request.parallel_tool_calls is False:  # a model that may choose to call knows nothing of it
            calls = [call for call in calls if call.index == 0]
        return msgspec.structs.replace(part, text=parsed.content, finish_reason=finish), calls

    def _event(self, choice: ChatChoice, **extra: Any) -> bytes:
        usage = None if self._request.include_usage else UNSET
        return sse(Body(**self._head, choices=[choice], usage=usage, **extra))

    def opening(self) -> bytes:
        role = ChatText(role="assistant", content="")
        return b"".join(
            self._event(ChatChoice(index=index, delta=role), prompt_token_ids=UNSET if index else self._prompt)
            for index in range(self._request.n or 1)
        )

    def event(self, index: int, chunk: Chunk) -> bytes:
        chunk, calls = self._read(index, chunk)
        if not calls and _says_nothing(chunk, bool(self._request.return_token_ids)):
            return b""
        if not calls and _is_plain(chunk) and not self._request.return_token_ids:
            return self._plain.event(index, chunk.text)
        delta = ChatText(content=chunk.text or UNSET, tool_calls=[_delta(call) for call in calls] or UNSET)
        return self._event(ChatChoice(index=index, delta=delta, **self._ending(chunk)))

    def _plain_event(self, index: int, text: str) -> bytes:
        return self._event(ChatChoice(index=index, delta=ChatText(content=text)))

    def _ending(self, part: Chunk | Choice) -> dict[str, Any]:
        return {
            "logprobs": None if part.logprobs is None else _chat_logprobs(part.logprobs, self._token_bytes),
            "finish_reason": part.finish_reason,
            "stop_reason": part.stop_reason,
            "token_ids": part.token_ids if self._request.return_token_ids else UNSET,
        }

    def closing(self, usage: Usage) -> bytes:
        return sse(Body(**self._head, choices=[], usage=usage)) if self._request.include_usage else b""

    def whole(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        written = [
            ChatChoice(index=choice.index, message=_message(choice.text, calls), **self._ending(choice))
            for choice, calls in (self._read(choice.index, choice) for choice in choices)
        ]
        prompt_logprobs = _prompt_logprobs(self._request.prompt_logprobs, choices[0])
        body = Body(
            **self._head, choices=written, usage=usage, prompt_logprobs=prompt_logprobs, prompt_token_ids=self._prompt
        )
        return msgspec.json.encode(body)


def _delta(call: CallDelta) -> ToolCall:
    function = FunctionCall(name=call.name or UNSET, arguments=call.arguments)
    kind = UNSET if call.id is None else "function"
    return ToolCall(index=call.index, id=call.id or UNSET, type=kind, function=function)


def _message(text: str, calls: Sequence[CallDelta]) -> ChatText:
    """A whole message; calls that came at once are whole too."""
    written = [
        ToolCall(
            id=call.id or "", type="function", function=FunctionCall(name=call.name or "", arguments=call.arguments)
        )
        for call in calls
    ]
    return ChatText(role="assistant", content=text if text or not calls else None, tool_calls=written or UNSET)


def _head(response_id: str, kind: str, created: int, model: str) -> dict[str, Any]:
    return {"id": response_id, "object": kind, "created": created, "model": model}


def _says_nothing(chunk: Chunk, wants_ids: bool) -> bool:
    """Text may lag behind tokens while a character or a stop string is undecided; such a chunk is not sent."""
    return not (chunk.text or chunk.finish_reason or chunk.logprobs or (wants_ids and chunk.token_ids))


def _is_plain(chunk: Chunk) -> bool:
    """Whether a chunk has text and nothing else to say."""
    return bool(chunk.text) and chunk.finish_reason is None and chunk.logprobs is None and chunk.prompt_logprobs is None


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)


def _prompt_logprobs(width: int | None, part: Chunk | Choice) -> list[dict[str, Any] | None] | UnsetType:
    """vLLM's `prompt_logprobs`: for each prompt token but the first, token id -> log-probability, rank and text."""
    if width is None or part.prompt_logprobs is None:
        return UNSET

    def one(logprob: float, rank: int, text: str) -> dict[str, Any]:
        return {"logprob": _finite(logprob), "rank": rank, "decoded_token": text}

    return [None] + [
        {str(entry.token_id): one(entry.logprob, entry.rank, entry.token)}
        | {str(token): one(logprob, rank, text) for rank, (token, text, logprob) in enumerate(entry.top[:width], 1)}
        for entry in part.prompt_logprobs
    ]


def _completion_logprobs(
    entries: Sequence[TokenLogprob], offsets: list[int], width: int | None = None
) -> dict[str, Any]:
    return {
        "tokens": [entry.token for entry in entries],
        "token_logprobs": [_finite(entry.logprob) for entry in entries],
        "top_logprobs": [
            {text: _finite(logprob) for _, text, logprob in entry.top[:width]} | {entry.token: _finite(entry.logprob)}
            for entry in entries
        ],
        "text_offset": offsets,
    }


def _chat_logprobs(entries: Sequence[TokenLogprob], token_bytes: TokenBytes) -> dict[str, Any]:
    def one(token_id: int, text: str, logprob: float) -> dict[str, Any]:
        return {"token": text, "logprob": _finite(logprob), "bytes": list(token_bytes(token_id, text))}

    return {
        "content": [
            one(entry.token_id, entry.token, entry.logprob) | {"top_logprobs": [one(*top) for top in entry.top]}
            for entry in entries
        ]
    }
