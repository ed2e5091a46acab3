"""The OpenAPI document of the HTTP API, made from the types that decode requests and write answers.

Called by the server for /openapi.json. Bounds of numbers are those that GenerateParams checks: one place says them.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from typing import Any, Final

import msgspec

from frontend.openai import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from frontend.request import MAX_STOP_CHARS, MAX_STOP_STRINGS, MAX_STOP_TOKEN_IDS, RANGES
from frontend.shapes import ChatChoice, CompletionChoice, Usage

_JSON: Final = "application/json"
_ERRORS: Final = {
    400: "the body or a field is at fault",
    404: "no such model",
    413: "the body is too large",
    429: "the queue is full",
    500: "a fault of the server or the model",
    503: "starting, draining, or the engine does not answer",
    504: "the request took too long",
}
_ERROR_SCHEMA: Final = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_MODEL: Final = {
    "type": "object",
    "required": ["id", "object", "created", "owned_by", "max_model_len"],
    "properties": {"id": {"type": "string"}, "object": {"const": "model"}, "max_model_len": {"type": "integer"}},
}
_TOKENS: Final = {"type": "array", "items": {"type": "integer"}}


def make_document() -> dict[str, Any]:
    """OpenAPI 3.1."""
    requests = (CompletionRequest, ChatRequest, TokenizeRequest, DetokenizeRequest)
    types = (*requests, CompletionChoice, ChatChoice, Usage)
    schemas, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    components["Error"] = _ERROR_SCHEMA
    for kind in (CompletionRequest, ChatRequest):
        _bound(components[kind.__name__]["properties"])
    next(_options(components["ChatRequest"]["properties"]["max_tokens"]))["minimum"] = 1  # 0 needs an echo
    completion, chat, tokenize, detokenize, completion_choice, chat_choice, usage = schemas
    components["CompletionRequest"]["properties"]["prompt"] = _PROMPT
    components["ChatRequest"]["properties"]["messages"]["minItems"] = 1
    return {
        "openapi": "3.1.0",
        "info": {"title": "Tandem", "version": version("tandem-engine"), "license": {"name": "Apache-2.0"}},
        "components": {"schemas": components},
        "paths": {
            "/v1/completions": _post("Continue a prompt.", completion, _answer(completion_choice, usage), stream=True),
            "/v1/chat/completions": _post("Answer a conversation.", chat, _answer(chat_choice, usage), stream=True),
            "/tokenize": _post("Text to token ids.", tokenize, _object(tokens=_TOKENS, count=_INTEGER)),
            "/detokenize": _post("Token ids to text.", detokenize, _object(prompt={"type": "string"})),
            "/v1/models": _get("The served model.", _object(data={"type": "array", "items": _MODEL}), 503),
            "/v1/models/{name}": _get("One model.", _MODEL, 404, 503)
            | {"parameters": [{"name": "name", "in": "path", "required": True, "schema": _NAME}]},
            "/version": _get("The version of this server.", _object(version={"type": "string"})),
            "/load": _get("Requests that run or wait.", _object(server_load=_INTEGER), 503),
            "/server_info": _get("What is served, and how.", {"type": "object"}, 503),
            "/openapi.json": _get("This document.", {"type": "object"}),
            "/metrics": _plain("Prometheus text."),
        }
        | {path: _plain("200 while requests are served.") for path in ("/health", "/ready", "/ping")},
    }


_INTEGER: Final = {"type": "integer", "minimum": 0}
_NAME: Final = {"type": "string", "minLength": 1, "maxLength": 200, "pattern": "^[A-Za-z0-9._-]+$"}
_PROMPT: Final = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
        {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1},
        {"type": "array", "items": {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}},
    ]
}


def _bound(properties: dict[str, Any]) -> None:
    """Write the bounds of GenerateParams into the properties of a request."""
    for name, allowed in RANGES.items():
        for option in _options(properties.get(name, {})):
            if option.get("type") in ("integer", "number"):
                option["exclusiveMinimum" if allowed.above else "minimum"] = allowed.low
                option["maximum"] = allowed.high
    for option in _options(properties["stop"]):
        if option.get("type") == "string":
            option |= {"minLength": 1, "maxLength": MAX_STOP_CHARS}
        elif option.get("type") == "array":
            option |= {"maxItems": MAX_STOP_STRINGS, "items": {"type": "string", "minLength": 1}}
    for option in _options(properties["stop_token_ids"]):
        if option.get("type") == "array":
            option |= {"maxItems": MAX_STOP_TOKEN_IDS, "items": {"type": "integer", "minimum": 0}}
    for option in _options(properties["logit_bias"]):
        if option.get("type") == "object":
            option["propertyNames"] = {"pattern": "^[0-9]{1,9}$"}
            option["additionalProperties"] = {"type": "number", "minimum": -100, "maximum": 100}


def _options(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield from schema.get("anyOf", (schema,))


def _answer(choice: dict[str, Any], usage: dict[str, Any]) -> dict[str, Any]:
    text = {"type": "string"}
    return _object(
        id=text, object=text, created=_INTEGER, model=text, choices={"type": "array", "items": choice}, usage=usage
    )


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": list(properties), "properties": properties}


def _errors(*statuses: int) -> dict[str, Any]:
    content = {_JSON: {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {str(status): {"description": _ERRORS[status], "content": content} for status in statuses}


def _get(summary: str, answer: dict[str, Any], *errors: int) -> dict[str, Any]:
    ok = {"200": {"description": "OK", "content": {_JSON: {"schema": answer}}}}
    return {"get": {"summary": summary, "responses": ok | _errors(*errors)}}


def _plain(summary: str) -> dict[str, Any]:
    ok = {"200": {"description": "OK", "content": {"text/plain": {"schema": {"type": "string"}}}}}
    return {"get": {"summary": summary, "responses": ok | _errors(503)}}


def _post(summary: str, asked: dict[str, Any], answer: dict[str, Any], *, stream: bool = False) -> dict[str, Any]:
    content: dict[str, Any] = {_JSON: {"schema": answer}}
    if stream:
        content["text/event-stream"] = {"schema": _object(data={"type": "string"})}
    ok = {"200": {"description": "OK", "content": content}}
    body = {"required": True, "content": {_JSON: {"schema": asked}}}
    return {"post": {"summary": summary, "requestBody": body, "responses": ok | _errors(*_ERRORS)}}
