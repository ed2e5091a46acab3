"""The step trace: a flight recorder in shared memory, and the Chrome/Perfetto JSON made of it.

The launcher makes the memory only if tracing is asked for; otherwise no process has a Trace and none pays anything.
Each track has one writer. Whoever maps the memory may read it: the launcher at the end, a frontend on demand. A reader
may miss what is being written at that moment; a writer never waits, and overwrites its oldest spans.

    words 0, 1, 2        magic, time until which spans are recorded, replicas
    word 8 + t           spans ever written to track t
    then                 tracks, each CAPACITY spans: act, start, end, step, rows

Each replica has the tracks before FRONTEND, one replica after the other; then come those of the frontends.
"""

from __future__ import annotations

import mmap
import os
from enum import IntEnum
from typing import Any, Final

import msgspec
import numpy as np

from ipc.clock import now_ns
from ipc.errors import ProtocolError
from ipc.frames import Int64

CAPACITY: Final = 1 << 18  # spans of a track; pages that were never written take no memory
MAX_FRONTENDS: Final = 64
FOREVER_NS: Final = 2**63 - 1
_MAGIC: Final = 0x54414E4454524302
_PAGE_WORDS: Final = 512
_SPAN_WORDS: Final = 5


class Track(IntEnum):
    """What has a lane of its own in the picture, those before FRONTEND in each replica. FRONTEND + i: i-th frontend."""

    SCHEDULER = 0
    LAUNCH = 1
    RETIRE = 2
    H2D = 3
    COMPUTE = 4
    D2H = 5
    FRONTEND = 6


class Act(IntEnum):
    """What a span shows."""

    PLAN = 0
    RETIRE = 1
    DELIVER = 2
    MESSAGES = 3
    LAUNCH = 4
    PUBLISH = 5
    COPY_IN = 6
    COMPUTE = 7
    COPY_OUT = 8
    FAN_OUT = 9


# (process, lane) of each track before the frontends.
_PLACES: Final = {
    Track.SCHEDULER: ("scheduler", "loop"),
    Track.LAUNCH: ("executor", "launch thread"),
    Track.RETIRE: ("executor", "retire thread"),
    Track.H2D: ("device", "h2d stream"),
    Track.COMPUTE: ("device", "compute stream"),
    Track.D2H: ("device", "d2h stream"),
}


def _tracks(replicas: int) -> int:
    return replicas * Track.FRONTEND + MAX_FRONTENDS


def _header_words(replicas: int) -> int:
    return -(-(8 + _tracks(replicas)) // _PAGE_WORDS) * _PAGE_WORDS


def create_trace(*, recording: bool, replicas: int = 1) -> int:
    """Make the memory and return its fd. `recording`: from the start, for ever; otherwise once it is armed."""
    fd = os.memfd_create("tandem-trace", os.MFD_CLOEXEC)
    os.ftruncate(fd, 8 * (_header_words(replicas) + _tracks(replicas) * CAPACITY * _SPAN_WORDS))
    with mmap.mmap(fd, 8 * _PAGE_WORDS) as page:
        words = np.frombuffer(page, np.int64)
        words[:3] = _MAGIC, FOREVER_NS if recording else 0, replicas
        del words
    return fd


class Trace:
    """The mapped memory, in any process of the engine."""

    def __init__(self, fd: int, replica: int | None = None) -> None:
        """`replica`: whose spans are written here; None: those of frontends."""
        words = np.frombuffer(mmap.mmap(fd, os.fstat(fd).st_size), np.int64)
        if int(words[0]) != _MAGIC:
            raise ProtocolError(f"not a trace of this version: magic {int(words[0]):#x}, expected {_MAGIC:#x}")
        self._until = words[1:2]
        self._replicas = int(words[2])
        self._first = Track.FRONTEND * (self._replicas - 1 if replica is None else replica)  # a track 0 in this view
        header = _header_words(self._replicas)
        self._written = words[8:header]  # [tracks]
        self._spans = words[header:].reshape(-1, CAPACITY, _SPAN_WORDS)  # [tracks, CAPACITY, words]

    def arm(self, until_ns: int) -> None:
        """Record until `until_ns`; a longer recording under way goes on."""
        self._until[0] = max(int(self._until[0]), until_ns)

    def span(self, track: int, act: Act, start_ns: int, end_ns: int, step: int = 0, rows: int = 0) -> None:
        """Record one span; from the one thread that writes to `track`."""
        if start_ns < self._until[0]:
            at = self._first + track
            count = int(self._written[at])
            self._spans[at, count % CAPACITY] = (act, start_ns, end_ns, step, rows)
            self._written[at] = count + 1

    def spans(self, track: int, since_ns: int = 0) -> Int64:
        """Spans of a track that began at `since_ns` or later, int64 [n, 5], oldest first."""
        return self._since(self._first + track, since_ns)

    def _since(self, at: int, since_ns: int) -> Int64:
        count = int(self._written[at])
        order = np.arange(max(0, count - CAPACITY), count) % CAPACITY
        found: Int64 = self._spans[at, order]
        return found[found[:, 1] >= since_ns]

    def chrome(self, since_ns: int = 0) -> bytes:
        """What chrome://tracing and ui.perfetto.dev read: a lane for each process and stream, times in microseconds."""
        events: list[dict[str, Any]] = []
        processes: dict[str, int] = {}
        for track in np.flatnonzero(self._written[: len(self._spans)]).tolist():
            process, lane = self._place(track)
            if process not in processes:
                processes[process] = len(processes) + 1
                events.append(_name("process_name", processes[process], 0, process))
            place = {"pid": processes[process], "tid": track}
            events.append(_name("thread_name", processes[process], track, lane))
            for act, start, end, step, rows in self._since(track, since_ns).tolist():
                times = {"ts": start / 1e3, "dur": (end - start) / 1e3}
                args = {"step": step, "rows": rows}
                events.append({"ph": "X", "name": Act(act).name.lower(), **place, **times, "args": args})
        return msgspec.json.encode({"traceEvents": events, "displayTimeUnit": "ms"})

    def _place(self, at: int) -> tuple[str, str]:
        """(process, lane) of a track, processes as ps shows them."""
        frontend = at - self._replicas * Track.FRONTEND
        if frontend >= 0:
            return f"frontend {frontend + 1}", "event loop"
        replica, track = divmod(at, Track.FRONTEND)
        process, lane = _PLACES[Track(track)]
        return process if self._replicas == 1 else f"{process} of replica {replica}", lane


def open_trace(fd: int, replica: int | None = None) -> Trace | None:
    """The trace of an engine, or None if `fd` is -1: nothing is traced. `replica`: see Trace."""
    return None if fd < 0 else Trace(fd, replica)


def record_for(trace: Trace, seconds: float) -> int:
    """Arm the trace; returns the time from which its spans count."""
    start_ns = now_ns()
    trace.arm(start_ns + int(seconds * 1e9))
    return start_ns


def _name(kind: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": name}}
