"""Text to token ids and back, and the chat template: transformers' tokenizer without torch.

Owned by a client, shared by its requests and safe to call from several threads. Loading goes through
PreTrainedTokenizerFast, because AutoTokenizer imports torch; encoding and decoding go to the Rust tokenizer below it,
because transformers' own `encode` changes the state of a shared object.
"""

from __future__ import annotations

import asyncio
import codecs
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

from ipc.errors import ContextLengthError, InvalidParameterError, ModelError

# Arguments of apply_chat_template that are no business of a template; a template from a request would be a program.
_RESERVED: Final = {
    *("conversation", "messages", "chat_template", "tools", "add_generation_prompt", "tokenize", "padding"),
    *("truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
}
_SHOWN: Final = ("<tool_call>", "</tool_call>")  # some models have them as special tokens, and calls begin with them
LONG_TEXT_CHARS: Final = 4096  # above this, encoding takes long enough (about 1 ms) to leave the event loop
_LONG_IDS: Final = 4096  # the same of decoding
# Four times as many as most have: so much of a text, for each token that is allowed, tells whether it is too long.
_CHARS_OF_TOKEN: Final = 16
T = TypeVar("T")

# One at a time: a text takes a hundred times its size while it is encoded.
_long: Final = ThreadPoolExecutor(1, thread_name_prefix="long text")
_BYTE_PIECE: Final = re.compile("<0x([0-9A-F]{2})>")  # of a tokenizer that falls back to bytes

# A batch is encoded by one thread: more would take the cores of the scheduler and the executor.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte of the ByteLevel decoder (GPT-2's `bytes_to_unicode`, inverted)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF: Final = _byte_alphabet()


class TokenBytes(dict[int, bytes]):
    """Token id -> its UTF-8 bytes, for byte-level tokenizers; empty for an id without a text, and for `hidden` ones.

    A dict, filled as tokens are met: it is asked for every token that is served.
    """

    def __init__(self, backend: Any, hidden: Iterable[int] = ()) -> None:
        super().__init__(dict.fromkeys(hidden, b""))
        self._backend = backend

    def __missing__(self, token_id: int) -> bytes:
        piece = self._backend.id_to_token(token_id) or ""
        # The ByteLevel decoder takes a piece with a foreign character as it stands: an added token.
        found = bytes(_BYTE_OF[c] for c in piece) if _BYTE_OF.keys() >= set(piece) else piece.encode()
        self[token_id] = found
        return found


class Tokenizer:
    """One model's tokenizer.

    `byte_level` tells that every token stands for fixed bytes, so text can be decoded incrementally without looking
    back; other tokenizers (sentencepiece) decode a token by its neighbours.
    """

    def __init__(self, pretrained: Any) -> None:
        """`pretrained`: a transformers PreTrainedTokenizerFast, which is not used elsewhere."""
        self._pretrained = pretrained
        self._backend = pretrained.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self.byte_level: Final = type(self._backend.decoder).__name__ == "ByteLevel"
        added = self._backend.get_added_tokens_decoder()
        self.special_ids: Final = frozenset(
            token for token, entry in added.items() if entry.special and entry.content not in _SHOWN
        )
        self._text_of: dict[int, str] = {}
        self.bytes_of: Final = TokenBytes(self._backend)
        self.shown_bytes_of: Final = TokenBytes(self._backend, hidden=self.special_ids)
        self._anchor: list[int] = self.encode("a", add_special_tokens=False)[-1:]

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Read the tokenizer of a local model folder. Raises ModelError if there is none that can be read."""
        # Imported here: it takes 0.6 s, which a program that sends token ids only need not spend.
        from transformers import PreTrainedTokenizerFast

        try:
            return cls(PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True))
        except Exception as error:  # the Rust library raises plain Exception for a file it cannot read
            raise ModelError(f"no usable tokenizer in {folder}: {error}", param="--model") from error

    @property
    def vocab_size(self) -> int:
        """Ids with a text, added tokens included; a model's embedding may be longer."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    @property
    def chat_template(self) -> str:
        """Its text; empty if there is none."""
        return str(self._pretrained.chat_template or "")

    @property
    def has_chat_template(self) -> bool:
        return bool(self._pretrained.chat_template)

    def use_chat_template(self, template: str) -> None:
        """Render conversations by `template` instead of the model's own."""
        self._pretrained.chat_template = template

    def encode(self, text: str, *, add_special_tokens: bool = True, param: str = "prompt") -> list[int]:
        """Token ids, with the special tokens that transformers adds.

        Raises InvalidParameterError, naming the field `param`, for what is no Unicode text.
        """
        _check_text(text, param)
        return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)

    async def encode_all(
        self,
        texts: Sequence[str],
        *,
        add_special_tokens: bool = True,
        param: str = "prompt",
        max_tokens: int | None = None,
    ) -> list[list[int]]:
        """`encode` of each text, off the event loop when they are long together.

        Raises ContextLengthError for a text of which the beginning has twice `max_tokens`: all of it could take minutes
        and gigabytes.
        """
        for text in texts:
            _check_text(text, param)
        if sum(map(len, texts)) <= LONG_TEXT_CHARS:
            return [self.encode(text, add_special_tokens=add_special_tokens) for text in texts]
        if max_tokens is not None:
            for text in texts:
                await self._refuse_endless(text, param, max_tokens)
        return await _off_the_loop(partial(self._encode_batch, texts, add_special_tokens))

    async def _refuse_endless(self, text: str, param: str, max_tokens: int) -> None:
        beginning = text[: _CHARS_OF_TOKEN * max_tokens]
        if len(beginning) == len(text):
            return
        (ids,) = await _off_the_loop(partial(self._encode_batch, [beginning], False))
        if len(ids) > 2 * max_tokens:  # a cut changes a few tokens beside it, never half of them
            raise ContextLengthError(
                f"maximum context length is {max_tokens} tokens; the first {len(beginning)} of the {len(text)} "
                f"characters are {len(ids)}",
                param=param,
            )

    def _encode_batch(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        # Unlike `encode` it lets go of Python's lock, without which another thread is no help to the event loop.
        encode = self._backend.encode_batch_fast
        return [list(found.ids) for found in encode(texts, add_special_tokens=add_special_tokens)]

    async def encode_async(self, text: str, **options: Any) -> list[int]:
        """`encode`, off the event loop when the text is long."""
        return (await self.encode_all([text], **options))[0]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `ids` as a whole; ids without a text are left out."""
        return str(self._backend.decode(ids, skip_special_tokens=skip_special_tokens))

    async def decode_async(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """`decode`, off the event loop when there are many ids."""
        if len(ids) <= _LONG_IDS:
            return self.decode(ids, skip_special_tokens=skip_special_tokens)
        decode_batch = self._backend.decode_batch  # lets go of Python's lock, as `encode_batch`
        return str((await _off_the_loop(partial(decode_batch, [ids], skip_special_tokens=skip_special_tokens)))[0])

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text of a conversation, by the model's template in transformers' jinja sandbox.

        Encode it with add_special_tokens=False: templates write their own. Raises InvalidParameterError (messages).
        """
        if not self.has_chat_template:
            raise InvalidParameterError("this model has no chat template; use completions", param="messages")
        if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence) or not messages:
            raise InvalidParameterError("messages must be a list of at least 1 message", param="messages")
        for message in messages:
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise InvalidParameterError("each message must be an object with a role", param="messages")
        reserved = sorted(_RESERVED & set(template_kwargs or ()))
        if reserved:
            raise InvalidParameterError(
                f"chat_template_kwargs may not set {', '.join(reserved)}", param="chat_template_kwargs"
            )
        # OpenAI's name of the system's role, which most templates do not know and many skip without a word.
        renames = "developer" not in self.chat_template
        try:
            text = self._pretrained.apply_chat_template(
                [
                    {**message, "role": "system"} if renames and message["role"] == "developer" else dict(message)
                    for message in messages
                ],
                tools=[dict(tool) for tool in tools] if tools else None,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **(template_kwargs or {}),
            )
        except Exception as error:  # a template is a program: it may fail in any way
            raise InvalidParameterError(f"the chat template refused the messages: {error}", param="messages") from error
        return str(text)

    async def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], *, max_tokens: int | None = None, **options: Any
    ) -> list[int]:
        """Token ids of a conversation; `options` are those of `render_chat`, `max_tokens` that of `encode_all`."""
        size = sum(len(str(message)) for message in messages)
        if size <= LONG_TEXT_CHARS:
            text = self.render_chat(messages, **options)
        else:
            text = await _off_the_loop(partial(self.render_chat, messages, **options))
        return await self.encode_async(text, add_special_tokens=False, param="messages", max_tokens=max_tokens)

    def token_text(self, token_id: int) -> str:
        """Text of one token inside a sentence, a leading space kept; U+FFFD where it is part of a character."""
        text = self._text_of.get(token_id)
        if text is None:
            if self.byte_level:
                text = self.bytes_of[token_id].decode("utf-8", "replace")
            else:
                before = self.decode(self._anchor, skip_special_tokens=False)
                text = self.decode([*self._anchor, token_id], skip_special_tokens=False)[len(before) :]
            self._text_of[token_id] = text
        return text

    def token_bytes(self, token_id: int, text: str) -> bytes:
        """UTF-8 of one token whose text is `text`; also where it is part of a character."""
        if self.byte_level:
            return self.bytes_of[token_id]
        piece = _BYTE_PIECE.fullmatch(self._backend.id_to_token(token_id) or "")
        return text.encode() if piece is None else bytes.fromhex(piece[1])


async def _off_the_loop(work: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(_long, work)


def _check_text(text: str, param: str) -> None:
    if not isinstance(text, str):
        raise InvalidParameterError(f"{param} must be a string, got {type(text).__name__}", param=param)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidParameterError(f"{param} must be valid Unicode, got a lone surrogate", param=param) from error


def new_utf8_decoder() -> codecs.IncrementalDecoder:
    """Bytes to text as they come; invalid bytes become U+FFFD exactly as in the tokenizers library."""
    return codecs.getincrementaldecoder("utf-8")("replace")
