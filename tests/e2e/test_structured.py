"""Structured output from a whole engine: every answer validates, and neither kind of row disturbs the other."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from enum import Enum
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel, ConfigDict, Field

from frontend import AsyncClient, StructuredOutputs
from frontend.request import Completion
from tests.e2e.engine import Engine, running_engine
from tests.e2e.reference import Case, greedy_cases

pytest.importorskip("llguidance")

WAIT_S = 240.0
FLAGS = ("--dtype", "float32", "--max-num-seqs", "32", "--num-gpu-blocks-override", "300")


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Colour(Enum):
    RED = "red"
    GREEN = "green"


class Person(Strict):
    name: str = Field(max_length=12)
    age: int = Field(ge=0, le=150)


class Shop(Strict):
    owner: Person
    colours: list[Colour] = Field(min_length=1, max_length=3)
    open: bool
    note: str | None = Field(max_length=8)
    price: float = Field(ge=0, le=100, multiple_of=0.25)
    code: str = Field(pattern=r"^[A-Z]{2}-[0-9]{3}$")


class Either(Strict):
    value: Person | Literal[1, 2, 3] | Colour


MODELS: tuple[type[Strict], ...] = (Person, Shop, Either)
RULES: dict[str, tuple[StructuredOutputs, str]] = {
    "regex": (StructuredOutputs(regex=r"\d{3}-[a-f]{4}(, (yes|no)){1,3}"), r"\d{3}-[a-f]{4}(, (yes|no)){1,3}"),
    "choice": (StructuredOutputs(choice=["first", "second one", "Zürich ☃"]), "first|second one|Zürich ☃"),
    "gbnf": (StructuredOutputs(grammar='root ::= "(" [a-c]{1,4} ")" | "none"'), r"\([a-c]{1,4}\)|none"),
    "lark": (StructuredOutputs(grammar='start: WORD ("," WORD)~2\nWORD: /[a-z]{2,5}/'), "[a-z]{2,5}(,[a-z]{2,5}){2}"),
}


@pytest.fixture(scope="module", params=[(2, 1), (3, 3)], ids=["depth 2", "depth 3, three frontends"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    depth, frontends = request.param
    with running_engine(*FLAGS, "--pipeline-depth", str(depth), "--frontends", str(frontends)) as engine:
        yield engine


def prompt(text: str) -> str:
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


async def constrained(client: AsyncClient, spec: StructuredOutputs, seed: int, temperature: float = 1.0) -> Completion:
    return await client.generate(
        prompt("Give me one."),
        max_tokens=400,
        temperature=temperature,
        seed=seed,
        structured_outputs=spec,
        timeout_s=WAIT_S,
    )


async def all_kinds(client: AsyncClient, seeds: range) -> list[Completion]:
    specs = [StructuredOutputs(json=model.model_json_schema()) for model in MODELS]
    specs += [spec for spec, _ in RULES.values()]
    return await asyncio.gather(*(constrained(client, spec, seed) for seed in seeds for spec in specs))


def check(results: list[Completion], seeds: range) -> None:
    """Each answer is complete and of its kind; `results` in the order of `all_kinds`."""
    kinds: list[Any] = [*MODELS, *(pattern for _, pattern in RULES.values())]
    for kind, result in zip(kinds * len(seeds), results, strict=True):
        assert result.choices[0].finish_reason == "stop", result.text
        if isinstance(kind, str):
            assert re.fullmatch(kind, result.text), result.text
        else:
            kind.model_validate_json(result.text)


def free(client: AsyncClient, cases: list[Case]) -> Any:
    return asyncio.gather(*(client.generate(list(case.prompt), case.params(), timeout_s=WAIT_S) for case in cases))


def test_all_kinds_are_right_and_free_rows_run_on_undisturbed(engine: Engine) -> None:
    cases = greedy_cases(24, 200, max_tokens=24)

    async def run() -> None:
        async with AsyncClient(engine.endpoint) as client:
            results, plain = await asyncio.gather(all_kinds(client, range(3)), free(client, cases))
            check(results, range(3))
            assert [result.token_ids for result in plain] == [case.output for case in cases]
            alone = await all_kinds(client, range(1))
            assert alone == results[: len(alone)], "what runs beside a request changes its tokens"
            stats = await client.stats()
            assert stats.hidden_steps > 0, "free rows must run ahead"
            assert (stats.running, stats.waiting, stats.dropped_messages) == (0, 0, 0)
            assert stats.blocks_free == stats.blocks_total

    asyncio.run(asyncio.wait_for(run(), WAIT_S))


def test_answers_are_the_same_when_the_executor_is_killed(engine: Engine) -> None:
    async def run() -> None:
        async with AsyncClient(engine.endpoint) as client:
            expected = await all_kinds(client, range(2))
            started = asyncio.Event()

            async def one(seed: int) -> str:
                chunks = client.stream(
                    prompt("Give me one."),
                    max_tokens=400,
                    temperature=1.0,
                    seed=seed,
                    structured_outputs=StructuredOutputs(json=Shop.model_json_schema()),
                )
                text = ""
                async for chunk in chunks:
                    text += chunk.text
                    if len(text) > 10:
                        started.set()
                return text

            running = asyncio.gather(*(one(seed) for seed in range(2)))
            await started.wait()
            engine.children()["executor"].kill()
            kinds = len(MODELS) + len(RULES)
            assert await running == [expected[seed * kinds + MODELS.index(Shop)].text for seed in range(2)]

    asyncio.run(asyncio.wait_for(run(), WAIT_S))


def test_what_cannot_be_is_400_and_harms_nobody(engine: Engine) -> None:
    with openai.OpenAI(base_url=engine.url, api_key="none", max_retries=0, timeout=WAIT_S) as client:

        def ask(**extra: Any) -> Any:
            messages: Any = [{"role": "user", "content": "hello"}]
            return client.chat.completions.create(model="demo", messages=messages, max_tokens=200, **extra)

        for extra in (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "objec"}}}},
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#"}}}},
            {"extra_body": {"structured_outputs": {"regex": "(a"}}},
            {"extra_body": {"guided_regex": "(a", "stream": True}},
            {"extra_body": {"structured_outputs": {"grammar": "start: nothing"}}},
            {"extra_body": {"structured_outputs": {"regex": "a", "choice": ["b"]}}},
        ):
            with pytest.raises(openai.BadRequestError):
                ask(**extra)
        answer = ask(response_format={"type": "json_object"}, temperature=0, extra_body={"seed": 3})
        assert answer.choices[0].finish_reason in ("stop", "length")
        assert answer.choices[0].message.content.lstrip().startswith("{")
        picked = ask(extra_body={"guided_choice": ["left", "right"]}, n=4, logprobs=True)
        assert {choice.message.content for choice in picked.choices} <= {"left", "right"}
        assert all(choice.logprobs.content for choice in picked.choices)


def test_openai_parses_its_models(engine: Engine) -> None:
    with openai.OpenAI(base_url=engine.url, api_key="none", max_retries=0, timeout=WAIT_S) as client:
        messages: Any = [{"role": "user", "content": "Who?"}]
        options: dict[str, Any] = {"model": "demo", "messages": messages, "temperature": 1.0, "seed": 5}
        answer = client.chat.completions.parse(**options, response_format=Person)
        assert isinstance(answer.choices[0].message.parsed, Person)
        with client.chat.completions.stream(**options, response_format=Person) as stream:
            final = stream.get_final_completion()
        assert final.choices[0].message.parsed == answer.choices[0].message.parsed
        text = client.completions.create(
            model="demo", prompt="x", max_tokens=50, seed=1, extra_body={"guided_json": Person.model_json_schema()}
        )
        assert Person.model_validate_json(text.choices[0].text)
