"""The client library against a scripted scheduler: whole answers, streams, every way a request ends, the sync twin."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterable
from pathlib import Path

import pytest

from frontend import AsyncClient, Client, Tokenizer
from ipc.errors import (
    InvalidParameterError,
    ModelError,
    TandemError,
    UnavailableError,
)
from ipc.schema import Abort, Admit, FinishReason, Message, unpack_tokens
from tests.frontend.scripted_scheduler import (
    LENGTH,
    RUNNING,
    STOP,
    WAIT_S,
    ScriptedScheduler,
    answer,
    arrived,
    card,
    collect,
    logprob_columns,
    run,
    stats,
    tokens,
    with_client,
)
from tests.frontend.tokenizers_for_tests import byte_level_tokenizer, save_byte_level

TEXT = "the quick brown fox 😀 over the lazy dog"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return byte_level_tokenizer()


def test_generate_gives_text_tokens_and_counts(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT)
    eos = 0

    def script(admit: Admit) -> Iterable[Message]:
        rows = [(admit.request_id, token, RUNNING) for token in ids] + [(admit.request_id, eos, STOP)]
        return [tokens(rows[:3], cached={admit.request_id: 16}), tokens(rows[3:])]

    async def body(scheduler: ScriptedScheduler, client: AsyncClient) -> None:
        completion = await client.generate("say it", max_tokens=100, temperature=0)
        (choice,) = completion.choices
        assert choice.text == completion.text == TEXT
        assert choice.token_ids == (*ids, eos)
        assert (choice.finish_reason, choice.stop_reason, choice.logprobs) == ("stop", None, None)
        assert completion.prompt_token_ids == tuple(tokenizer.encode("say it"))
        assert completion.prompt_tokens == len(completion.prompt_token_ids)
        assert completion.completion_tokens == len(ids) + 1
        assert completion.cached_tokens == 16
        admit = scheduler.expect(Admit)
        assert unpack_tokens(admit.prompt).tolist() == tokenizer.encode("say it")
        assert (admit.params.max_tokens, admit.params.temperature) == (100, 0.0)
        assert scheduler.count(Abort) == 0

    with_client(script, body)


def test_of_max_tokens_0_nothing_is_shown_whatever_the_engine_sampled() -> None:
    async def body(scheduler: ScriptedScheduler, client: AsyncClient) -> None:
        completion = await client.generate("say it", max_tokens=0, stop="x")
        (chunk,) = await collect(client.stream("say it", max_tokens=0))
        assert (completion.completion_tokens, completion.text, chunk.text, chunk.token_ids) == (0, "", "", ())
        assert completion.choices[0].finish_reason == chunk.finish_reason == "length"
        assert [scheduler.expect(Admit).params.max_tokens for _ in range(2)] == [1, 1]

    with_client(answer("x", FinishReason.STOP), body)


def test_max_tokens_defaults_to_the_room_in_the_context() -> None:
    async def body(scheduler: ScriptedScheduler, client: AsyncClient) -> None:
        await client.generate([1, 2, 3])
        assert scheduler.expect(Admit).params.max_tokens == client.card.max_model_len - 3

    with_client(answer("x"), body)


@pytest.mark.parametrize("one_frame", [False, True])
def test_stream_is_the_whole_in_parts(one_frame: bool) -> None:
    async def body(scheduler: ScriptedScheduler, client: AsyncClient) -> None:
        chunks = await collect(client.stream("say it"))
        assert "".join(chunk.text for chunk in chunks) == TEXT
        assert not any("\ufffd" in chunk.text for chunk in chunks)
        assert [t for chunk in chunks for t in chunk.token_ids] == client.tokenizer.encode(TEXT)
        assert [chunk.finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]

    with_client(answer(TEXT, one_frame=one_frame), body)


def test_a_reader_that_lags_gets_several_tokens_in_one_chunk(tokenizer: Tokenizer) -> None:
    async def body(scheduler: ScriptedScheduler, client: AsyncClient) -> None:
        stream = client.stream("say it")
        first = asyncio.create_task(anext(stream))
        admit = await arrived(scheduler, Admit)
        ids = tokenizer.encode(TEXT)
        scheduler.send(tokens([(admit.request_id, ids[0], RUNNING)]))
        assert (await first).token_ids == (ids[0],)
        for token in ids[1:]:
            scheduler.send(tokens([(admit.request_id, token, RUNNING)]))
        (flight,) = client._replicas.sessions[0]._flights
        while len(flight.tokens) < len(ids):
            await asyncio.sleep(0.005)
        assert (await anext(stream)).token_ids == tuple(ids[1:])
        await stream.aclose()

    with_client(None, body)


def test_choices_differ_in_seed_only_and_interleave(tokenizer: Tokenizer) -> None:
    admits: list[Admit] = []

    def script(admit: Admit) -> Iterable[Message]:
        admits.append(admit)
        if len(admits) < 3:
            return []
        words = [tokenizer.encode(word) for word in ("brown", "lazy", "fox")]
        frames = []
        for step in range(max(map(len, words))):
            rows = [
                (each.request_id, word[step], LENGTH if step == len(word) - 1 else RUNNING)
                for each, word in zip(admits, words, strict=True)
                if step < len(word)
            ]
            frames.append(tokens(rows))
        return frames

    async def body(scheduler: ScriptedScheduler, client: AsyncClient) -> None:
        completion = await client.generate("say it", n=3, seed=2**63 - 1)
        assert [(c.index, c.text) for c in completion.choices] == [(0, "brown"), (1, "lazy"), (2, "fox")]
        assert completion.completion_tokens == sum(len(c.token_ids) for c in completion.choices)
        assert [a.params.seed for a in admits] == [2**63 - 1, -(2**63), -(2**63) + 1]
        assert len({a.prompt for a in admits}) == 1

    with_client(script, body)


def test_a_seed_is_drawn_when_none_is_given() -> None:
    async def body(scheduler: ScriptedScheduler, client: AsyncClient) -> None:
        for _ in range(2):
            await client.generate("say it")
        assert scheduler.expect(Admit).params.seed != scheduler.expect(Admit).params.seed

    with_client(answer("x"), body)


@pytest.mark.parametrize("one_frame", [False, True])
@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_ends_the_text_and_aborts(one_frame: bool, include: bool, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT)
    used = next(n for n in range(len(ids)) if " fox" in tokenizer.decode(ids[:n]))

    def script(admit: Admit) -> Iterable[Message]:
        rows = [(admit.request_id, token, RUNNING) for token in ids]
        return [tokens(rows)] if one_frame else [tokens([row]) for row in rows]

    async def body(scheduler: ScriptedScheduler, client: AsyncClient) -> None:
        completion = await client.generate("say it", stop=["nowhere", " fox"], include_stop_str_in_output=include)
        choice = completion.choices[0]
        assert choice.text == "the quick brown" + (" fox" if include else "")
        assert (choice.finish_reason, choice.stop_reason) == ("stop", " fox")
        assert choice.token_ids == tuple(ids[:used])
        admit = await arrived(scheduler, Admit)
        assert (await arrived(scheduler, Abort)).stopped_ids == [admit.request_id]

    with_client(script, body)


def test_a_stop_id_is_named_and_end_of_sequence_is_not(tokenizer: Tokenizer) -> None:
    last = tokenizer.encode("x")[-1]

    async def body(scheduler: ScriptedScheduler, client: AsyncClient) -> None:
        named = (await client.generate("say it", stop_token_ids=[last])).choices[0]
        assert (named.finish_reason, named.stop_reason, named.token_ids[-1], named.text) == ("stop", last, last, "")
        natural = (await client.generate("say it")).choices[0]
        assert (natural.finish_reason, natural.stop_reason) == ("stop", None)

    with_client(answer("x", STOP), body)


def test_logprobs_are_named_and_cut_to_what_was_asked(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the fox")
    top = [5, 6, 7]

    def script(admit: Admit) -> Iterable[Message]:
        rows = [(999, 1, RUNNING), *((admit.request_id, token, RUNNING) for token in ids[:-1])]
        rows.append((admit.request_id, ids[-1], LENGTH))
        columns = {i: (-0.5 * i, i, top, [-0.5, -1.0, -1.5]) for i in range(1, len(rows))}
        return [tokens(rows, logprobs=logprob_columns(columns))]

    async def body(scheduler: ScriptedScheduler, client: AsyncClient) -> None:
        choice = (await client.generate("say it", logprobs=2)).choices[0]
        assert choice.logprobs is not None
        assert [each.token_id for each in choice.logprobs] == ids
        assert "".join(each.token for each in choice.logprobs) == "the fox"
        assert [(each.logprob, each.rank) for each in choice.logprobs] == [
            (-0.5 * i, i) for i in range(1, len(ids) + 1)
        ]
        assert all(
            each.top == tuple((t, tokenizer.token_text(t), p) for t, p in ((5, -0.5), (6, -1.0)))
            for each in choice.logprobs
        )
        assert scheduler.expect(Admit).params.logprobs == 2
        sampled_only = (await client.generate("say it", logprobs=0)).choices[0].logprobs
        assert sampled_only is not None
        assert [each.top for each in sampled_only] == [()] * len(ids)

    with_client(script, body)


def test_chat_uses_the_template(tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "hello"}]

    async def body(scheduler: ScriptedScheduler, client: AsyncClient) -> None:
        expected = tokenizer.encode(tokenizer.render_chat(messages), add_special_tokens=False)
        assert (await client.chat(messages, max_tokens=5)).prompt_token_ids == tuple(expected)
        chunks = await collect(client.chat_stream(messages, max_tokens=5))
        assert "".join(chunk.text for chunk in chunks) == "hi"
        assert scheduler.expect(Admit).prompt == scheduler.expect(Admit).prompt
        with pytest.raises(InvalidParameterError, match="unknown role robot"):
            await client.chat([{"role": "robot", "content": "x"}])

    with_client(answer("hi"), body)


def test_a_model_without_a_tokenizer_serves_token_ids(tmp_path: Path, tokenizer: Tokenizer) -> None:
    async def main() -> None:
        with ScriptedScheduler(model_card=card(str(tmp_path)), on_admit=answer("hi")) as scheduler:
            async with AsyncClient(scheduler.endpoint) as client:
                completion = await client.generate([1, 2])
                assert (completion.text, completion.token_ids) == ("", tuple(tokenizer.encode("hi")))
                for work in (client.generate("text"), client.generate([1], stop="x"), client.chat([{"role": "user"}])):
                    with pytest.raises(ModelError, match="no usable tokenizer"):
                        await work

    run(main())


def test_the_tokenizer_comes_from_the_models_folder(tmp_path: Path) -> None:
    async def main() -> None:
        folder = save_byte_level(tmp_path)
        with ScriptedScheduler(model_card=card(str(folder)), on_admit=answer(TEXT)) as scheduler:
            async with AsyncClient(scheduler.endpoint) as client:
                assert (await client.generate("say it")).text == TEXT

    run(main())


def test_many_requests_at_once_keep_apart(tokenizer: Tokenizer) -> None:
    """64 streams, one frame for all of them at each step, as a scheduler sends it."""
    admits: list[Admit] = []
    texts = [f"request {i} of the quick brown fox"[: 9 + i % 20] for i in range(64)]

    def script(admit: Admit) -> Iterable[Message]:
        admits.append(admit)
        if len(admits) < len(texts):
            return
        ids = {a.request_id: tokenizer.encode(texts[len(a.prompt) // 4 - 1]) for a in admits}
        for step in range(max(map(len, ids.values()))):
            yield tokens(
                [
                    (request_id, row[step], LENGTH if step == len(row) - 1 else RUNNING)
                    for request_id, row in ids.items()
                    if step < len(row)
                ]
            )

    async def body(scheduler: ScriptedScheduler, client: AsyncClient) -> None:
        answers = await asyncio.gather(*(collect(client.stream([1] * (i + 1))) for i in range(len(texts))))
        assert ["".join(chunk.text for chunk in chunks) for chunks in answers] == texts

    with_client(script, body)


def test_the_sync_client() -> None:
    with ScriptedScheduler(on_admit=answer(TEXT)) as scheduler:
        scheduler.stats = stats(running=2)
        with Client(scheduler.endpoint, tokenizer=byte_level_tokenizer()) as client:
            assert client.card == scheduler.card
            assert client.generate("say it", temperature=0).text == TEXT
            assert client.chat([{"role": "user", "content": "x"}]).text == TEXT
            assert "".join(chunk.text for chunk in client.stream("say it")) == TEXT
            assert "".join(c.text for c in client.chat_stream([{"role": "user", "content": "x"}])) == TEXT
            assert client.stats().running == 2
            with pytest.raises(InvalidParameterError, match="temperature"):
                client.generate("say it", temperature=-1)
            with pytest.raises(InvalidParameterError, match="empty"):
                list(client.stream(""))
        with pytest.raises(UnavailableError, match="closed"):
            client.generate("say it")
        client.close()


def test_the_sync_client_from_many_threads() -> None:
    with (
        ScriptedScheduler(on_admit=answer(TEXT)) as scheduler,
        Client(scheduler.endpoint, tokenizer=byte_level_tokenizer()) as client,
    ):
        texts: list[str] = []
        threads = [threading.Thread(target=lambda: texts.append(client.generate("say it").text)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
        assert texts == [TEXT] * 8


def test_closing_a_sync_client_leaves_no_thread_waiting() -> None:
    """Threads that go on calling, whatever they are told: each call ends."""
    with ScriptedScheduler() as scheduler:
        for _ in range(5):
            client, refused = Client(scheduler.endpoint, tokenizer=byte_level_tokenizer()), threading.Event()

            def call_on(client: Client = client, refused: threading.Event = refused) -> None:
                while not refused.is_set():
                    with contextlib.suppress(TandemError):
                        client.stats()

            threads = [threading.Thread(target=call_on, daemon=True) for _ in range(6)]
            for thread in threads:
                thread.start()
            client.stats()
            client.close()
            with pytest.raises(UnavailableError, match="closed"):
                client.stats()
            refused.set()
            for thread in threads:
                thread.join(WAIT_S)
                assert not thread.is_alive(), "a call waits for ever"


def test_leaving_a_sync_stream_early_aborts() -> None:
    def script(admit: Admit) -> Iterable[Message]:
        return [tokens([(admit.request_id, 5, RUNNING)])]

    with (
        ScriptedScheduler(on_admit=script) as scheduler,
        Client(scheduler.endpoint, tokenizer=byte_level_tokenizer()) as client,
    ):
        for _ in client.stream("say it"):
            break
        assert scheduler.expect(Abort).request_ids == [1]


def test_a_sync_client_without_a_scheduler_gives_up() -> None:
    with pytest.raises(UnavailableError, match="did not answer"):
        Client("ipc:///tmp/tandem-test-nobody.sock", timeout_s=0.05)
