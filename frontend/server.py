"""The HTTP server: the routes of the OpenAI API, health and metrics, on one client of the scheduler.

Owned by a serving frontend process. Must never import torch, block the event loop, or answer a failed request with
anything but OpenAI's error object.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import re
import time
import uuid
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, Final

import msgspec
from litestar import HttpMethod, Litestar, Request, Response, get, post, route
from litestar.config.cors import CORSConfig
from litestar.datastructures import State
from litestar.exceptions import HTTPException
from litestar.params import FromPath
from litestar.types import Message, Scope
from prometheus_client import CONTENT_TYPE_LATEST

from frontend import debug
from frontend.jobs import EventStream, Job, run_whole, while_connected
from frontend.metrics import exposition
from frontend.openai import (
    MAX_BODY_BYTES,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
    chat_names,
    chat_params,
    completion_params,
    decode_body,
    error_body,
    messages_of,
    prompts_of,
)
from frontend.openapi import make_document
from frontend.request import GenerateParams, check_prompt, prepare
from frontend.service import Service
from frontend.shapes import ChatShape, CompletionShape, Echo
from frontend.tools import parser_for, tool_use
from frontend.totals import total_invariants
from ipc.errors import InvalidParameterError, TandemError
from ipc.schema import Invariants, Stats
from ipc.trace import Trace

AnyRequest = Request[Any, Any, Any]
AnyResponse = Response[Any]

_JSON: Final = "application/json"
_RETRY_AFTER: Final = {429: "1", 503: "1"}  # seconds
_REQUEST_ID: Final = re.compile(rb"[\x21-\x7e]{1,128}")
_STATS_TIMEOUT_S: Final = 1.0
TENANT: Final = "tenant"  # in a scope's state: whose request it is, if its API key tells
_log: Final = logging.getLogger(__name__)


def _service(request: AnyRequest) -> Service:
    service: Service = request.app.state.service
    return service


def _json(payload: Any, status: int = 200, headers: dict[str, str] | None = None) -> AnyResponse:
    body = payload if isinstance(payload, bytes) else msgspec.json.encode(payload)
    return Response(content=body, status_code=status, media_type=_JSON, headers=headers)


async def _answer(request: AnyRequest, job: Job, *, stream: bool) -> AnyResponse:
    """Run `job` and answer, as events if `stream`; a failure before the first part raises and becomes a status."""
    service = _service(request)
    if not stream:
        return _json(await while_connected(request.receive, run_whole(service.client, job)))
    generation = await service.client.start(job.prompts, job.params)
    try:
        first = await while_connected(request.receive, generation.chunks())
    except BaseException:
        generation.close()
        raise
    return EventStream(job, first, generation)


def _of_tenant(request: AnyRequest, params: GenerateParams) -> GenerateParams:
    """With a salt that no other tenant can choose, if tenants are told apart."""
    tenant = request.scope["state"].get(TENANT)
    if tenant is None:
        return params
    salt = hashlib.sha256(f"{tenant}:{params.cache_salt}".encode()).hexdigest()
    return dataclasses.replace(params, cache_salt=salt)


@post("/v1/completions")
async def completions(request: AnyRequest) -> AnyResponse:
    service = _service(request)
    asked = decode_body(await request.body(), CompletionRequest)
    service.require_ready()
    service.require_model(asked.model)
    params = _of_tenant(request, completion_params(asked, service.client.card.sampling_defaults))
    prompts = prompts_of(asked)
    ids = await _prompt_ids(service, prompts, asked.add_special_tokens is not False)
    shape = CompletionShape(
        asked,
        response_id=f"cmpl-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=service.client.card.name,
        prompts=ids,
        echoes=await _echoes(service, prompts, ids, params) if asked.echo else None,
        token_bytes=service.tokenizer.token_bytes,
    )
    return await _answer(request, Job(ids, params, shape), stream=bool(asked.stream))


async def _prompt_ids(
    service: Service, prompts: Sequence[str | list[int]], add_special_tokens: bool
) -> list[Sequence[int]]:
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    most = service.client.card.max_model_len
    encode_all = service.tokenizer.encode_all
    encoded = iter(await encode_all(texts, add_special_tokens=add_special_tokens, max_tokens=most) if texts else ())
    return [next(encoded) if isinstance(prompt, str) else prompt for prompt in prompts]


async def _echoes(
    service: Service, prompts: Sequence[str | list[int]], ids: Sequence[Sequence[int]], params: GenerateParams
) -> list[Echo]:
    """What comes before each answer. Raises TandemError for prompts that will be refused, before they are decoded."""
    card, tokenizer = service.client.card, service.tokenizer
    for tokens in ids:
        check_prompt(tokens, card)
        prepare(params, card, len(tokens))
    texts = [
        prompt if isinstance(prompt, str) else await tokenizer.decode_async(prompt, skip_special_tokens=False)
        for prompt in prompts
    ]
    return [Echo(text, tokenizer.token_text(tokens[0])) for text, tokens in zip(texts, ids, strict=True)]


@post("/v1/chat/completions")
async def chat_completions(request: AnyRequest) -> AnyResponse:
    service = _service(request)
    asked = decode_body(await request.body(), ChatRequest)
    service.require_ready()
    service.require_model(asked.model)
    tokenizer = service.tokenizer
    parser = service.config.tool_call_parser or parser_for(tokenizer.chat_template)
    tools = tool_use(asked.tools, asked.tool_choice, asked.parallel_tool_calls is not False, parser)
    params = _of_tenant(
        request, chat_params(asked, service.client.card.sampling_defaults, tools.grammar if tools else None)
    )
    ids = await tokenizer.encode_chat(
        messages_of(asked.messages),
        tools=tools.tools if tools else None,
        add_generation_prompt=asked.add_generation_prompt is not False,
        template_kwargs=asked.chat_template_kwargs,
        max_tokens=service.client.card.max_model_len,
    )
    shape = ChatShape(
        asked,
        response_id=f"chatcmpl-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=service.client.card.name,
        prompt=ids,
        tool_parser=tools.parser if tools else None,
        token_bytes=tokenizer.token_bytes,
    )
    with chat_names(asked):
        return await _answer(request, Job([ids], params, shape), stream=bool(asked.stream))


@post("/tokenize")
async def tokenize(request: AnyRequest) -> AnyResponse:
    service = _service(request)
    asked = decode_body(await request.body(), TokenizeRequest)
    service.require_ready()
    service.require_model(asked.model)
    if asked.messages is not None:
        ids = await service.tokenizer.encode_chat(messages_of(asked.messages))
    elif asked.prompt is not None:
        add_special_tokens = asked.add_special_tokens is not False
        ids = await service.tokenizer.encode_async(asked.prompt, add_special_tokens=add_special_tokens)
    else:
        raise InvalidParameterError("prompt or messages is needed", param="prompt")
    return _json({"count": len(ids), "max_model_len": service.client.card.max_model_len, "tokens": ids})


@post("/detokenize")
async def detokenize(request: AnyRequest) -> AnyResponse:
    service = _service(request)
    asked = decode_body(await request.body(), DetokenizeRequest)
    service.require_ready()
    service.require_model(asked.model)
    vocab_size = service.client.card.vocab_size
    for token in (min(asked.tokens), max(asked.tokens)) if asked.tokens else ():
        if not 0 <= token < vocab_size:
            raise InvalidParameterError(
                f"token id {token} is out of range: the model has ids 0 to {vocab_size - 1}", param="tokens"
            )
    return _json({"prompt": await service.tokenizer.decode_async(asked.tokens, skip_special_tokens=False)})


def _model_entry(service: Service) -> dict[str, Any]:
    card = service.client.card
    return {
        "id": card.name,
        "object": "model",
        "created": service.started_s,
        "owned_by": "tandem",
        "root": card.name,
        "parent": None,
        "max_model_len": card.max_model_len,
    }


@get("/v1/models")
async def models(request: AnyRequest) -> AnyResponse:
    service = _service(request)
    service.require_ready()
    return _json({"object": "list", "data": [_model_entry(service)]})


@get("/v1/models/{name:path}")
async def model(request: AnyRequest, name: FromPath[str]) -> AnyResponse:
    service = _service(request)
    service.require_ready()
    service.require_model(name.removeprefix("/"))
    return _json(_model_entry(service))


@route(["/health", "/ping"], http_method=[HttpMethod.GET, HttpMethod.HEAD])
async def health(request: AnyRequest) -> AnyResponse:
    _service(request).require_healthy()
    return Response(content=b"", media_type="text/plain")


@route("/ready", http_method=[HttpMethod.GET, HttpMethod.HEAD])
async def ready(request: AnyRequest) -> AnyResponse:
    _service(request).require_healthy()
    return Response(content=b"", media_type="text/plain")


@get("/version")
async def engine_version(request: AnyRequest) -> AnyResponse:
    return _json({"version": version("tandem-engine")})


@get("/load")
async def load(request: AnyRequest) -> AnyResponse:
    """Of the whole engine, whichever frontend answers."""
    stats = await _fresh_stats(_service(request))
    return _json({"server_load": stats.running + stats.waiting})


@get("/server_info")
async def server_info(request: AnyRequest) -> AnyResponse:
    service = _service(request)
    stats, engine, card = await _fresh_stats(service), service.client.engine, service.client.card
    replicas = {
        number: {
            "kv_cache_tokens": each.blocks_total * engine.block_size,
            "executor_epoch": each.epoch,
            "draining": each.draining,
        }
        for number, each in service.client.last_stats.items()
    }
    return _json(
        {
            "version": version("tandem-engine"),
            "model": card.name,
            "max_model_len": card.max_model_len,
            "vocab_size": card.vocab_size,
            "eos_token_ids": card.eos_token_ids,
            "max_logprobs": card.max_logprobs,
            "sampling_defaults": card.sampling_defaults,
            "block_size": engine.block_size,
            "kv_cache_tokens": stats.blocks_total * engine.block_size,
            "frontends": stats.frontends,
            "executor_epoch": stats.epoch,
            "draining": stats.draining,
            "replicas": replicas,
        }
    )


async def _fresh_stats(service: Service) -> Stats:
    service.require_connected()
    return await service.client.stats(_STATS_TIMEOUT_S)


@get("/openapi.json")
async def openapi(request: AnyRequest) -> AnyResponse:
    return _json(make_document())


@get("/metrics")
async def metrics(request: AnyRequest) -> AnyResponse:
    service = _service(request)
    await _fresh_stats(service)
    return Response(content=exposition(service.registry), media_type=CONTENT_TYPE_LATEST)


@get("/debug/invariants")
async def invariants(request: AnyRequest) -> AnyResponse:
    """What must add up in the schedulers, as numbers, summed and of each replica; 500 if it does not."""
    service = _service(request)
    service.require_connected()
    found = await service.client.invariants(_STATS_TIMEOUT_S)
    total = total_invariants(found)
    replicas = {number: _fields(each) for number, each in found.items()}
    return _json({**_fields(total), "replicas": replicas}, 500 if total.violations else 200)


def _fields(found: Invariants) -> dict[str, Any]:
    return {name: getattr(found, name) for name in found.__struct_fields__}


def to_error(request: AnyRequest, error: Exception) -> AnyResponse:
    """The OpenAI error object of any exception. What is not a typed error is logged, and not told to the client."""
    if isinstance(error, TandemError):
        status, headers = error.status, {}
        body = error_body(error.message, status, code=error.code, param=error.param)
    elif isinstance(error, HTTPException):
        status, headers = error.status_code, dict(error.headers or {})
        path = request.scope["path"]
        reasons = {
            404: f"no such path: {path}",
            405: f"{request.method} is not allowed on {path}",
            413: f"the body is larger than {MAX_BODY_BYTES} bytes",
        }
        body = error_body(reasons.get(status, error.detail), status)
    else:
        _log.error("%s %r failed", request.method, request.scope["path"], exc_info=error)
        status, headers, body = 500, {}, error_body("internal error", 500, code="internal_error")
    if status in _RETRY_AFTER:
        headers["Retry-After"] = _RETRY_AFTER[status]
    return _json(body, status, headers)


async def add_request_id(message: Message, scope: Scope) -> None:
    """Echo the client's x-request-id if it is short and printable, else give one."""
    if message["type"] == "http.response.start":
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex.encode()
        message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id)]


def make_app(service: Service, *, debug_endpoints: bool = False, trace: Trace | None = None) -> Litestar:
    """The ASGI application; it uses `service` and owns nothing. `trace`: what a debug endpoint records."""
    origins = service.config.allowed_origins
    return Litestar(
        route_handlers=[
            completions,
            chat_completions,
            tokenize,
            detokenize,
            models,
            model,
            health,
            ready,
            engine_version,
            load,
            server_info,
            openapi,
            metrics,
            *([invariants] if debug_endpoints else []),
            *([] if trace is None or not debug_endpoints else [debug.trace]),
        ],
        exception_handlers={Exception: to_error, HTTPException: to_error},
        before_send=[add_request_id],
        request_max_body_size=MAX_BODY_BYTES,
        openapi_config=None,
        cors_config=CORSConfig(list(origins), expose_headers=["x-request-id"]) if origins else None,
        logging_config=None,
        state=State({"service": service, "trace": trace}),
    )
