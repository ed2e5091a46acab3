"""Tool calls over HTTP with the openai client: the real application, and a scheduler that speaks as a model would."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

import httpx
import openai
import pytest

from frontend.client import AsyncClient
from frontend.server import make_app
from frontend.service import Service
from ipc.config import HttpConfig
from ipc.schema import Admit, Message
from tests.frontend.scripted_scheduler import RUNNING, STOP, ScriptedScheduler, tokens
from tests.frontend.tokenizers_for_tests import EOS, byte_level_tokenizer

LIMIT_S = 60
TOOLS: Any = [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}]
CALLS = (
    'I look.\n<tool_call>\n{"name": "look_up", "arguments": {"word": "naïve"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "look_up", "arguments": {}}\n</tool_call>'
)
Ask = Callable[..., Coroutine[Any, Any, Any]]


def with_model(text: str, work: Callable[[Ask, ScriptedScheduler], Coroutine[Any, Any, None]], **config: Any) -> None:
    """`work` with an openai client of a model that answers `text` to everything, one token a frame."""
    tokenizer = byte_level_tokenizer()
    ids = [*tokenizer.encode(text, add_special_tokens=False), *tokenizer.encode(EOS)]

    def answer(admit: Admit) -> Iterable[Message]:
        for i, token in enumerate(ids):
            yield tokens([(admit.request_id, token, STOP if i == len(ids) - 1 else RUNNING)])

    async def run() -> None:
        with ScriptedScheduler(on_admit=answer) as scheduler:
            async with AsyncClient(scheduler.endpoint, tokenizer=tokenizer) as client:
                service = Service(client, HttpConfig(**config))
                service.attached = True
                transport = httpx.ASGITransport(make_app(service))
                async with openai.AsyncOpenAI(
                    base_url="http://test/v1",
                    api_key="none",
                    max_retries=0,
                    http_client=httpx.AsyncClient(transport=transport),
                ) as sdk:

                    def ask(**fields: Any) -> Coroutine[Any, Any, Any]:
                        messages: Any = [{"role": "user", "content": "hello"}]
                        return sdk.chat.completions.create(**{"model": "test", "messages": messages, **fields})

                    await work(ask, scheduler)

    asyncio.run(asyncio.wait_for(run(), LIMIT_S))


def test_calls_come_whole_and_streamed() -> None:
    async def work(ask: Ask, scheduler: ScriptedScheduler) -> None:
        choice = (await ask(tools=TOOLS)).choices[0]
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", "I look.")
        called = [(call.function.name, json.loads(call.function.arguments)) for call in choice.message.tool_calls]
        assert called == [("look_up", {"word": "naïve"}), ("look_up", {})]
        assert len({call.id for call in choice.message.tool_calls}) == 2
        content, streamed, reasons = "", {}, []
        async for chunk in await ask(tools=TOOLS, stream=True):
            delta = chunk.choices[0].delta
            content += delta.content or ""
            reasons.append(chunk.choices[0].finish_reason)
            for call in delta.tool_calls or ():
                if call.id:
                    assert call.index not in streamed
                    streamed[call.index] = [call.function.name, ""]
                streamed[call.index][1] += call.function.arguments
        assert content == "I look."
        assert [(name, json.loads(arguments)) for name, arguments in streamed.values()] == called
        assert reasons[-1] == "tool_calls"
        assert reasons.count(None) == len(reasons) - 1
        assert not scheduler.expect(Admit).grammar, "the model was free to decide"

    with_model(CALLS, work)


def test_who_wants_one_call_at_a_time_gets_the_first() -> None:
    async def work(ask: Ask, scheduler: ScriptedScheduler) -> None:
        choice = (await ask(tools=TOOLS, parallel_tool_calls=False)).choices[0]
        assert choice.finish_reason == "tool_calls"
        assert [json.loads(call.function.arguments) for call in choice.message.tool_calls] == [{"word": "naïve"}]
        indices = set()
        async for chunk in await ask(tools=TOOLS, parallel_tool_calls=False, stream=True):
            indices |= {call.index for call in chunk.choices[0].delta.tool_calls or ()}
        assert indices == {0}

    with_model(CALLS, work)


def test_without_tools_text_is_text() -> None:
    async def work(ask: Ask, scheduler: ScriptedScheduler) -> None:
        for fields in ({}, {"tools": TOOLS, "tool_choice": "none"}):
            choice = (await ask(**fields)).choices[0]
            assert (choice.finish_reason, choice.message.content) == ("stop", CALLS)
            assert choice.message.tool_calls is None

    with_model(CALLS, work)


def test_the_parser_can_be_chosen() -> None:
    async def work(ask: Ask, scheduler: ScriptedScheduler) -> None:
        choice = (await ask(tools=TOOLS)).choices[0]
        assert choice.message.content is None
        assert [call.function.name for call in choice.message.tool_calls] == ["look_up"]

    with_model('{"name": "look_up", "parameters": {"word": "x"}}', work, tool_call_parser="llama3_json")


def test_a_call_that_must_be_made_brings_its_grammar() -> None:
    async def work(ask: Ask, scheduler: ScriptedScheduler) -> None:
        pytest.importorskip("llguidance")
        await ask(tools=TOOLS, tool_choice={"type": "function", "function": {"name": "look_up"}})
        assert "look_up" in scheduler.expect(Admit).grammar
        for fields in (
            {"tool_choice": "required"},
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "fly"}}},
            {"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}},
        ):
            with pytest.raises(openai.BadRequestError) as caught:
                await ask(**fields)
            assert caught.value.param == "tool_choice"
        assert scheduler.count(Admit) == 1

    with_model(CALLS, work)
