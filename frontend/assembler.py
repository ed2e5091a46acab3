"""Tokens of one sequence to chunks, and chunks to a finished choice. Pure: called by the client, touches no socket."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from frontend.detokenizer import Detokenizer
from frontend.inflight import Flight, LogprobRow
from frontend.request import Choice, Chunk, GenerateParams, TokenLogprob
from frontend.tokenizer import Tokenizer
from ipc.schema import FinishReason, ModelCard

# Looked up once, not for every token: 60 ns each time.
_RUNNING: Final = FinishReason.RUNNING
_STOP: Final = FinishReason.STOP
_FINISH: Final = {FinishReason.RUNNING: None, FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}


class Assembler:
    """Makes the chunks of one sequence."""

    def __init__(
        self, tokenizer: Tokenizer | None, card: ModelCard, prompt: Sequence[int], params: GenerateParams
    ) -> None:
        self._tokenizer = tokenizer
        self._stop_ids = frozenset(params.stop_token_ids) - frozenset(() if params.ignore_eos else card.eos_token_ids)
        self._top, self._prompt_top = params.logprobs, params.prompt_logprobs
        self._prompt = prompt
        self._hides_output = params.max_tokens == 0
        self._done = False
        self._text = None
        if tokenizer is not None:
            self._text = Detokenizer(
                tokenizer,
                prompt,
                stop=params.stop_strings,
                include_stop=params.include_stop_str_in_output,
                skip_special_tokens=params.skip_special_tokens,
                min_tokens=params.min_tokens,
            )

    def take(self, flight: Flight) -> Chunk | None:
        """What is new since the last call, or None. Raises the error a sequence ended with."""
        if self._done:
            return None
        if flight.error is not None:
            raise flight.error
        first, ids = flight.taken, tuple(flight.tokens[flight.taken :])
        finish = flight.finish
        if not ids and finish is _RUNNING:
            return None
        if self._hides_output:
            ids, finish = (), FinishReason.LENGTH
        text, used, found = "", len(ids), None
        if self._text is not None:
            by_token = finish is _STOP and bool(ids)
            text, used, found = self._text.push(ids, final=finish is not _RUNNING, ended_by_token=by_token)
        flight.taken = first + used
        reason: int | str | None = found
        if found is None and finish is _STOP and ids and ids[-1] in self._stop_ids:
            reason = ids[-1]
        finish_reason = "stop" if found is not None else _FINISH[finish]
        self._done = finish_reason is not None
        return Chunk(
            index=flight.index,
            text=text,
            token_ids=ids[:used],
            finish_reason=finish_reason,
            stop_reason=reason,
            logprobs=None if flight.logprobs is None else self._logprobs(flight, first, ids[:used]),
            cached_tokens=flight.cached_tokens,
            prompt_logprobs=self._prompt_logprobs(flight) if first == 0 else None,
        )

    def _logprobs(self, flight: Flight, first: int, ids: Sequence[int]) -> tuple[TokenLogprob, ...] | None:
        if flight.logprobs is None or self._top is None:
            return None
        return self._named(ids, flight.logprobs[first : first + len(ids)], self._top)

    def _prompt_logprobs(self, flight: Flight) -> tuple[TokenLogprob, ...] | None:
        if self._prompt_top is None:
            return None
        return self._named(self._prompt[1:], flight.prompt_logprobs, self._prompt_top)

    def _named(self, ids: Sequence[int], rows: Sequence[LogprobRow], width: int) -> tuple[TokenLogprob, ...]:
        return tuple(
            TokenLogprob(
                token_id=int(token),
                token=self._name(int(token)),
                logprob=logprob,
                rank=rank,
                top=tuple((t, self._name(t), p) for t, p in zip(top[:width], top_logprob, strict=False)),
            )
            for token, (logprob, rank, top, top_logprob) in zip(ids, rows, strict=True)
        )

    def _name(self, token: int) -> str:
        return "" if self._tokenizer is None else self._tokenizer.token_text(token)


@dataclass(slots=True)
class Collected:
    """The chunks of one choice, put together."""

    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    last: Chunk | None = None
    cached_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None

    def add(self, chunk: Chunk) -> None:
        self.text.append(chunk.text)
        self.token_ids.extend(chunk.token_ids)
        self.logprobs.extend(chunk.logprobs or ())
        self.cached_tokens = chunk.cached_tokens
        self.prompt_logprobs = self.prompt_logprobs or chunk.prompt_logprobs
        self.last = chunk

    def choice(self, index: int) -> Choice:
        assert self.last is not None and self.last.finish_reason is not None, f"choice {index} did not finish"
        return Choice(
            index=index,
            text="".join(self.text),
            token_ids=tuple(self.token_ids),
            finish_reason=self.last.finish_reason,
            stop_reason=self.last.stop_reason,
            logprobs=None if self.last.logprobs is None else tuple(self.logprobs),
            prompt_logprobs=self.prompt_logprobs,
        )
