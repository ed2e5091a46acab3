"""langchain-openai: chat, stream, batch and a chain."""

from __future__ import annotations

import os

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI, OpenAI

URL, MODEL = os.environ["BASE_URL"], os.environ["MODEL"]


def main() -> None:
    chat = ChatOpenAI(base_url=URL, api_key="unused", model=MODEL, temperature=0, max_tokens=20)
    chain = ChatPromptTemplate.from_messages([("user", "What is {name}?")]) | chat | StrOutputParser()
    text = chain.invoke({"name": "threading.Lock"})
    assert "".join(chain.stream({"name": "threading.Lock"})) == text
    assert chain.batch([{"name": "threading.Lock"}] * 4) == [text] * 4
    answer = chat.invoke("What is threading.Lock?")
    assert answer.usage_metadata["output_tokens"] == 20, answer.usage_metadata
    plain = OpenAI(base_url=URL, api_key="unused", model=MODEL, temperature=0, max_tokens=12).invoke("Return the")
    print("langchain-openai:", repr(text[:50]), "|", repr(plain[:50]))


if __name__ == "__main__":
    main()
