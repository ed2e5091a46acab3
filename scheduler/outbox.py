"""What a frontend is still to be sent: one columnar frame a step, coalesced while it lags.

Nothing here blocks: while the frontend's socket is full its rows stay here, up to a limit the loop enforces.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ipc.frames import INVALID_TOKEN
from ipc.results import Result
from ipc.schema import MAX_MESSAGE_BYTES, FinishReason, Logprobs, Tokens
from scheduler.retire import Delivery

MAX_BACKLOG_ROWS: Final = 200_000  # a frontend further behind is a slow consumer
MAX_BACKLOG_BYTES: Final = MAX_MESSAGE_BYTES // 2  # of log-probabilities: all must fit one message


@dataclass(slots=True)
class Outbox:
    """Columns not sent yet, each a list of arrays in order."""

    rows: int = 0
    num_scores: int = 0
    logprob_bytes: int = 0
    started: list[tuple[int, int]] = field(default_factory=list)  # (request id, cached tokens)
    _columns: dict[str, list[npt.NDArray[Any]]] = field(
        default_factory=lambda: {name: [] for name in ("request_id", "token", "finish")}
    )
    _logprobs: dict[str, list[npt.NDArray[Any]]] = field(default_factory=lambda: _logprob_columns())
    _scored_id: list[npt.NDArray[np.int64]] = field(default_factory=list)
    _scores: dict[str, list[npt.NDArray[Any]]] = field(default_factory=lambda: _logprob_columns())

    def __bool__(self) -> bool:
        return bool(self.rows or self.num_scores or self.started)

    @property
    def backlog(self) -> int:
        """Rows and scores not sent yet."""
        return self.rows + self.num_scores

    @property
    def is_too_long(self) -> bool:
        """Whether its frontend is a slow consumer."""
        return self.backlog > MAX_BACKLOG_ROWS or self.logprob_bytes > MAX_BACKLOG_BYTES

    @property
    def ended(self) -> list[int]:
        """Requests whose terminal row was not sent yet."""
        columns = zip(self._columns["request_id"], self._columns["finish"], strict=True)
        return [int(i) for ids, finish in columns for i in ids[finish != FinishReason.RUNNING]]

    def add(self, delivery: Delivery, result: Result, mine: npt.NDArray[np.intp]) -> None:
        """Append the rows `mine` [n] of a delivery, in order."""
        if result.logprob is not None:
            self._add_logprobs(delivery, result, mine)
        self._columns["request_id"].append(delivery.request_id[mine])
        self._columns["token"].append(delivery.token[mine])
        self._columns["finish"].append(delivery.finish[mine])
        self.rows += len(mine)

    def add_end(self, request_ids: list[int], reason: FinishReason) -> None:
        """Append terminal rows without a token."""
        n = len(request_ids)
        self._columns["request_id"].append(np.array(request_ids, np.int64))
        self._columns["token"].append(np.full(n, INVALID_TOKEN, np.int32))
        self._columns["finish"].append(np.full(n, reason, np.uint8))
        self.rows += n

    def _add_logprobs(self, delivery: Delivery, result: Result, mine: npt.NDArray[np.intp]) -> None:
        asked = np.flatnonzero(delivery.num_logprobs[mine] >= 0)
        source = delivery.result_row[mine][asked]
        self.logprob_bytes += _append(self._logprobs, asked + self.rows, result, source)

    def add_scores(self, delivery: Delivery, result: Result, mine: npt.NDArray[np.intp]) -> None:
        """Append the scores `mine` [n] of a delivery, in order."""
        row, source = np.arange(len(mine)) + self.num_scores, delivery.score_result_row[mine]
        self.logprob_bytes += _append(self._scores, row, result, source)
        self._scored_id.append(delivery.score_request_id[mine])
        self.num_scores += len(mine)

    def message(self, load: tuple[int, int, int]) -> Tokens:
        """One frame of everything; `clear` follows once it is sent. `load`: running, waiting, queued tokens."""
        started = np.array(self.started, np.int64).reshape(-1, 2)
        return Tokens(
            **{name: b"".join(c.tobytes() for c in column) for name, column in self._columns.items()},
            started_id=started[:, 0].tobytes(),
            started_cached=started[:, 1].astype(np.int32).tobytes(),
            logprobs=_message(self._logprobs),
            scored_id=b"".join(c.tobytes() for c in self._scored_id),
            scores=_message(self._scores),
            running=load[0],
            waiting=load[1],
            queued_tokens=load[2],
        )

    def clear(self) -> None:
        self.rows = self.num_scores = self.logprob_bytes = 0
        for column in (*self._columns.values(), *self._logprobs.values(), *self._scores.values()):
            column.clear()
        self.started.clear()
        self._scored_id.clear()


def _logprob_columns() -> dict[str, list[npt.NDArray[Any]]]:
    return {name: [] for name in ("row", "logprob", "rank", "top_token", "top_logprob")}


def _append(
    columns: dict[str, list[npt.NDArray[Any]]],
    row: npt.NDArray[np.intp],
    result: Result,
    source: npt.NDArray[np.int64],
) -> int:
    """Copy the log-probabilities in rows `source` of a result, as rows `row` of the message; how many bytes."""
    columns["row"].append(row.astype(np.int32))
    for name in ("logprob", "rank", "top_token", "top_logprob"):
        columns[name].append(getattr(result, name)[source])
    return sum(column[-1].nbytes for column in columns.values())


def _message(columns: dict[str, list[npt.NDArray[Any]]]) -> Logprobs | None:
    if not columns["row"]:
        return None
    joined = {name: np.concatenate(column) for name, column in columns.items()}
    width = joined["top_token"].shape[1]
    return Logprobs(width=width, **{name: column.tobytes() for name, column in joined.items()})
