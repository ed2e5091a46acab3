"""The waiting queue, in the order of `Request.order`; a preempted request keeps its arrival and returns to the head."""

from __future__ import annotations

import heapq
from typing import Final

from scheduler.request import Request, State

_FEW: Final = 64  # removed entries that are not worth a rebuild


class WaitingQueue:
    """A heap with lazy removal: push, pop and remove cost O(log n) on average, the planner looks only at the head."""

    def __init__(self) -> None:
        self._heap: list[tuple[bool, int, int, Request]] = []
        self._size = 0
        self.num_tokens = 0  # known tokens of all waiting requests

    def __len__(self) -> int:
        return self._size

    def push(self, request: Request) -> None:
        request.state = State.WAITING
        heapq.heappush(self._heap, (*request.order, request))
        self._size += 1
        self.num_tokens += len(request.tokens)

    def head(self) -> Request | None:
        while self._heap and self._heap[0][-1].state is not State.WAITING:
            heapq.heappop(self._heap)
        return self._heap[0][-1] if self._heap else None

    def pop(self) -> Request:
        """The head; call only when there is one."""
        request = self.head()
        assert request is not None, "pop of an empty queue"
        heapq.heappop(self._heap)
        self._forget(request)
        return request

    def remove(self, request: Request) -> None:
        """Take a waiting request out, wherever it stands."""
        assert request.state is State.WAITING
        request.state = State.DONE
        self._forget(request)
        if len(self._heap) > 2 * self._size + _FEW:  # most of it is gone: what lies behind the head is kept in memory
            self._heap = [entry for entry in self._heap if entry[-1].state is State.WAITING]
            heapq.heapify(self._heap)

    def _forget(self, request: Request) -> None:
        self._size -= 1
        self.num_tokens -= len(request.tokens)
