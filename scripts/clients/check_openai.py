"""The openai client as its users use it: blocking, async, streamed, with errors."""

from __future__ import annotations

import asyncio
import os

import openai

URL, MODEL = os.environ["BASE_URL"], os.environ["MODEL"]
MESSAGES = [{"role": "user", "content": "What is threading.Lock?"}]


def main() -> None:
    client = openai.OpenAI(base_url=URL, api_key="unused", max_retries=0)
    assert MODEL in [model.id for model in client.models.list()]
    whole = client.completions.create(model=MODEL, prompt="Return the", max_tokens=24, temperature=0)
    parts = client.completions.create(
        model=MODEL, prompt="Return the", max_tokens=24, temperature=0, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    text, usage = "", None
    for part in parts:
        text += part.choices[0].text if part.choices else ""
        usage = part.usage or usage
    assert text == whole.choices[0].text, (text, whole.choices[0].text)
    assert usage is not None and usage.completion_tokens == whole.usage.completion_tokens
    print("completions:", repr(whole.choices[0].text[:60]))

    chat = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=24, temperature=0, logprobs=True)
    assert len(chat.choices[0].logprobs.content) == chat.usage.completion_tokens
    print("chat:", repr(chat.choices[0].message.content[:60]))
    asyncio.run(many())
    errors(client)


async def many() -> None:
    async with openai.AsyncOpenAI(base_url=URL, api_key="unused", max_retries=0) as client:

        async def one(seed: int) -> str:
            stream = await client.chat.completions.create(
                model=MODEL, messages=MESSAGES, max_tokens=16, seed=seed, temperature=1.0, stream=True
            )
            return "".join([part.choices[0].delta.content or "" async for part in stream])

        first, second = await asyncio.gather(*map(one, range(16))), await asyncio.gather(*map(one, range(16)))
        assert first == second, "a seed gives the same text again"
        stream = await client.completions.create(model=MODEL, prompt="a", max_tokens=200, stream=True)
        await anext(aiter(stream))
        await stream.close()
    print("async: 32 streams, each seed twice the same")


def errors(client: openai.OpenAI) -> None:
    for kind, fields in (
        (openai.NotFoundError, {"model": "nobody", "prompt": "a"}),
        (openai.BadRequestError, {"model": MODEL, "prompt": "a", "temperature": -1}),
        (openai.BadRequestError, {"model": MODEL, "prompt": "a", "max_tokens": 10**6}),
    ):
        try:
            client.completions.create(**fields)
        except kind as error:
            print(f"errors: {kind.__name__}: {error.body['message']}")
        else:
            raise AssertionError(f"{fields} was taken")


if __name__ == "__main__":
    main()
