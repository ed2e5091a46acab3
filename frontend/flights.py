"""The table of a session's open sequences: what the scheduler says goes from its columns into the sequence it is about.

Owned by a Session. Must never touch a socket, and never decode text.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np

from frontend.inflight import Flight, Home, LogprobRow, Turns, column, finish_reason, logprob_rows
from ipc.errors import ProtocolError, TandemError
from ipc.schema import FinishReason, Tokens

_RUNNING: Final = int(FinishReason.RUNNING)
_LENGTH: Final = int(FinishReason.LENGTH)


class Flights:
    """Open sequences by request id. Ids are never used twice."""

    def __init__(self) -> None:
        self._open: dict[int, Flight] = {}
        self._next_id = 0
        self._turns = Turns()

    def __len__(self) -> int:
        return len(self._open)

    def __iter__(self) -> Iterator[Flight]:
        return iter(self._open.values())

    def __contains__(self, flight: Flight) -> bool:
        return self._open.get(flight.request_id) is flight

    def add(self, flight: Flight, home: Home) -> None:
        """Give it an id here; an id of an earlier home means nothing any more."""
        self._next_id += 1
        flight.request_id, flight.home = self._next_id, home
        self._open[flight.request_id] = flight

    def pop(self, request_id: int) -> Flight | None:
        """Forget a sequence, if it is still open."""
        return self._open.pop(request_id, None)

    def fail(self, flight: Flight, error: TandemError) -> None:
        """End a sequence that is no longer in the table."""
        flight.error = error
        flight.mailbox.post(flight, self._turns)

    def fail_all(self, error: TandemError) -> None:
        """End every open sequence with `error`."""
        flights, self._open = self._open, {}
        for flight in flights.values():
            self.fail(flight, copy_of(error))

    def take(self, frame: Tokens) -> int:
        """Give each sequence what a frame brings it, and return the number of rows.

        Raises ProtocolError, after which tokens may be lost.
        """
        for request_id, cached in zip(
            column(frame.started_id, np.int64), column(frame.started_cached, np.int32), strict=True
        ):
            started = self._open.get(request_id)
            if started is not None:
                started.start(cached)
        if frame.scores is not None:
            self._take_scores(column(frame.scored_id, np.int64), logprob_rows(frame.scores))
        logprobs = {} if frame.logprobs is None else logprob_rows(frame.logprobs)
        ids, tokens = column(frame.request_id, np.int64), column(frame.token, np.int32)
        finishes = column(frame.finish, np.uint8)
        if not len(ids) == len(tokens) == len(finishes):
            raise ProtocolError(f"a Tokens frame of {len(ids)} ids, {len(tokens)} tokens, {len(finishes)} states")
        for row, request_id in enumerate(ids):
            flight = self._open.get(request_id)
            if flight is None:
                continue  # aborted here while the frame was on its way
            finish = finishes[row]
            if finish <= _LENGTH:
                flight.tokens.append(tokens[row])
                if flight.logprobs is not None:
                    if row not in logprobs:
                        raise ProtocolError(f"no logprobs in row {row} of a request that asked for them")
                    flight.logprobs.append(logprobs[row])
            if finish != _RUNNING:
                flight.end(finish_reason(finish))
                del self._open[request_id]
            elif not flight.mailbox.each_token:
                continue
            flight.mailbox.post(flight, self._turns)
        return len(ids)

    def _take_scores(self, ids: list[int], rows: dict[int, LogprobRow]) -> None:
        if list(rows) != list(range(len(ids))):
            raise ProtocolError(f"{len(rows)} scores of {len(ids)} prompt tokens")
        for row, request_id in enumerate(ids):
            flight = self._open.get(request_id)
            if flight is not None:
                flight.prompt_logprobs.append(rows[row])


def copy_of(error: TandemError) -> TandemError:
    """One exception for each that raises it: a traceback belongs to one raise."""
    return type(error)(error.message, param=error.param)
