"""What an Admit must satisfy before it may enter the queue, whoever sent it. Pure checks; no state changes here.

The frontend's checks are for people; these protect the other requests, so they cover every value that reaches a frame.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from ipc.errors import ContextLengthError, GrammarError, InvalidParameterError, RequestError
from ipc.frames import MAX_BIAS
from ipc.schema import MAX_GRAMMAR_CHARS, ModelCard, SamplingParams

_INT32: Final = (-(2**31), 2**31 - 1)
_INT64: Final = (-(2**63), 2**63 - 1)
_FLOAT32_MAX: Final = float(np.finfo(np.float32).max)

# field -> inclusive range
_INT_RANGES: Final = {
    "max_tokens": (1, _INT32[1]),
    "min_tokens": (0, _INT32[1]),
    "top_k": (0, _INT32[1]),
    "seed": _INT64,
}
_FLOAT_RANGES: Final = {
    "temperature": (0.0, 1e6),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (1e-6, 1e6),
    "presence_penalty": (-1e6, 1e6),
    "frequency_penalty": (-1e6, 1e6),
}


def check_params(params: SamplingParams, card: ModelCard, prompt_len: int) -> None:
    """Raise InvalidParameterError, naming the field, for a value that no frame or kernel is made for."""
    for name, (low, high) in {**_INT_RANGES, **_FLOAT_RANGES}.items():
        value = getattr(params, name)
        if not low <= value <= high:  # NaN fails both comparisons
            raise InvalidParameterError(f"{name} is {value}, allowed is {low} to {high}", param=name)
    if not -1 <= params.logprobs <= card.max_logprobs:
        raise InvalidParameterError(
            f"logprobs is {params.logprobs}, the limit is {card.max_logprobs}", param="logprobs"
        )
    if not -1 <= params.prompt_logprobs <= card.max_logprobs:
        raise InvalidParameterError(
            f"prompt_logprobs is {params.prompt_logprobs}, the limit is {card.max_logprobs}", param="prompt_logprobs"
        )
    for name, ids in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
        if len(ids) > MAX_BIAS:
            raise InvalidParameterError(f"{name} has {len(ids)} tokens, the limit is {MAX_BIAS}", param=name)
        for token in ids:
            if not 0 <= token < card.vocab_size:
                raise InvalidParameterError(
                    f"{name} has token id {token}, the vocabulary is 0..{card.vocab_size - 1}", param=name
                )
    if not all(abs(value) <= _FLOAT32_MAX for value in params.logit_bias.values()):
        raise InvalidParameterError("logit_bias has a value that is no finite float32", param="logit_bias")
    bias = len(params.logit_bias) + len(forbidden_ids(params, card))
    if bias > MAX_BIAS:
        raise InvalidParameterError(f"{bias} biased and stop tokens, the limit is {MAX_BIAS}", param="logit_bias")
    if prompt_len + params.min_tokens > _INT32[1]:
        raise InvalidParameterError(f"min_tokens is {params.min_tokens}, beyond any context", param="min_tokens")


def check_tokens(tokens: npt.NDArray[np.int32], card: ModelCard) -> None:
    """Raise InvalidParameterError for an id outside the vocabulary; `tokens` [n >= 1]."""
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= card.vocab_size:
        raise InvalidParameterError(
            f"token id {low if low < 0 else high} is outside the vocabulary 0..{card.vocab_size - 1}", param="prompt"
        )


def check_grammar(grammar: str, params: SamplingParams) -> None:
    """Raise a typed error for a grammar that is too long, or that min_tokens could leave without any token."""
    if len(grammar) > MAX_GRAMMAR_CHARS:
        raise GrammarError(f"the grammar has {len(grammar)} characters, the limit is {MAX_GRAMMAR_CHARS}")
    if grammar and params.min_tokens > 0:
        raise InvalidParameterError(
            f"min_tokens is {params.min_tokens}; with a grammar, which decides where the output ends, it must be 0",
            param="min_tokens",
        )


def check_lengths(params: SamplingParams, prompt_len: int, output_len: int, max_seq_len: int) -> None:
    """Raise a typed error, with both numbers, for a request that can never run to its end."""
    if prompt_len == 0:
        raise InvalidParameterError("the prompt is empty: 0 tokens, at least 1 is needed", param="prompt")
    if prompt_len + params.max_tokens > max_seq_len:
        raise ContextLengthError(
            f"maximum context length is {max_seq_len} tokens; you requested {prompt_len + params.max_tokens} "
            f"({prompt_len} prompt + {params.max_tokens} completion)",
            param="max_tokens",
        )
    if output_len >= params.max_tokens:
        raise RequestError(f"{output_len} tokens were generated already, max_tokens is {params.max_tokens}")


def forbidden_ids(params: SamplingParams, card: ModelCard) -> list[int]:
    """Token ids that may not be sampled before min_tokens: everything that would end the request."""
    return sorted({*card.eos_token_ids, *params.stop_token_ids}) if params.min_tokens > 0 else []
