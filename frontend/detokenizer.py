"""Token ids to text as they arrive, and the end at a stop string: pure state machines, one of each per sequence.

Called by the client for each increment. The text of all increments together is the same however the tokens were cut
into increments, it holds no half character, and no part of a stop string ever leaves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

from frontend.tokenizer import Tokenizer, new_utf8_decoder

_CONTEXT_TOKENS: Final = 6  # of the prompt: enough to tell whether the first token starts with a space
_MAX_HELD_TOKENS: Final = 24  # a character is at most 4 byte tokens: what is undecided for longer is not text
_UNDECIDED: Final = "\ufffd"


class TextStream(Protocol):
    """Turns token ids into text. `push` returns what is decided; `final` also what never will be."""

    def push(self, ids: Sequence[int], final: bool = False) -> str: ...


class ByteStream:
    """For byte-level tokenizers: each token is fixed bytes, so only the last incomplete character is held back."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._bytes_of = (tokenizer.shown_bytes_of if skip_special_tokens else tokenizer.bytes_of).__getitem__
        self._utf8 = new_utf8_decoder()
        self._is_between = True  # characters: the decoder holds nothing back

    def push(self, ids: Sequence[int], final: bool = False) -> str:
        data = b"".join(map(self._bytes_of, ids))
        if self._is_between and data.isascii():
            return data.decode("ascii")  # most tokens, at a third of the cost
        text = self._utf8.decode(data, final)
        self._is_between = not self._utf8.getstate()[0]
        return text


class WindowStream:
    """For tokenizers whose tokens decode by their neighbours (sentencepiece, word pieces).

    Decodes a short window of tokens with and without the new ones and sends the difference, once it does not end in an
    undecided character. The window starts with the prompt's last tokens, so that the first space is not lost.
    """

    # window[:read]   sent, kept as context; `before` is their text
    # window[read:]   held back: undecided
    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool, prompt: Sequence[int] = ()) -> None:
        self._decode = tokenizer.decode
        self._skip = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._window = [token for token in prompt[-_CONTEXT_TOKENS:] if token not in self._skip]
        self._before = self._text(self._window)
        if self._before.endswith(_UNDECIDED):
            # Cut inside a character: its bytes would make the first bytes of the output undecodable too.
            self._window, self._before = [], ""
        self._read = len(self._window)

    def push(self, ids: Sequence[int], final: bool = False) -> str:
        sent = [self._push_one(token) for token in ids if token not in self._skip]
        if final:
            sent.append(self._fresh())
        return "".join(sent)

    def _push_one(self, token: int) -> str:
        self._window.append(token)
        held = len(self._window) - self._read
        text = self._fresh()
        if held < _MAX_HELD_TOKENS and (not text or text.endswith(_UNDECIDED)):
            return ""
        self._window = self._window[self._read :]
        self._read = held
        self._before = self._text(self._window)
        return text

    def _fresh(self) -> str:
        """Text of the held tokens, given the sent ones."""
        whole = self._text(self._window)
        if whole.startswith(self._before):
            return whole[len(self._before) :]
        # Byte fallback decodes a run of bytes as one: a new byte can change text that was sent, or was the prompt's.
        return self._text(self._window[self._read :])

    def _text(self, ids: Sequence[int]) -> str:
        return self._decode(ids, skip_special_tokens=False)


class StopStrings:
    """Finds the stop string that completes first, and holds back only text that may still become one."""

    def __init__(self, stops: Sequence[str], include: bool) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """(text that may be sent, the stop string found or None). After a find there is nothing more to push."""
        text = self._held + text
        found = self._find(text)
        if found is not None:
            start, stop = found
            return text[: start + len(stop) if self._include else start], stop
        keep = self._ambiguous(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None

    def release(self) -> str:
        """The text held back, when it is known that it will not become a stop string."""
        held, self._held = self._held, ""
        return held

    def _find(self, text: str) -> tuple[int, str] | None:
        """(start, stop) of the match that ends first; of those, the one that starts first."""
        starts = [(text.find(stop), stop) for stop in self._stops]
        found = [(start + len(stop), start, stop) for start, stop in starts if start >= 0]
        if not found:
            return None
        _, start, stop = min(found)
        return start, stop

    def _ambiguous(self, text: str) -> int:
        """Length of the longest end of `text` that is a proper start of a stop string."""
        longest = 0
        for stop in self._stops:
            start = text.find(stop[0], max(0, len(text) - len(stop) + 1))
            while start >= 0 and not stop.startswith(text[start:]):
                start = text.find(stop[0], start + 1)
            if start >= 0:
                longest = max(longest, len(text) - start)
        return longest


class Detokenizer:
    """Text and end of one sequence."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
    ) -> None:
        self._stream: TextStream
        if tokenizer.byte_level:
            self._stream = ByteStream(tokenizer, skip_special_tokens)
        else:
            self._stream = WindowStream(tokenizer, skip_special_tokens, prompt)
        self._stops = StopStrings(stop, include_stop) if stop else None
        self._include_stop = include_stop
        self._exempt = min_tokens  # text of these first tokens is not searched for stop strings
        self._count = 0

    def push(self, ids: Sequence[int], *, final: bool, ended_by_token: bool = False) -> tuple[str, int, str | None]:
        """Text of the next tokens: (text, tokens used, stop string found or None).

        Tokens after the one that completes a stop string are not used. `final`: no more will come. `ended_by_token`:
        the last of `ids` is an end-of-sequence or stop id, whose text is sent only if stop strings are included.
        """
        hidden = 1 if ended_by_token and not self._include_stop else 0
        shown = ids[: len(ids) - hidden]
        if self._stops is None:
            return self._stream.push(shown, final), len(ids), None
        parts: list[str] = []
        for used, token in enumerate(shown, 1):
            found = self._search(self._stream.push((token,)), parts, exempt=self._count < self._exempt)
            self._count += 1
            if found is not None:
                return "".join(parts), used, found
        if final:
            found = self._search(self._stream.push((), True), parts, exempt=False)
            if found is not None:
                return "".join(parts), len(ids), found
            parts.append(self._stops.release())
        return "".join(parts), len(ids), None

    def _search(self, text: str, parts: list[str], *, exempt: bool) -> str | None:
        """Append to `parts` what may be sent of `text`; returns the stop string found."""
        assert self._stops is not None, "searched without stop strings"
        if exempt:
            parts.append(text)
            return None
        sent, found = self._stops.push(text)
        parts.append(sent)
        return found
