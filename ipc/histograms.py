"""Distributions of latencies and sizes: counted by the scheduler, carried by Stats, shown by any frontend.

One place counts, so `/metrics` is the same through every frontend. Names are vLLM's. Must never grow with time.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from enum import IntEnum
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from ipc.errors import ProtocolError

_SHORT_S: Final = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2.5)
_LONG_S: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600)
_TOKENS: Final = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)


class Family(NamedTuple):
    """One distribution: `edges` are the inclusive upper bounds of its buckets, the last bucket has none."""

    name: str
    text: str
    edges: tuple[float, ...]


class Distribution(IntEnum):
    """Index into FAMILIES."""

    FIRST_TOKEN_S = 0
    INTER_TOKEN_S = 1
    PER_OUTPUT_TOKEN_S = 2
    REQUEST_S = 3
    QUEUE_S = 4
    PREFILL_S = 5
    DECODE_S = 6
    INFERENCE_S = 7
    PROMPT_TOKENS = 8
    GENERATION_TOKENS = 9
    MAX_TOKENS = 10
    STEP_TOKENS = 11


FAMILIES: Final = (
    Family("time_to_first_token_seconds", "From admission to the first token.", _LONG_S),
    Family("inter_token_latency_seconds", "Between two tokens of a sequence.", _SHORT_S),
    Family("request_time_per_output_token_seconds", "Mean time between the tokens of a sequence.", _SHORT_S),
    Family("e2e_request_latency_seconds", "From admission to the last token.", _LONG_S),
    Family("request_queue_time_seconds", "From admission to the first step.", _LONG_S),
    Family("request_prefill_time_seconds", "From the first step to the first token.", _LONG_S),
    Family("request_decode_time_seconds", "From the first token to the last.", _LONG_S),
    Family("request_inference_time_seconds", "From the first step to the last token.", _LONG_S),
    Family("request_prompt_tokens", "Prompt tokens of a sequence.", _TOKENS),
    Family("request_generation_tokens", "Tokens generated for a sequence.", _TOKENS),
    Family("request_params_max_tokens", "max_tokens of a sequence.", _TOKENS),
    Family("iteration_tokens_total", "Tokens of a step, prompt and decode.", _TOKENS),
)
_BUCKETS: Final = len(_TOKENS) + 1
_EDGES: Final = np.array([family.edges for family in FAMILIES])  # [families, _BUCKETS - 1]


class Histograms:
    """Sums and bucket counts of all families: float64 [families, 1 + buckets], exact up to 2**53."""

    def __init__(self) -> None:
        self._table = np.zeros((len(FAMILIES), 1 + _BUCKETS))

    def observe(self, which: Distribution, value: float, times: int = 1) -> None:
        row = self._table[which]
        row[0] += value * times
        row[1 + bisect_left(FAMILIES[which].edges, value)] += times

    def observe_many(self, which: Distribution, values: npt.NDArray[np.floating[Any]]) -> None:
        """`values` [n]."""
        row = self._table[which]
        row[0] += values.sum()
        row[1:] += np.bincount(_EDGES[which].searchsorted(values), minlength=_BUCKETS)

    def pack(self) -> bytes:
        return self._table.tobytes()


def unpack_histograms(payload: bytes) -> Iterator[tuple[Family, float, list[float]]]:
    """(family, sum, count of each bucket) of a packed table; nothing for an empty one. Raises ProtocolError."""
    if not payload:
        return
    if len(payload) != 8 * len(FAMILIES) * (1 + _BUCKETS):
        raise ProtocolError(f"a table of {len(FAMILIES)} histograms in {len(payload)} bytes")
    for family, row in zip(FAMILIES, np.frombuffer(payload).reshape(len(FAMILIES), -1).tolist(), strict=True):
        yield family, row[0], row[1:]
