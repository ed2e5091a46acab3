"""The OpenAI API as data: what requests may say, and how completions and chunks are written.

Called by the HTTP server. Pure: no socket, no tokenizer, no clock. Decoding raises InvalidParameterError naming the
field; fields this server does not know are ignored.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Final, TypeVar

import msgspec
from msgspec import Meta

from frontend.request import GenerateParams
from frontend.structured import StructuredOutputs, of_request
from frontend.tools import template_calls
from ipc.errors import InvalidParameterError, RequestError, TandemError

MAX_PROMPTS: Final = 2048  # of one request
MAX_BODY_BYTES: Final = 32 << 20
DEFAULT_MAX_TOKENS: Final = 16  # of /v1/completions, as OpenAI and vLLM
DONE: Final = b"data: [DONE]\n\n"

BodyT = TypeVar("BodyT", bound=msgspec.Struct)
_log = logging.getLogger("tandem.openai")
_FIELD: Final = (re.compile(r"`\$\.(\w+)"), re.compile(r"missing required field `(\w+)`"))


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool | None = None


class SamplingFields(msgspec.Struct, kw_only=True, frozen=True):
    """What both kinds of request share; each name that GenerateParams has too means the same there."""

    model: str | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    logit_bias: dict[int, float] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    n: int | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    priority: int | None = None
    cache_salt: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    prompt_logprobs: int | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: dict[str, Any] | str | None = None  # vLLM's names of old
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    best_of: int | None = None

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class CompletionRequest(SamplingFields, frozen=True, kw_only=True):
    """Body of /v1/completions."""

    prompt: str | list[str | int | list[int]]
    echo: bool | None = None
    logprobs: int | None = None
    suffix: str | None = None
    add_special_tokens: bool | None = None


_MANY: Final = Meta(max_length=1 << 16)  # each takes some kilobytes before a template has written it
_CALLS: Final = Meta(max_length=512)


class ContentPart(msgspec.Struct, frozen=True):
    type: str
    text: str | None = None


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True):
    role: str
    content: str | Annotated[list[ContentPart], _MANY] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: Annotated[list[dict[str, Any]], _CALLS] | None = None
    tool_call_id: str | None = None


class ChatRequest(SamplingFields, frozen=True, kw_only=True):
    """Body of /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], _MANY]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    chat_template: str | None = None


class TokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Body of /tokenize: a prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], _MANY] | None = None
    add_special_tokens: bool | None = None


class DetokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Body of /detokenize."""

    tokens: list[int]
    model: str | None = None


def decode_body(body: bytes, kind: type[BodyT]) -> BodyT:
    """The request in a JSON body. Raises RequestError for bad JSON, InvalidParameterError for a wrong type."""
    try:
        request = msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        found = next(filter(None, (pattern.search(str(error)) for pattern in _FIELD)), None)
        raise InvalidParameterError(str(error), param=found and found[1]) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(f"the body is not valid JSON: {error}") from error
    known = set(kind.__struct_fields__)
    if _log.isEnabledFor(logging.DEBUG) and (unknown := msgspec.json.decode(body).keys() - known):
        _log.debug("ignored fields: %s", sorted(unknown))
    return request


def prompts_of(request: CompletionRequest) -> list[str | list[int]]:
    """The prompts of a completion request, each a text or token ids."""
    prompt: Any = request.prompt
    if isinstance(prompt, str):
        return [prompt]
    kinds = {type(item) for item in prompt}
    if len(kinds) > 1:
        raise InvalidParameterError("prompt mixes strings, ids and lists; use one kind", param="prompt")
    if not prompt or kinds == {int}:
        return [prompt]
    if len(prompt) > MAX_PROMPTS:
        raise InvalidParameterError(f"at most {MAX_PROMPTS} prompts a request, got {len(prompt)}", param="prompt")
    if len(prompt) * (request.n or 1) > MAX_PROMPTS:
        raise InvalidParameterError(
            f"at most {MAX_PROMPTS} choices a request, got {len(prompt)} prompts with n {request.n}", param="n"
        )
    return list(prompt)


def messages_of(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """The conversation as chat templates expect it: plain objects whose content is text."""
    return [
        {name: value for name, value in msgspec.structs.asdict(message).items() if value is not None}
        | {"content": _text_of(message.content)}
        | ({"tool_calls": template_calls(message.tool_calls)} if message.tool_calls else {})
        for message in messages
    ]


def _text_of(content: str | list[ContentPart] | None) -> str:
    if not isinstance(content, list):
        return content or ""
    for part in content:
        if part.type != "text" or part.text is None:
            raise InvalidParameterError(f"content of type {part.type!r}: this model reads text only", param="messages")
    return "\n".join(part.text or "" for part in content)


def _refuse_unsupported(request: SamplingFields) -> None:
    """What would change the answer but is not done is an error, never silently ignored."""
    if request.prompt_logprobs is not None and request.stream:
        raise InvalidParameterError("prompt_logprobs are not available in a stream", param="prompt_logprobs")
    if request.best_of is not None and request.best_of != (request.n or 1):
        raise InvalidParameterError(
            f"best_of must equal n, got best_of {request.best_of} and n {request.n or 1}", param="best_of"
        )


def _common_params(request: SamplingFields) -> dict[str, Any]:
    own = GenerateParams.__dataclass_fields__.keys() - {"logprobs", "structured_outputs"}
    fields = {name: getattr(request, name, None) for name in own}
    guided = {name: getattr(request, f"guided_{name}") for name in ("json", "regex", "choice", "grammar")}
    fields["structured_outputs"] = of_request(request.response_format, request.structured_outputs, guided)
    return {name: value for name, value in fields.items() if value is not None}


def completion_params(request: CompletionRequest, defaults: Mapping[str, float] = {}) -> GenerateParams:
    """How to generate for a completion request; `defaults` are the model's. Raises InvalidParameterError."""
    _refuse_unsupported(request)
    if request.suffix:
        raise InvalidParameterError("suffix is not supported", param="suffix")
    if request.max_tokens == 0 and not request.echo:
        raise InvalidParameterError("max_tokens must be at least 1 without echo, got 0", param="max_tokens")
    values = {**defaults, "max_tokens": DEFAULT_MAX_TOKENS, "logprobs": request.logprobs} | _common_params(request)
    if request.echo and request.logprobs is not None:
        values["prompt_logprobs"] = max(request.logprobs, request.prompt_logprobs or 0)
    return GenerateParams(**values)


def chat_params(
    request: ChatRequest, defaults: Mapping[str, float] = {}, calls: StructuredOutputs | None = None
) -> GenerateParams:
    """How to generate for a chat request; `defaults` are the model's, `calls` must be made. Raises a RequestError."""
    _refuse_unsupported(request)
    if request.chat_template is not None:
        raise InvalidParameterError("chat_template is the server's: see its --chat-template", param="chat_template")
    if request.top_logprobs and not request.logprobs:
        raise InvalidParameterError("top_logprobs needs logprobs to be true", param="top_logprobs")
    values = {**defaults, **_common_params(request)}
    if calls is not None:
        if "structured_outputs" in values:
            raise InvalidParameterError("tool_choice and structured output exclude each other", param="tool_choice")
        values["structured_outputs"] = calls
    if request.max_completion_tokens is not None:
        values["max_tokens"] = request.max_completion_tokens
    values["logprobs"] = (request.top_logprobs or 0) if request.logprobs else None
    with chat_names(request):
        if values.get("max_tokens") == 0:
            raise InvalidParameterError("max_tokens must be at least 1, got 0", param="max_tokens")
        return GenerateParams(**values)


@contextmanager
def chat_names(request: ChatRequest) -> Iterator[None]:
    """Errors raised inside leave with the names that fields have in this chat request, not those in GenerateParams."""
    try:
        yield
    except RequestError as error:
        names = {"logprobs": "top_logprobs", "prompt": "messages"}
        if request.max_completion_tokens is not None:
            names["max_tokens"] = "max_completion_tokens"
        error.param = names.get(error.param or "", error.param)
        raise


def error_body(message: str, status: int, *, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """The error object of the OpenAI API, which its clients turn into exceptions by status."""
    kinds: Mapping[int, str] = {429: "rate_limit_error", 503: "service_unavailable", 504: "timeout"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_event(error: TandemError) -> bytes:
    """How a stream that already answered 200 says that it failed: no finish_reason and no [DONE] follow."""
    return sse(error_body(error.message, error.status, code=error.code, param=error.param))


def sse(payload: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + msgspec.json.encode(payload) + b"\n\n"
