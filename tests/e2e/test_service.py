"""The service as its users meet it: the `openai` client, plain HTTP and our own clients, on a real model."""

from __future__ import annotations

import asyncio
import functools
import json
import socket
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from typing import Any

import httpx
import openai
import pytest
import torch

from frontend import AsyncClient, Client
from frontend.tokenizer import Tokenizer
from ipc.errors import CancelledError, ContextLengthError, InvalidParameterError, RequestTimeoutError
from tests.e2e.engine import DEMO_MODEL, Engine, running_engine, wait_until
from tests.e2e.reference import documents, reference_model
from tests.frontend.test_metrics import VLLM_NAMES

WAIT_S = 60.0
PROMPT = "Return the"
CHAT: Any = [{"role": "user", "content": "What does list do?"}]
ENDLESS: Any = {"max_tokens": 3000, "temperature": 0.0, "ignore_eos": True}  # tens of seconds, unless ended early
CONTEXT_TOKENS = 4096


@pytest.fixture(scope="module", params=[1, 3], ids=["one frontend", "three frontends"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    flags = ["--device", "cpu", "--dtype", "float32", "--max-num-seqs", "64", "--frontends", str(request.param)]
    with running_engine(*flags) as engine:
        yield engine


@pytest.fixture(scope="module")
def sdk(engine: Engine) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=engine.url, api_key="none", max_retries=0, timeout=WAIT_S) as client:
        yield client


@pytest.fixture(scope="module")
def http(engine: Engine) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=engine.root, timeout=WAIT_S) as client:
        yield client


@pytest.fixture(scope="module")
def client(engine: Engine) -> Iterator[Client]:
    with Client(engine.endpoint, name="test") as client:
        yield client


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer.load(DEMO_MODEL)


def complete(sdk: openai.OpenAI, prompt: Any = PROMPT, **fields: Any) -> Any:
    options = {"model": "demo", "max_tokens": 24, "temperature": 0, **fields}
    return sdk.completions.create(prompt=prompt, **options)


def is_idle(client: Client) -> bool:
    """Nothing runs, waits or holds a block."""
    stats = client.stats()
    return (stats.running, stats.waiting, stats.blocks_free) == (0, 0, stats.blocks_total)


@contextmanager
def aborting(client: Client, count: int) -> Iterator[None]:
    """What starts inside ends as `count` aborted sequences, and leaves no slot or block in use."""
    before = client.stats().requests_finished
    yield
    wait_until(lambda: is_idle(client), WAIT_S, "nothing is left")
    ended = {reason: number - before[reason] for reason, number in client.stats().requests_finished.items()}
    assert {reason: number for reason, number in ended.items() if number} == {"aborted": count}


# --- completions


def test_a_completion_is_text_with_exact_usage(sdk: openai.OpenAI) -> None:
    answer = complete(sdk, extra_body={"return_token_ids": True})
    choice, usage = answer.choices[0], answer.usage
    ids = choice.model_extra["token_ids"]
    assert choice.text.strip()
    assert choice.text == tokenizer().decode(ids)
    assert choice.model_extra["prompt_token_ids"] == tokenizer().encode(PROMPT)
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(tokenizer().encode(PROMPT)), len(ids))
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_a_stream_is_the_whole_answer_in_parts(sdk: openai.OpenAI) -> None:
    whole = complete(sdk, n=2, seed=3, temperature=0.8)
    *parts, last = complete(sdk, n=2, seed=3, temperature=0.8, stream=True, stream_options={"include_usage": True})
    for choice in whole.choices:
        mine = [part.choices[0] for part in parts if part.choices[0].index == choice.index]
        assert "".join(part.text for part in mine) == choice.text
        assert [part.finish_reason for part in mine if part.finish_reason] == [choice.finish_reason]
    assert len(parts) > 4
    assert last.choices == []
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (
        whole.usage.prompt_tokens,
        whole.usage.completion_tokens,
    )


def test_usage_is_streamed_only_when_asked_for(sdk: openai.OpenAI) -> None:
    parts = list(complete(sdk, stream=True))
    assert all(part.usage is None and part.choices for part in parts)


def test_prompt_logprobs_are_those_of_transformers(sdk: openai.OpenAI) -> None:
    """As an evaluation harness asks for them; 300 tokens take several steps, the second request meets a warm cache."""
    prompts = [documents()[:300], documents()[5000:5020]]
    for max_tokens in (1, 0):
        answer = complete(sdk, prompts, max_tokens=max_tokens, echo=True, logprobs=3)
        assert answer.usage.completion_tokens == 2 * max_tokens
        for prompt, choice in zip(prompts, answer.choices, strict=True):
            with torch.inference_mode():
                logits = reference_model()(torch.tensor([prompt])).logits[0]
            expected = torch.log_softmax(logits, dim=-1)
            assert len(choice.logprobs.tokens) == len(prompt) + max_tokens
            first, *values = choice.logprobs.token_logprobs
            assert first is None
            of_prompt = expected[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(values[: len(prompt) - 1]), of_prompt, atol=1e-3, rtol=1e-3)
            best = [max(top.values()) for top in choice.logprobs.top_logprobs[1:]]
            torch.testing.assert_close(
                torch.tensor(best), expected.max(dim=1).values[: len(best)], atol=1e-3, rtol=1e-3
            )
            text = tokenizer().decode(prompt, skip_special_tokens=False)
            assert "".join(choice.logprobs.tokens[: len(prompt)]) == text
            assert choice.text == text if max_tokens == 0 else choice.text.startswith(text)


def test_choices_differ_and_seeds_repeat(sdk: openai.OpenAI) -> None:
    def sample(**fields: Any) -> list[str]:
        return [choice.text for choice in complete(sdk, temperature=1.0, **fields).choices]

    first, second = sample(n=2, seed=11)
    assert first != second
    assert sample(n=2, seed=11) == [first, second]
    assert sample(seed=12) == [second]  # choice i is seeded with seed + i
    assert sample() != sample()


def test_a_stop_string_ends_the_text_before_it(sdk: openai.OpenAI) -> None:
    text = complete(sdk, extra_body={"ignore_eos": True}).choices[0].text
    stop = text[9:12]
    expected = text[: text.index(stop)]
    for stream in (False, True):
        answer = complete(sdk, stop=[stop, "never there"], stream=stream, extra_body={"ignore_eos": True})
        choices = [part.choices[0] for part in answer] if stream else answer.choices
        assert "".join(choice.text for choice in choices) == expected
        assert choices[-1].finish_reason == "stop"


def test_finish_reasons(sdk: openai.OpenAI) -> None:
    assert complete(sdk, max_tokens=200).choices[0].finish_reason == "stop"
    assert complete(sdk, max_tokens=2).choices[0].finish_reason == "length"


def test_stop_ids_and_min_tokens(client: Client) -> None:
    free = client.generate(PROMPT, max_tokens=24, temperature=0.0, ignore_eos=True).token_ids
    stop = free[3]
    stopped = client.generate(PROMPT, max_tokens=24, temperature=0.0, ignore_eos=True, stop_token_ids=[stop])
    assert stopped.token_ids == free[: free.index(stop) + 1]
    assert stopped.choices[0].finish_reason == "stop"
    later = client.generate(PROMPT, max_tokens=24, temperature=0.0, stop_token_ids=[stop], min_tokens=20)
    assert len(later.token_ids) >= 20
    assert stop not in later.token_ids[:20]


def test_the_context_can_be_filled_to_its_last_token(client: Client) -> None:
    """Without max_tokens, a request runs to the context limit: the last row of the last block."""
    answer = client.generate([5] * (CONTEXT_TOKENS - 20), temperature=0.0, ignore_eos=True)
    assert len(answer.token_ids) == 20
    assert answer.choices[0].finish_reason == "length"


def test_logprobs_name_every_token(sdk: openai.OpenAI) -> None:
    choice = complete(sdk, logprobs=3).choices[0]
    logprobs = choice.logprobs
    assert "".join(logprobs.tokens).startswith(choice.text)  # the end of sequence has a name, and no text
    for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert len(top) == 3
        assert top[token] == max(top.values()) == logprob <= 0


def test_lists_of_prompts_and_token_ids(sdk: openai.OpenAI) -> None:
    texts = ["Return the", "A list", "Open a file"]
    ids = [tokenizer().encode(text) for text in texts]
    alone = [complete(sdk, text).choices[0].text for text in texts]
    together = complete(sdk, texts)
    assert [choice.text for choice in together.choices] == alone
    assert together.usage.prompt_tokens == sum(map(len, ids))
    assert [choice.text for choice in complete(sdk, ids).choices] == alone
    assert complete(sdk, ids[0]).choices[0].text == alone[0]


# --- chat


def test_chat_streamed_and_not(sdk: openai.OpenAI) -> None:
    fields: Any = {"model": "demo", "messages": CHAT, "max_completion_tokens": 24, "temperature": 0}
    whole = sdk.chat.completions.create(**fields)
    prompt_tokens = len(tokenizer().encode(tokenizer().render_chat(CHAT), add_special_tokens=False))
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == prompt_tokens
    assert whole.choices[0].message.content
    *parts, last = sdk.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True})
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(part.choices[0].delta.content or "" for part in parts) == whole.choices[0].message.content
    assert parts[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert last.usage is not None
    assert last.usage.completion_tokens == whole.usage.completion_tokens


def test_chat_with_choices_and_logprobs(sdk: openai.OpenAI) -> None:
    answer = sdk.chat.completions.create(
        model="demo", messages=CHAT, max_tokens=8, n=2, seed=5, temperature=1.0, logprobs=True, top_logprobs=2
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    for choice in answer.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.content
        for entry in choice.logprobs.content:
            assert len(entry.top_logprobs) == 2
            assert bytes(entry.bytes or ()).decode(errors="replace") == entry.token


def test_models(sdk: openai.OpenAI) -> None:
    assert [model.id for model in sdk.models.list()] == ["demo"]


# --- many at once


def test_32_async_streams_at_once_are_what_each_is_alone(engine: Engine, sdk: openai.OpenAI) -> None:
    prompts = [f"Return the {word}" for word in ("list", "name", "file", "value")]
    alone = {(prompt, seed): complete(sdk, prompt, seed=seed, temperature=0.7) for prompt in prompts for seed in (1, 2)}

    async def one(api: openai.AsyncOpenAI, prompt: str, seed: int) -> str:
        stream = await api.completions.create(
            model="demo", prompt=prompt, max_tokens=24, temperature=0.7, seed=seed, stream=True
        )
        return "".join([part.choices[0].text async for part in stream])

    async def run() -> list[str]:
        async with openai.AsyncOpenAI(base_url=engine.url, api_key="none", max_retries=0, timeout=WAIT_S) as api:
            return await asyncio.gather(*(one(api, *asked) for asked in list(alone) * 4))

    assert asyncio.run(run()) == [answer.choices[0].text for answer in alone.values()] * 4


# --- users that leave


@pytest.mark.parametrize("stream", [True, False])
def test_a_user_that_disconnects_frees_everything(engine: Engine, client: Client, stream: bool) -> None:
    host, port = engine.root.removeprefix("http://").split(":")
    body = json.dumps({"prompt": PROMPT, "n": 3, "stream": stream, **ENDLESS}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    with aborting(client, 3), socket.create_connection((host, int(port)), timeout=WAIT_S) as raw:
        raw.sendall(head + body)
        if stream:
            assert raw.recv(4096).startswith(b"HTTP/1.1 200")
        wait_until(lambda: client.stats().running == 3, WAIT_S, "three sequences run")
        assert client.stats().blocks_free < client.stats().blocks_total


# --- health and metrics


def test_health_and_ready(http: httpx.Client) -> None:
    for path in ("/health", "/ready"):
        assert http.get(path).status_code == 200


def test_metrics_have_the_names_dashboards_read(http: httpx.Client, client: Client) -> None:
    http.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 4, "stream": True}).raise_for_status()
    text = http.get("/metrics").text
    values = {line.split("{")[0]: float(line.rpartition(" ")[2]) for line in text.splitlines() if line[0] != "#"}
    own = ["inflight_steps", "steps_total", "hidden_steps_total"]
    own += ["device_busy_seconds_total", "device_bubble_seconds_total"]
    assert {f"engine:{name}" for name in [*VLLM_NAMES, *own]} <= values.keys()
    assert values["engine:generation_tokens_total"] == client.stats().generation_tokens > 0
    assert values["engine:time_to_first_token_seconds_count"] > 0
    assert values["engine:dropped_messages_total"] == 0


# --- our own clients, over ZMQ


def test_the_blocking_client(client: Client, sdk: openai.OpenAI) -> None:
    over_http = complete(sdk).choices[0].text
    answer = client.generate(PROMPT, max_tokens=24, temperature=0.0)
    assert answer.text == over_http
    assert answer.prompt_token_ids == tuple(tokenizer().encode(PROMPT))
    assert client.generate(list(answer.prompt_token_ids), max_tokens=24, temperature=0.0).text == over_http
    chunks = list(client.stream(PROMPT, max_tokens=24, temperature=0.0))
    assert "".join(chunk.text for chunk in chunks) == over_http
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == [answer.choices[0].finish_reason]
    chat = client.chat(CHAT, max_tokens=8, temperature=0.0)
    assert "".join(chunk.text for chunk in client.chat_stream(CHAT, max_tokens=8, temperature=0.0)) == chat.text


def test_leaving_a_stream_early_aborts_it(client: Client) -> None:
    with aborting(client, 1):
        for chunk in client.stream(PROMPT, **ENDLESS):
            if chunk.token_ids:
                break


def test_a_timeout_is_a_typed_error_and_frees_the_request(client: Client) -> None:
    with aborting(client, 2):
        with pytest.raises(RequestTimeoutError):
            client.generate(PROMPT, timeout_s=0.2, **ENDLESS)
        with pytest.raises(RequestTimeoutError):
            list(client.stream(PROMPT, timeout_s=0.2, **ENDLESS))


def test_faults_of_the_caller_are_typed_errors(client: Client) -> None:
    with pytest.raises(InvalidParameterError) as bad:
        client.generate(PROMPT, temperature=float("nan"))
    assert bad.value.param == "temperature"
    with pytest.raises(ContextLengthError, match=f"{CONTEXT_TOKENS} tokens; you requested {CONTEXT_TOKENS + 8}"):
        client.generate([5] * CONTEXT_TOKENS, max_tokens=8)


def test_the_async_client_cancels_and_closes(engine: Engine, client: Client) -> None:
    async def run() -> None:
        async with AsyncClient(engine.endpoint, name="canceller") as one:

            async def running(count: int) -> None:
                while (await one.stats()).running != count:
                    await asyncio.sleep(0.01)

            cancelled = asyncio.ensure_future(one.generate(PROMPT, **ENDLESS))
            async with aclosing(one.stream(PROMPT, **ENDLESS)) as chunks:
                await anext(chunks)
                await running(2)
            await running(1)
            cancelled.cancel()
            with pytest.raises(asyncio.CancelledError):
                await cancelled
            await running(0)
            left_open = asyncio.ensure_future(one.generate(PROMPT, **ENDLESS))
            await running(1)
        with pytest.raises(CancelledError):
            await left_open

    before = client.stats().frontends
    with aborting(client, 3):
        asyncio.run(asyncio.wait_for(run(), WAIT_S))
    assert client.stats().frontends == before
