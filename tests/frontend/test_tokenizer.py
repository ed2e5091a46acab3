"""The tokenizer does what transformers does, without torch."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frontend.tokenizer import LONG_TEXT_CHARS, Tokenizer
from ipc.errors import ContextLengthError, InvalidParameterError, ModelError
from tests.frontend.tokenizers_for_tests import (
    PATIENT,
    byte_level,
    byte_level_tokenizer,
    save_byte_level,
    sentencepiece,
    sentencepiece_tokenizer,
)

MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "naïve 😀"}]


def test_loading_and_using_it_never_imports_torch(tmp_path: Path) -> None:
    code = """
import sys
import frontend
tokenizer = frontend.Tokenizer.load(sys.argv[1])
text = tokenizer.render_chat([{"role": "user", "content": "x"}])
assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text
print(sorted(name for name in sys.modules if name.split(".")[0] == "torch"))
"""
    folder = save_byte_level(tmp_path)
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@given(text=st.text(st.characters(exclude_categories=("Cs",)), max_size=40))
@settings(max_examples=100, **PATIENT)
def test_encode_and_decode_are_those_of_transformers(text: str) -> None:
    for ours, theirs in ((byte_level_tokenizer(), BYTE_LEVEL), (sentencepiece_tokenizer(), SENTENCEPIECE)):
        ids = theirs.encode(text)
        assert ours.encode(text) == ids
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


BYTE_LEVEL, SENTENCEPIECE = byte_level(), sentencepiece()


def test_a_beginning_of_sequence_token_is_added_as_the_folder_says(tmp_path: Path) -> None:
    pretrained = byte_level()
    pretrained.bos_token = "<|im_start|>"
    pretrained.add_bos_token = True
    pretrained.save_pretrained(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("the") == [1, *byte_level_tokenizer().encode("the")]
    assert tokenizer.encode("the", add_special_tokens=False) == byte_level_tokenizer().encode("the")


def test_truncation_and_padding_of_the_folder_do_not_apply(tmp_path: Path) -> None:
    pretrained = byte_level()
    pretrained.backend_tokenizer.enable_truncation(3)
    pretrained.backend_tokenizer.enable_padding(length=8)
    pretrained.save_pretrained(tmp_path)
    text = "the quick brown fox"
    assert Tokenizer.load(tmp_path).encode(text) == byte_level_tokenizer().encode(text)


def test_chat_is_that_of_transformers() -> None:
    tokenizer = byte_level_tokenizer()
    for add in (True, False):
        expected = BYTE_LEVEL.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=add)
        assert tokenizer.render_chat(MESSAGES, add_generation_prompt=add) == expected
    ids = asyncio.run(tokenizer.encode_chat(MESSAGES))
    assert ids == BYTE_LEVEL.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)


def test_the_template_can_see_the_tools() -> None:
    pretrained = byte_level()
    pretrained.chat_template = "{{ tools[0]['function']['name'] }}{{ extra }}"
    tokenizer = Tokenizer(pretrained)
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    assert tokenizer.render_chat(MESSAGES, tools=tools, template_kwargs={"extra": 1}) == "add1"


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception('no system role') }}",
        "{{ 1 / 0 }}",
        "{% for %}",
        "{{ messages[0].content.nothing.here }}",
    ],
)
def test_a_template_is_sandboxed_and_its_errors_are_typed(template: str) -> None:
    pretrained = byte_level()
    pretrained.chat_template = template
    with pytest.raises(InvalidParameterError, match="chat template refused") as caught:
        Tokenizer(pretrained).render_chat(MESSAGES)
    assert caught.value.param == "messages"


@pytest.mark.parametrize("messages", [[], "hello", ["hello"], [{"content": "x"}], [{"role": 1}], [{"role": "robot"}]])
def test_bad_messages(messages: list[dict[str, str]]) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        asyncio.run(byte_level_tokenizer().encode_chat(messages))
    assert caught.value.param == "messages"


@pytest.mark.parametrize("name", ["chat_template", "tokenize", "tools"])
def test_a_request_cannot_bring_a_template_or_change_what_is_done_with_it(name: str) -> None:
    with pytest.raises(InvalidParameterError, match=f"may not set {name}") as caught:
        byte_level_tokenizer().render_chat(MESSAGES, template_kwargs={name: "{{ 1 }}"})
    assert caught.value.param == "chat_template_kwargs"


def test_no_chat_template() -> None:
    with pytest.raises(InvalidParameterError, match="no chat template"):
        sentencepiece_tokenizer().render_chat(MESSAGES)


def test_what_is_no_text_is_refused_by_field() -> None:
    tokenizer = byte_level_tokenizer()
    for bad in ("\ud800", 5):
        with pytest.raises(InvalidParameterError) as caught:
            tokenizer.encode(bad)  # type: ignore[arg-type]
        assert caught.value.param == "prompt"
    with pytest.raises(InvalidParameterError) as caught:
        asyncio.run(tokenizer.encode_chat([{"role": "user", "content": "\ud800"}]))
    assert caught.value.param == "messages"


def test_a_text_of_any_length_is_refused_after_its_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, seen = byte_level_tokenizer(), list[int]()
    encode = tokenizer._encode_batch
    monkeypatch.setattr(tokenizer, "_encode_batch", lambda texts, add: seen.append(len(texts[0])) or encode(texts, add))
    message = r"context length is 1000 tokens; the first 16000 of the 1000000 characters are \d{4}"
    for param in ("prompt", "messages"):
        with pytest.raises(ContextLengthError, match=message) as caught:
            asyncio.run(tokenizer.encode_all([LONG_TEXT], param=param, max_tokens=1000))
        assert caught.value.param == param
    assert seen == [16000, 16000]
    assert asyncio.run(tokenizer.encode_all([LONG_TEXT], max_tokens=10**6)) == [tokenizer.encode(LONG_TEXT)]


def test_tags_of_tool_calls_are_seen_even_where_they_are_special() -> None:
    pretrained = byte_level()
    pretrained.add_tokens(["<tool_call>", "</tool_call>", "<hidden>"], special_tokens=True)
    tokenizer = Tokenizer(pretrained)
    ids = tokenizer.encode("<tool_call>a<hidden></tool_call>", add_special_tokens=False)
    assert b"".join(tokenizer.shown_bytes_of[token] for token in ids) == b"<tool_call>a</tool_call>"


def test_a_developer_is_the_system_to_a_template_that_knows_none() -> None:
    tokenizer = byte_level_tokenizer()
    shown = "{% if m.role in ('system', 'user'%s) %}[{{ m.role }}] {{ m.content }}{% endif %}"
    loop = "{% for m in messages %}" + shown + "{% endfor %}"
    messages = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": "hello"}]
    tokenizer.use_chat_template(loop.replace("%s", ""))
    assert tokenizer.render_chat(messages) == "[system] be brief[user] hello"
    tokenizer.use_chat_template(loop.replace("%s", ", 'developer'"))
    assert tokenizer.render_chat(messages) == "[developer] be brief[user] hello"


def turns_during(work: Callable[[Tokenizer], Coroutine[Any, Any, Any]]) -> int:
    """How often the event loop gets a turn until `work` is done; a thread that keeps Python's lock leaves it none."""

    async def main() -> int:
        turns, task = 0, asyncio.create_task(work(byte_level_tokenizer()))
        while not task.done():
            await asyncio.sleep(0)
            turns += 1
        task.result()
        return turns

    return asyncio.run(main())


LONG_TEXT = "the quick brown fox " * 50_000


def test_the_loop_goes_on_while_long_texts_are_encoded_and_decoded() -> None:
    tokenizer, parts = byte_level_tokenizer(), ["the quick brown fox "] * (LONG_TEXT_CHARS // 10)
    ids = tokenizer.encode(LONG_TEXT)
    assert turns_during(lambda tokenizer: tokenizer.encode_async(LONG_TEXT)) > 20
    assert turns_during(lambda tokenizer: tokenizer.encode_all(parts * 100)) > 20
    assert turns_during(lambda tokenizer: tokenizer.decode_async(ids * 20)) > 20
    assert asyncio.run(tokenizer.encode_async(LONG_TEXT)) == ids
    assert asyncio.run(tokenizer.encode_all(parts)) == [tokenizer.encode(part) for part in parts]
    assert asyncio.run(tokenizer.encode_all(["a b", "c"], add_special_tokens=False)) == [
        tokenizer.encode(part, add_special_tokens=False) for part in ("a b", "c")
    ]
    assert asyncio.run(tokenizer.decode_async(ids)) == tokenizer.decode(ids)


def test_tokens_that_are_part_of_a_character_have_its_bytes() -> None:
    for tokenizer in (byte_level_tokenizer(), sentencepiece_tokenizer()):
        ids = tokenizer.encode("😀", add_special_tokens=False)
        assert len(ids) > 1
        together = b"".join(tokenizer.token_bytes(token, tokenizer.token_text(token)) for token in ids)
        assert together.decode().strip() == "😀"


def test_texts_of_single_tokens() -> None:
    tokenizer = byte_level_tokenizer()
    for token in range(tokenizer.vocab_size):
        assert tokenizer.token_text(token) == tokenizer.decode([token], skip_special_tokens=False)
    assert tokenizer.token_text(tokenizer.vocab_size + 5) == ""
    pieces = sentencepiece_tokenizer()
    (the,) = pieces.encode("the", add_special_tokens=False)
    assert pieces.token_text(the) == " the"


@pytest.mark.parametrize("content", [None, "", "{", "{}", '{"model": 5}'])
def test_a_folder_without_a_usable_tokenizer(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match="no usable tokenizer") as caught:
        Tokenizer.load(tmp_path)
    assert caught.value.param == "--model"
