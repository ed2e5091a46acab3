"""Streaming text equals the decode of the whole, however it is cut; stop strings never leave."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frontend.detokenizer import Detokenizer, StopStrings, WindowStream
from frontend.tokenizer import Tokenizer
from tests.frontend.tokenizers_for_tests import PATIENT, byte_level_tokenizer, sentencepiece_tokenizer

TOKENIZERS = {"byte_level": byte_level_tokenizer, "sentencepiece": sentencepiece_tokenizer}
UNICODE = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\ufffd"), max_size=40)
PLAIN = st.text("abstop. é😀", max_size=40)


def pieces(data: st.DataObject, items: list[int] | str) -> list[list[int]] | list[str]:
    """Any cut of `items` into consecutive parts."""
    cuts = sorted(data.draw(st.lists(st.integers(0, len(items)), max_size=6)))
    return [items[a:b] for a, b in zip([0, *cuts], [*cuts, len(items)], strict=True)]  # type: ignore[return-value]


def stream(detokenizer: Detokenizer, parts: list[list[int]]) -> list[str]:
    texts = []
    for i, part in enumerate(parts):
        text, used, found = detokenizer.push(part, final=i == len(parts) - 1)
        assert used == len(part)
        assert found is None
        texts.append(text)
    return texts


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(data=st.data(), text=st.one_of(UNICODE, PLAIN))
@settings(max_examples=300, **PATIENT)
def test_deltas_concatenate_to_the_text(kind: str, data: st.DataObject, text: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    ids = tokenizer.encode(text, add_special_tokens=False)
    texts = stream(Detokenizer(tokenizer, ()), pieces(data, ids))
    assert "".join(texts) == tokenizer.decode(ids)
    assert not any("\ufffd" in part for part in texts)


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("text", ["é the 😀", "ñ😀 stop"])
def test_every_cut_there_is(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert 4 <= len(ids) <= 12
    for cuts in range(1 << (len(ids) - 1)):  # bit i: a cut after token i
        ends = [i + 1 for i in range(len(ids)) if cuts >> i & 1 or i == len(ids) - 1]
        parts = [ids[a:b] for a, b in zip([0, *ends], ends, strict=False)]
        assert "".join(stream(Detokenizer(tokenizer, ()), parts)) == tokenizer.decode(ids) == text


@given(data=st.data())
@settings(max_examples=300, **PATIENT)
def test_random_ids_of_a_byte_level_tokenizer(data: st.DataObject) -> None:
    """Also bytes that are no text, ids beyond the vocabulary, special and added tokens: all as the library does."""
    tokenizer = byte_level_tokenizer()
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 20), max_size=40))
    skip = data.draw(st.booleans())
    detokenizer = Detokenizer(tokenizer, (), skip_special_tokens=skip)
    assert "".join(stream(detokenizer, pieces(data, ids))) == tokenizer.decode(ids, skip_special_tokens=skip)


@given(data=st.data())
@settings(max_examples=200, **PATIENT)
def test_random_ids_with_byte_fallback_do_not_depend_on_the_cut(data: st.DataObject) -> None:
    tokenizer = sentencepiece_tokenizer()
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=60))
    whole = stream(Detokenizer(tokenizer, ()), [ids])
    assert "".join(stream(Detokenizer(tokenizer, ()), pieces(data, ids))) == "".join(whole)


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(data=st.data(), before=UNICODE, text=UNICODE, keep=st.integers(0, 3), completes=st.booleans())
@settings(max_examples=300, **PATIENT)
def test_a_prompt_that_ends_inside_a_character_leaks_nothing(
    kind: str, data: st.DataObject, before: str, text: str, keep: int, completes: bool
) -> None:
    tokenizer = TOKENIZERS[kind]()
    smile = byte_ids(tokenizer, "😀")
    prompt = tokenizer.encode(before, add_special_tokens=False) + smile[:keep]
    ids = (smile[keep:] if completes else []) + tokenizer.encode(text, add_special_tokens=False)
    sent = "".join(stream(Detokenizer(tokenizer, prompt), pieces(data, ids)))
    # After a prompt the first word keeps its space; nothing else may be added.
    assert sent in (tokenizer.decode(ids), " " + tokenizer.decode(ids))


def byte_ids(tokenizer: Tokenizer, char: str) -> list[int]:
    if not tokenizer.byte_level:
        return [3 + byte for byte in char.encode()]
    whole = range(tokenizer.vocab_size)
    return [next(i for i in whole if tokenizer.bytes_of[i] == bytes([byte])) for byte in char.encode()]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_an_incomplete_character_waits_and_is_flushed_at_the_end(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    ids = byte_ids(tokenizer, "😀")
    detokenizer = Detokenizer(tokenizer, ())
    assert [detokenizer.push([token], final=False)[0] for token in ids[:3]] == ["", "", ""]
    assert detokenizer.push(ids[3:], final=False)[0] == "😀"
    cut_short = Detokenizer(tokenizer, ())
    assert cut_short.push(ids[:2], final=False)[0] == ""
    assert set(cut_short.push((), final=True)[0]) == {"\ufffd"}


def test_the_space_of_the_first_word_is_kept_after_a_prompt() -> None:
    tokenizer = sentencepiece_tokenizer()
    the = tokenizer.encode("the", add_special_tokens=False)
    assert "".join(stream(Detokenizer(tokenizer, the), [the])) == " the"
    assert "".join(stream(Detokenizer(tokenizer, ()), [the])) == "the"


def test_a_bad_byte_does_not_repeat_or_replace_what_was_sent() -> None:
    """Byte fallback decodes these four bytes as four U+FFFD; the first three were sent as one character."""
    tokenizer = sentencepiece_tokenizer()
    ids = [*byte_ids(tokenizer, "€"), 3 + 0x80, *tokenizer.encode("the", add_special_tokens=False)]
    assert tokenizer.decode(ids) == "\ufffd" * 4 + " the"
    assert "".join(stream(Detokenizer(tokenizer, ()), [[token] for token in ids])) == "€\ufffd the"


def test_bytes_that_never_become_text_are_not_held_for_ever() -> None:
    tokenizer = sentencepiece_tokenizer()
    window = WindowStream(tokenizer, True)
    sent = [window.push([3 + 0x80]) for _ in range(100)]
    assert sum(map(len, sent)) >= 76
    assert max(map(len, sent)) <= 24


def test_the_text_of_the_ending_token_is_sent_only_on_request() -> None:
    tokenizer = byte_level_tokenizer()
    ids = tokenizer.encode("the", add_special_tokens=False)
    assert Detokenizer(tokenizer, ()).push(ids, final=True, ended_by_token=True)[0] == tokenizer.decode(ids[:-1])
    included = Detokenizer(tokenizer, (), include_stop=True)
    assert included.push(ids, final=True, ended_by_token=True)[0] == "the"


def until_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Oracle: character by character, the first stop string to be complete ends the text."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


STOPS = st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=3)


@given(data=st.data(), text=st.text("abc", max_size=30), stops=STOPS)
@settings(max_examples=1000, **PATIENT)
def test_text_ends_before_the_stop_string_at_every_cut(data: st.DataObject, text: str, stops: list[str]) -> None:
    matcher = StopStrings(stops, include=False)
    expected, expected_stop = until_stop(text, stops)
    sent, arrived, found = "", "", None
    for part in pieces(data, text):
        arrived += part
        new, found = matcher.push(part)
        sent += new
        if found:
            break
        held = arrived[len(sent) :]
        assert arrived.startswith(sent)
        assert not held or any(stop.startswith(held) for stop in stops), "held back without need"
    if found is None:
        sent += matcher.release()
    assert (sent, found) == (expected, expected_stop)
    if len(stops) == 1:
        assert sent == text.split(stops[0])[0]


@given(data=st.data(), text=st.text("ab", max_size=30), stop=st.text("ab", min_size=1, max_size=5))
@settings(max_examples=300, **PATIENT)
def test_an_included_stop_string_is_sent_whole(data: st.DataObject, text: str, stop: str) -> None:
    matcher = StopStrings([stop], include=True)
    sent, found = "", None
    for part in pieces(data, text):
        new, found = matcher.push(part)
        sent += new
        if found:
            break
    sent += "" if found else matcher.release()
    before, _, _ = text.partition(stop)
    assert sent == (before + stop if stop in text else text)


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(data=st.data(), text=PLAIN, stop=st.text("abstop ", min_size=1, max_size=4))
@settings(max_examples=300, **PATIENT)
def test_stop_strings_over_tokens(kind: str, data: st.DataObject, text: str, stop: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    ids = tokenizer.encode(text, add_special_tokens=False)
    whole = tokenizer.decode(ids)
    detokenizer = Detokenizer(tokenizer, (), stop=[stop])
    sent, used, found = "", 0, None
    parts = pieces(data, ids)
    for i, part in enumerate(parts):
        new, n, found = detokenizer.push(part, final=i == len(parts) - 1)
        sent, used = sent + new, used + n
        if found:
            break
    assert sent == whole.split(stop)[0]
    assert found == (stop if stop in whole else None)
    if found is None:
        assert used == len(ids)
    else:
        # Exactly the tokens up to the one that completes the stop string, wherever the cuts were.
        assert stop in tokenizer.decode(ids[:used]) + ("" if used < len(ids) else whole)
        assert stop not in tokenizer.decode(ids[: used - 1]).rstrip("\ufffd")


def test_stop_strings_do_not_end_a_text_before_min_tokens() -> None:
    tokenizer = byte_level_tokenizer()
    ids = byte_ids(tokenizer, "aXbXc")
    detokenizer = Detokenizer(tokenizer, (), stop=["X"], min_tokens=2)
    assert detokenizer.push(ids, final=True) == ("aXb", 4, "X")
