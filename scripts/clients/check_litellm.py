"""litellm, to which the engine is one more hosted OpenAI server."""

from __future__ import annotations

import asyncio
import os

import litellm

URL, MODEL = os.environ["BASE_URL"], os.environ["MODEL"]


def main() -> None:
    common = {"model": f"openai/{MODEL}", "api_base": URL, "api_key": "unused", "temperature": 0, "max_tokens": 20}
    messages = [{"role": "user", "content": "What is threading.Lock?"}]
    whole = litellm.completion(messages=messages, **common)
    text = whole.choices[0].message.content
    streamed = "".join(
        p.choices[0].delta.content or "" for p in litellm.completion(messages=messages, stream=True, **common)
    )
    assert streamed == text, (streamed, text)
    assert whole.usage.completion_tokens == 20
    again = asyncio.run(litellm.acompletion(messages=messages, **common))
    assert again.choices[0].message.content == text
    plain = litellm.text_completion(prompt="Return the", **{**common, "model": f"text-completion-openai/{MODEL}"})
    print("litellm:", repr(text[:50]), "|", repr(plain.choices[0].text[:50]))
    try:
        litellm.completion(messages=messages, **{**common, "max_tokens": 10**6})
    except litellm.BadRequestError as error:
        print("litellm error:", str(error)[:140])
    else:
        raise AssertionError("a request that cannot fit was taken")


if __name__ == "__main__":
    main()
