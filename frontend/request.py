"""What a user asks for and gets back: parameters, checked with both numbers named, chunks and completions.

Owns the frontend's half of validation; the client calls it before anything is sent, so a request at fault costs the
scheduler nothing. Must never touch a socket or a tokenizer.
"""

from __future__ import annotations

import dataclasses
import reprlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Final

import msgspec
import numpy as np

from frontend.structured import StructuredOutputs
from ipc.errors import ContextLengthError, InvalidParameterError
from ipc.schema import ModelCard, SamplingParams, pack_tokens

MAX_CHOICES: Final = 128
MAX_LOGIT_BIAS: Final = 300
MAX_STOP_STRINGS: Final = 16
MAX_STOP_CHARS: Final = 4096
MAX_STOP_TOKEN_IDS: Final = 16
MAX_SALT_CHARS: Final = 1024
GREEDY_BELOW: Final = 1e-5  # dividing logits by less than this leaves float32
_INT32_MAX: Final = 2**31 - 1
_INT64_MAX: Final = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Range:
    """Allowed values of one number: [low, high], or (low, high] when `above` is set."""

    kind: type[Integral] | type[Real]
    low: float
    high: float
    above: bool = False
    optional: bool = False

    def __str__(self) -> str:
        noun = "an integer" if self.kind is Integral else "a number"
        if self.high in (_INT32_MAX, _INT64_MAX) and self.low >= -1:
            return f"{noun} of at least {self.low}"
        return f"{noun} in {'(' if self.above else '['}{self.low}, {self.high}]"

    def holds(self, value: Any) -> bool:
        if value is None:
            return self.optional
        if not _is_number(value, self.kind):
            return False
        return bool(self.low <= value <= self.high) and not (self.above and value == self.low)


RANGES: Final[Mapping[str, Range]] = {
    "max_tokens": Range(Integral, 0, _INT32_MAX, optional=True),
    "min_tokens": Range(Integral, 0, _INT32_MAX),
    "temperature": Range(Real, 0.0, 100.0),
    "top_k": Range(Integral, -1, _INT32_MAX),
    "top_p": Range(Real, 0.0, 1.0, above=True),
    "min_p": Range(Real, 0.0, 1.0),
    "repetition_penalty": Range(Real, 0.0, 100.0, above=True),
    "presence_penalty": Range(Real, -2.0, 2.0),
    "frequency_penalty": Range(Real, -2.0, 2.0),
    "seed": Range(Integral, -_INT64_MAX - 1, _INT64_MAX, optional=True),
    "logprobs": Range(Integral, 0, _INT32_MAX, optional=True),
    "prompt_logprobs": Range(Integral, 0, _INT32_MAX, optional=True),
    "n": Range(Integral, 1, MAX_CHOICES),
    "priority": Range(Integral, -_INT32_MAX, _INT32_MAX),
}
_FLAGS: Final = ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens")
_BIAS: Final = Range(Real, -100.0, 100.0)


@dataclass(frozen=True, kw_only=True)
class GenerateParams:
    """How to generate. Making one checks every field; raises InvalidParameterError naming the field at fault.

    The scale of each field is that of the OpenAI API and vLLM. What depends on the model is checked by `prepare`.
    """

    max_tokens: int | None = None  # None: up to the context limit; 0: the prompt is only read, and scored if asked
    min_tokens: int = 0  # no end of sequence, stop id or stop string before this many tokens
    temperature: float = 1.0  # 0 = greedy
    top_k: int = 0  # 0 and -1 = off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None  # choice i uses seed + i; None draws one
    logprobs: int | None = None  # None = off, 0 = of the sampled token, N = of the N most probable too
    prompt_logprobs: int | None = None  # the same, of every prompt token but the first
    logit_bias: Mapping[int, float] | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    n: int = 1
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    priority: int = 0  # lower runs first
    cache_salt: str = ""  # prompts of different salts share no cached prefix
    structured_outputs: StructuredOutputs | None = None  # what each choice must match

    def __post_init__(self) -> None:
        for name, allowed in RANGES.items():
            value = getattr(self, name)
            if not allowed.holds(value):
                raise _invalid(name, str(allowed), value)
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise _invalid(name, "true or false", getattr(self, name))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise _invalid("min_tokens", f"at most max_tokens, which is {self.max_tokens}", self.min_tokens)
        _check_stop(self.stop)
        _check_stop_token_ids(self.stop_token_ids)
        _check_logit_bias(self.logit_bias)
        _check_text("cache_salt", self.cache_salt, MAX_SALT_CHARS)
        if not isinstance(self.structured_outputs, StructuredOutputs | None):
            raise _invalid("structured_outputs", "a StructuredOutputs", self.structured_outputs)
        if self.structured_outputs is not None and self.min_tokens > 0:
            raise _invalid("min_tokens", "0 with structured output, which decides where the text ends", self.min_tokens)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @classmethod
    def of(cls, params: GenerateParams | None, changes: Mapping[str, Any]) -> GenerateParams:
        """`params` with some fields replaced; an unknown field is an InvalidParameterError, not a TypeError."""
        for name in changes:
            if name not in cls.__dataclass_fields__:
                raise InvalidParameterError(f"unknown parameter {name!r}", param=name)
        return cls(**changes) if params is None else dataclasses.replace(params, **changes) if changes else params


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural-log probability of one token before temperature and filters, and of the most probable ones there."""

    token_id: int
    token: str
    logprob: float
    rank: int  # 1 = the most probable
    top: tuple[tuple[int, str, float], ...]  # (token id, text, logprob), most probable first


class Chunk(msgspec.Struct, frozen=True, gc=False):
    """One increment of one choice. A reader that lags gets several tokens in one; exactly one chunk of a choice, its
    last, has a finish_reason. Text may lag behind token_ids while a character or a stop string is undecided.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None  # "stop" or "length"
    stop_reason: int | str | None  # the stop id or stop string that ended it; None for end of sequence
    logprobs: tuple[TokenLogprob, ...] | None  # one for each of token_ids
    cached_tokens: int  # prompt tokens that were found in the prefix cache
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None  # of prompt[1:], in the first chunk of a choice that asked


class Choice(msgspec.Struct, frozen=True, gc=False):
    """One finished sequence."""

    index: int
    text: str
    token_ids: tuple[int, ...]  # an end-of-sequence token that ended it included
    finish_reason: str
    stop_reason: int | str | None
    logprobs: tuple[TokenLogprob, ...] | None
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None  # of prompt[1:]


@dataclass(frozen=True, slots=True)
class Completion:
    """All choices of one request, in order of index."""

    choices: tuple[Choice, ...]
    prompt_token_ids: tuple[int, ...]
    prompt_tokens: int
    completion_tokens: int  # of all choices
    cached_tokens: int  # of the first choice

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.choices[0].token_ids


def check_prompt(prompt: Sequence[int], card: ModelCard) -> bytes:
    """The token ids packed as int32.

    Raises InvalidParameterError if empty, not integers, or out of the vocabulary, ContextLengthError if there are so
    many that looking at each would take time.
    """
    if isinstance(prompt, (list, tuple, np.ndarray)) and len(prompt) > 2 * card.max_model_len:
        raise ContextLengthError(
            f"maximum context length is {card.max_model_len} tokens; the prompt has {len(prompt)}", param="prompt"
        )
    if isinstance(prompt, np.ndarray):
        if prompt.ndim != 1 or prompt.dtype.kind not in "iu":
            raise _invalid("prompt", "a vector of integer token ids", f"{prompt.dtype}{list(prompt.shape)}")
    elif (
        not isinstance(prompt, Sequence)
        or isinstance(prompt, (str, bytes))
        or any(kind is bool or not issubclass(kind, Integral) for kind in set(map(type, prompt)))
    ):
        raise _invalid("prompt", "a string or a list of integer token ids", prompt)
    if len(prompt) == 0:
        raise InvalidParameterError("prompt is empty: it needs at least 1 token, got 0", param="prompt")
    low, high = min(prompt), max(prompt)
    if low < 0 or high >= card.vocab_size:
        bad = low if low < 0 else high
        message = f"token id {_shown(bad)} is out of range: the model has ids 0 to {card.vocab_size - 1}"
        raise InvalidParameterError(message, param="prompt")
    return pack_tokens(prompt)


def prepare(params: GenerateParams, card: ModelCard, prompt_tokens: int) -> list[SamplingParams]:
    """What the scheduler is told of each of the n choices.

    Raises ContextLengthError if prompt and completion exceed the context, InvalidParameterError for what this model
    does not have.
    """
    room = card.max_model_len - prompt_tokens
    # A step samples after every prompt, so the engine knows no request for 0; the Assembler hides that token.
    wanted = 1 if params.max_tokens is None else max(1, int(params.max_tokens))
    if wanted > room:
        raise ContextLengthError(
            f"maximum context length is {card.max_model_len} tokens; you requested {prompt_tokens + wanted} "
            f"({prompt_tokens} prompt + {wanted} completion)",
            param="prompt" if room < 1 else "max_tokens",
        )
    max_tokens = room if params.max_tokens is None else wanted
    if params.min_tokens > max_tokens:
        raise _invalid("min_tokens", f"at most {max_tokens}, the room the prompt leaves", params.min_tokens)
    for name in ("logprobs", "prompt_logprobs"):
        asked = getattr(params, name)
        if asked is not None and asked > card.max_logprobs:
            raise _invalid(name, f"at most {card.max_logprobs} for this engine", asked)
    bias = {int(token): float(value) for token, value in (params.logit_bias or {}).items()}
    stop_ids = tuple(map(int, params.stop_token_ids))
    for name, ids in (("logit_bias", tuple(bias)), ("stop_token_ids", stop_ids)):
        for token in ids:
            if not 0 <= token < card.vocab_size:
                raise _invalid(name, f"token ids in [0, {card.vocab_size - 1}]", token)
    seed = secrets.randbits(63) if params.seed is None else int(params.seed)
    return [
        SamplingParams(
            max_tokens=max_tokens,
            min_tokens=int(params.min_tokens),
            temperature=float(params.temperature) if params.temperature >= GREEDY_BELOW else 0.0,
            top_k=min(max(int(params.top_k), 0), card.vocab_size),
            top_p=float(params.top_p),
            min_p=float(params.min_p),
            repetition_penalty=float(params.repetition_penalty),
            presence_penalty=float(params.presence_penalty),
            frequency_penalty=float(params.frequency_penalty),
            seed=_as_int64(seed + index),
            logprobs=-1 if params.logprobs is None else int(params.logprobs),
            logit_bias=bias,
            stop_token_ids=stop_ids,
            ignore_eos=params.ignore_eos,
            prompt_logprobs=-1 if params.prompt_logprobs is None else int(params.prompt_logprobs),
        )
        for index in range(params.n)
    ]


def _is_number(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, (bool, np.bool_))


def _check_stop(stop: Any) -> None:
    strings = (stop,) if isinstance(stop, str) else stop
    if not isinstance(strings, Sequence) or not all(isinstance(text, str) for text in strings):
        raise _invalid("stop", "a string or a list of strings", stop)
    if len(strings) > MAX_STOP_STRINGS:
        raise _invalid("stop", f"at most {MAX_STOP_STRINGS} strings", len(strings))
    for text in strings:
        if not text:
            raise InvalidParameterError("stop strings need at least 1 character, got 0", param="stop")
        _check_text("stop", text, MAX_STOP_CHARS)


def _check_stop_token_ids(ids: Any) -> None:
    whole = Range(Integral, 0, _INT32_MAX)
    if not isinstance(ids, Sequence) or isinstance(ids, str) or not all(whole.holds(token) for token in ids):
        raise _invalid("stop_token_ids", "a list of token ids", ids)
    if len(ids) > MAX_STOP_TOKEN_IDS:
        raise _invalid("stop_token_ids", f"at most {MAX_STOP_TOKEN_IDS} ids", len(ids))


def _check_logit_bias(bias: Any) -> None:
    if bias is None:
        return
    if not isinstance(bias, Mapping):
        raise _invalid("logit_bias", "a map of token ids to numbers", bias)
    if len(bias) > MAX_LOGIT_BIAS:
        raise _invalid("logit_bias", f"at most {MAX_LOGIT_BIAS} entries", len(bias))
    whole = Range(Integral, 0, _INT32_MAX)
    for token, value in bias.items():
        if not whole.holds(token):
            raise _invalid("logit_bias", "a map whose keys are token ids", token)
        if not _BIAS.holds(value):
            raise _invalid("logit_bias", f"a map whose values are {_BIAS}", value)


def _check_text(name: str, text: Any, max_chars: int) -> None:
    if not isinstance(text, str):
        raise _invalid(name, "a string", text)
    if len(text) > max_chars:
        raise _invalid(name, f"at most {max_chars} characters", len(text))
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidParameterError(f"{name} must be valid Unicode, got a lone surrogate", param=name) from error


def _invalid(name: str, allowed: str, got: Any) -> InvalidParameterError:
    return InvalidParameterError(f"{name} must be {allowed}, got {_shown(got)}", param=name)


def _shown(value: Any) -> str:
    """A short repr. Python refuses to print integers of more than 4300 digits, which JSON can still hold."""
    try:
        return reprlib.repr(value)
    except ValueError:
        return f"{type(value).__name__} with an integer of thousands of digits"


def _as_int64(value: int) -> int:
    """Two's complement wrap-around, so that seed + index stays an int64."""
    return (value + _INT64_MAX + 1) % (1 << 64) - _INT64_MAX - 1
