"""Grammars: what an output may continue with. Owns llguidance and the two threads that run it beside the planning loop.

The loop submits a request whenever it needs the mask of its next token, and takes masks back when the bell rings; a
row waits for its mask while other rows run ahead, so neither a slow grammar nor a large vocabulary delays a plan.
Compilation and per-token work have a thread each: who compiles holds back nobody who runs. A request has at most one
job at a time, so its matcher is never used by two threads.

llguidance is an optional dependency and needs no torch. It keeps Python's lock while it learns a vocabulary, up to a
second, so that happens at start and not with the first grammar. Its own limits (lexer fuel, items, states) bound the
time and the memory of any grammar.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ipc.doorbell import Doorbell
from ipc.errors import GrammarError
from ipc.schema import ModelCard
from scheduler.request import Request, State

Mask = npt.NDArray[np.int32]  # [mask words], one bit for each token id
Job = tuple[Request, list[int]]  # and the output tokens its matcher has not seen

_CACHED_GRAMMARS: Final = 256  # compiled ones kept: services repeat a few schemas
_MAX_MESSAGE_CHARS: Final = 500
_log = logging.getLogger(__name__)


class GrammarWorker:
    """Brings masks. `submit` and `take` are called by the loop; `bell` rings when there is something to take."""

    def __init__(self, card: ModelCard, bell: Doorbell) -> None:
        self._card, self._bell = card, bell
        self._compiling: queue.SimpleQueue[list[Job]] = queue.SimpleQueue()
        self._advancing: queue.SimpleQueue[list[Job]] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[tuple[Request, Mask | GrammarError]] = queue.SimpleQueue()
        self._asked = False
        threading.Thread(target=self._compile_all, name="grammar compile", daemon=True).start()
        threading.Thread(target=self._advance_all, name="grammar masks", daemon=True).start()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Ask for the masks after these tokens. Those that need no compilation come together, as they ran together."""
        self._asked = True
        new = [job for job in jobs if job[0].matcher is None]
        known = [job for job in jobs if job[0].matcher is not None]
        if new:
            self._compiling.put(new)
        if known:
            self._advancing.put(known)

    def take(self) -> Iterator[tuple[Request, Mask | GrammarError]]:
        """What came since the last call: a mask, or why there is none."""
        if self._asked:
            self._bell.drain()
        while not self._done.empty():
            yield self._done.get()

    def _compile_all(self) -> None:
        compiler: _Compiler | GrammarError
        try:
            compiler = _Compiler(self._card)
        except BaseException as error:
            compiler = _reported(error)
        while True:
            for request, tokens in self._compiling.get():
                if request.state is State.DONE:  # it was aborted; nobody behind it needs to wait
                    continue
                outcome: Mask | GrammarError
                try:
                    if isinstance(compiler, GrammarError):
                        outcome = compiler
                    else:
                        request.matcher = compiler.matcher(request.grammar)
                        outcome = _advance(request.matcher, tokens, self._card)
                except BaseException as error:
                    outcome = _reported(error)
                self._done.put((request, outcome))
                self._bell.ring()

    def _advance_all(self) -> None:
        while True:
            for request, tokens in self._advancing.get():
                try:
                    outcome: Mask | GrammarError = _advance(request.matcher, tokens, self._card)
                except BaseException as error:
                    outcome = _reported(error)
                self._done.put((request, outcome))
            self._bell.ring()


class _Compiler:
    """Grammar text to matchers, for one tokenizer. Raises GrammarError if this model or machine has no grammars."""

    def __init__(self, card: ModelCard) -> None:
        try:
            import llguidance
        except ImportError as error:
            raise GrammarError("structured output needs llguidance: pip install 'tandem-engine[structured]'") from error
        self._library: Any = llguidance
        path = Path(card.path) / "tokenizer.json"
        if not path.exists() or not card.eos_token_ids:
            lacks = "end-of-sequence token" if path.exists() else "tokenizer.json"
            raise GrammarError(f"structured output is not possible: the model has no {lacks}")
        text, eos = path.read_text(), list(card.eos_token_ids)
        try:
            self._tokenizer = llguidance.LLTokenizer(text, n_vocab=card.vocab_size, eos_token=eos)
        except ValueError:  # its tokenizer has more ids than the model
            try:
                self._tokenizer = llguidance.LLTokenizer(text, eos_token=eos)
            except ValueError as error:
                reason = str(error)[:_MAX_MESSAGE_CHARS]
                raise GrammarError(f"structured output is not possible with this tokenizer.json: {reason}") from error
        self._limits = llguidance.LLParserLimits(verbose_errors=False)
        self._compiled: OrderedDict[str, Any] = OrderedDict()

    def matcher(self, grammar: str) -> Any:
        """A fresh LLMatcher at the start of `grammar`."""
        compiled = self._compiled.pop(grammar, None)
        if compiled is None:
            compiled = self._library.LLMatcher(self._tokenizer, grammar, log_level=0, limits=self._limits)
            if compiled.is_error():
                raise _error(compiled)
        self._compiled[grammar] = compiled
        while len(self._compiled) > _CACHED_GRAMMARS:
            self._compiled.popitem(last=False)
        return compiled.deep_copy()


def _advance(matcher: Any, tokens: list[int], card: ModelCard) -> Mask:
    """The mask after `tokens`. Raises GrammarError at a dead end or a limit."""
    if tokens and not matcher.consume_tokens(tokens):
        raise _error(matcher)
    mask: Mask = np.frombuffer(matcher.compute_bitmask(), np.int32)
    if matcher.is_error():
        raise _error(matcher)
    return mask[: -(-card.vocab_size // 32)]


def _error(matcher: Any) -> GrammarError:
    message = " ".join(str(matcher.get_error()).split("<state>")[0].split())
    return GrammarError(f"the grammar cannot be used: {message[:_MAX_MESSAGE_CHARS]}")


def _reported(error: BaseException) -> GrammarError:
    """A fault of the library, which may even be a Rust panic, must not leave the request waiting for ever."""
    if isinstance(error, GrammarError):
        return error
    _log.error("a grammar failed", exc_info=error)
    return GrammarError(f"the grammar cannot be used: {type(error).__name__}")
