"""Requests of the client library that end otherwise than by themselves: given up, too late, refused, failed, closed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import pytest

from frontend import AsyncClient, Tokenizer
from ipc.errors import (
    CancelledError,
    ContextLengthError,
    InvalidLogitsError,
    InvalidParameterError,
    OverloadedError,
    QueueTimeoutError,
    RequestTimeoutError,
    TandemError,
    UnavailableError,
)
from ipc.schema import Abort, Admit, FinishReason, Message, Rejected
from tests.frontend.scripted_scheduler import (
    LENGTH,
    RUNNING,
    ScriptedScheduler,
    answer,
    arrived,
    collect,
    run,
    tokens,
    with_client,
)
from tests.frontend.tokenizers_for_tests import byte_level_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return byte_level_tokenizer()


def test_a_choice_that_met_its_stop_string_is_aborted_while_others_run(tokenizer: Tokenizer) -> None:
    async def body(scheduler: ScriptedScheduler, client: AsyncClient) -> None:
        task = asyncio.create_task(client.generate("say it", n=2, stop="fox"))
        first, second = [(await arrived(scheduler, Admit)).request_id for _ in range(2)]
        scheduler.send(tokens([(first, token, RUNNING) for token in tokenizer.encode("the fox")]))
        assert (await arrived(scheduler, Abort)).stopped_ids == [first]
        scheduler.send(tokens([(second, tokenizer.encode("x")[0], LENGTH)]))
        assert [choice.text for choice in (await task).choices] == ["the ", "x"]

    with_client(None, body)


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_waits_for_too_long_fails_and_is_aborted(stream: bool) -> None:
    async def body(scheduler: ScriptedScheduler, client: AsyncClient) -> None:
        client = AsyncClient(scheduler.endpoint, tokenizer=byte_level_tokenizer(), queue_timeout_s=0.1)
        await client.connect()
        work = collect(client.stream("say it")) if stream else client.generate("say it")
        with pytest.raises(QueueTimeoutError, match=r"waited in the queue for 0\.1 s"):
            await work
        admitted = await arrived(scheduler, Admit)
        assert (await arrived(scheduler, Abort)).request_ids == [admitted.request_id]
        await client.close()

    with_client(None, body)


def test_a_request_that_has_left_the_queue_is_not_bound_by_its_limit() -> None:
    async def body(scheduler: ScriptedScheduler, client: AsyncClient) -> None:
        client = AsyncClient(
            scheduler.endpoint, tokenizer=byte_level_tokenizer(), queue_timeout_s=0.1, request_timeout_s=0.4
        )
        await client.connect()
        task = asyncio.create_task(client.generate("say it", n=2))
        ids = [(await arrived(scheduler, Admit)).request_id for _ in range(2)]
        scheduler.send(tokens([(i, 5, RUNNING) for i in ids], cached=dict.fromkeys(ids, 0)))
        with pytest.raises(RequestTimeoutError, match=r"did not finish within 0\.4 s"):
            await task
        await client.close()

    with_client(None, body)


@pytest.mark.parametrize("how", ["close", "break", "cancel", "timeout"])
def test_giving_up_a_stream_aborts_all_its_choices(how: str) -> None:
    async def body(scheduler: ScriptedScheduler, client: AsyncClient) -> None:
        async def consume() -> None:
            async for _ in client.stream("say it", n=2, timeout_s=0.05 if how == "timeout" else None):
                if how == "break":
                    break

        ids = []
        if how == "close":
            stream = client.stream("say it", n=2)
            pending = asyncio.create_task(anext(stream))
            ids = [(await arrived(scheduler, Admit)).request_id for _ in range(2)]
            scheduler.send(tokens([(ids[0], 5, RUNNING)]))
            await pending
            await stream.aclose()
        else:
            task = asyncio.create_task(consume())
            ids = [(await arrived(scheduler, Admit)).request_id for _ in range(2)]
            if how == "break":
                scheduler.send(tokens([(ids[0], 5, RUNNING)]))
                await task
            elif how == "cancel":
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            else:
                with pytest.raises(RequestTimeoutError, match=r"within 0\.05 s"):
                    await task
        assert (await arrived(scheduler, Abort)).request_ids == ids

    with_client(None, body)


def test_a_cancelled_generate_aborts() -> None:
    async def body(scheduler: ScriptedScheduler, client: AsyncClient) -> None:
        task = asyncio.create_task(client.generate("say it"))
        admit = await arrived(scheduler, Admit)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await arrived(scheduler, Abort)).request_ids == [admit.request_id]

    with_client(None, body)


def test_one_choice_that_fails_fails_the_request_and_aborts_the_others() -> None:
    seen: list[int] = []

    def script(admit: Admit) -> Iterable[Message]:
        seen.append(admit.request_id)
        return [tokens([(admit.request_id, -1, FinishReason.INVALID_LOGITS)])] if len(seen) == 2 else []

    async def body(scheduler: ScriptedScheduler, client: AsyncClient) -> None:
        with pytest.raises(InvalidLogitsError):
            await client.generate("say it", n=3)
        assert (await arrived(scheduler, Abort)).request_ids == [seen[0], seen[2]]

    with_client(script, body)


@pytest.mark.parametrize(
    ("code", "error"), [("queue_full", OverloadedError), ("context_length_exceeded", ContextLengthError)]
)
def test_a_rejection_is_raised_as_its_class(code: str, error: type[TandemError]) -> None:
    async def body(scheduler: ScriptedScheduler, client: AsyncClient) -> None:
        with pytest.raises(error, match="7 of 6") as caught:
            await client.generate("say it")
        assert caught.value.param == "prompt"

    with_client(lambda admit: [Rejected(admit.request_id, code, "7 of 6", "prompt")], body)


def test_a_request_at_fault_sends_nothing_and_harms_nothing() -> None:
    async def body(scheduler: ScriptedScheduler, client: AsyncClient) -> None:
        for prompt, options, error, text in [
            ("", {}, InvalidParameterError, "empty"),
            ([], {}, InvalidParameterError, "at least 1 token, got 0"),
            ([1, 500], {}, InvalidParameterError, "500 is out of range: the model has ids 0 to 499"),
            ([-1], {}, InvalidParameterError, "-1 is out of range"),
            ([1.5], {}, InvalidParameterError, "prompt must be"),
            (b"ab", {}, InvalidParameterError, "prompt must be"),
            (None, {}, InvalidParameterError, "prompt must be"),
            ("\ud800", {}, InvalidParameterError, "surrogate"),
            ([1] * 513, {}, ContextLengthError, r"length is 512 tokens; you requested 514 \(513 prompt \+ 1 comp"),
            ([1] * 500, {"max_tokens": 13}, ContextLengthError, r"requested 513 \(500 prompt \+ 13 completion\)"),
            ("a", {"max_tokens": -1}, InvalidParameterError, "max_tokens"),
            ([1] * 512, {"max_tokens": 0}, ContextLengthError, r"you requested 513 \(512 prompt \+ 1 completion\)"),
            ("a", {"temprature": 0}, InvalidParameterError, "unknown parameter 'temprature'"),
            ("a", {"logprobs": 21}, InvalidParameterError, "at most 20"),
        ]:
            with pytest.raises(error, match=text):
                await client.generate(prompt, **options)
            with pytest.raises(error, match=text):
                await collect(client.stream(prompt, **options))
        assert scheduler.count(Admit) == 0
        assert (await client.generate("say it")).text == "fine"

    with_client(answer("fine"), body)


def test_closing_ends_open_requests() -> None:
    async def main() -> None:
        with ScriptedScheduler() as scheduler:
            client = AsyncClient(scheduler.endpoint, tokenizer=byte_level_tokenizer())
            assert await client.connect() == scheduler.card
            task = asyncio.create_task(client.generate("say it"))
            await arrived(scheduler, Admit)
            await client.close()
            with pytest.raises(CancelledError, match="closed"):
                await task
            with pytest.raises(UnavailableError, match="closed"):
                await client.generate("say it")

    run(main())


def test_nothing_works_before_connect() -> None:
    async def main() -> None:
        client = AsyncClient("ipc:///tmp/tandem-test-nobody.sock")
        for work in (client.generate("a"), client.generate([1]), client.stats()):
            with pytest.raises(UnavailableError):
                await work
        await client.close()

    run(main())
