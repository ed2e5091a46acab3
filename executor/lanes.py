"""Lanes: the dual buffers of a step, and the three streams that keep the device busy while the host prepares.

Owns the h2d, compute and d2h streams, D lanes (device buffers in and out), the events between them, and the thread that
retires steps. Called by the executor's launch loop, or by any other pipeline: nothing here knows about models.
`launch` must never wait for the device, except when all D lanes are taken.

    h2d      [in N+1]                    |  copy of step N+1's bytes, while N computes
    compute  |---- step N ----|---- step N+1 ----|
    d2h                       [out N]    |  copy of step N's bytes, while N+1 computes

Only `compute` may touch state that outlives a step: that one rule replaces every other barrier. Host buffers are the
caller's; on a CUDA device they must be pinned for the copies to be asynchronous. On the CPU the same code runs on
streams that execute at once and events that only remember the time.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from executor.copies import queue_copy
from executor.timeline import DeviceClock, DeviceSpans, StepEvents

Step = Callable[[torch.Tensor, torch.Tensor], None]  # (device input bytes, device output bytes)


class Event(Protocol):
    def record(self, stream: Any) -> None: ...
    def query(self) -> bool: ...
    def synchronize(self) -> None: ...
    def elapsed_time(self, end: Any) -> float: ...  # milliseconds from this event to `end`


class Streams(Protocol):
    """What a device offers: three in-order queues, events, copies, and whether work runs in the call that queues it.

    `use` makes one of the queues that of the calling thread; `copy` queues one of `nbytes` on `stream`.
    """

    inline: bool
    h2d: Any
    compute: Any
    d2h: Any

    def event(self, *, timing: bool) -> Event: ...
    def use(self, stream: Any) -> None: ...
    def copy(self, into: torch.Tensor, source: torch.Tensor, nbytes: int, stream: Any) -> None: ...


class CudaStreams:
    """Real streams. Events that are waited for on the host sleep instead of spinning: it costs 20 us, not a core."""

    inline = False

    def __init__(self, device: torch.device) -> None:
        stream: Any = torch.cuda.Stream
        self.h2d, self.compute, self.d2h = stream(device), stream(device), stream(device)

    def event(self, *, timing: bool) -> Event:
        make: Any = torch.cuda.Event
        event: Event = make(enable_timing=timing, blocking=True)
        return event

    def use(self, stream: torch.cuda.Stream) -> None:
        torch.cuda.set_stream(stream)  # a context manager would cost 15 us

    def copy(self, into: torch.Tensor, source: torch.Tensor, nbytes: int, stream: torch.cuda.Stream) -> None:
        queue_copy(into, source, nbytes, stream)


class InlineEvent:
    """The time at which the host passed here; it is always complete."""

    def __init__(self) -> None:
        self._time_ns = 0

    def record(self, stream: Any) -> None:
        self._time_ns = time.monotonic_ns()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: InlineEvent) -> float:
        return (end._time_ns - self._time_ns) * 1e-6


class InlineStream:
    """A stream without a queue: what is put on it has run already."""

    def wait_event(self, event: InlineEvent) -> None:
        pass


class InlineStreams:
    """The CPU as a device."""

    inline = True

    def __init__(self) -> None:
        self.h2d, self.compute, self.d2h = InlineStream(), InlineStream(), InlineStream()

    def event(self, *, timing: bool) -> Event:
        return InlineEvent()

    def use(self, stream: Any) -> None:
        pass

    def copy(self, into: torch.Tensor, source: torch.Tensor, nbytes: int, stream: Any) -> None:
        into[:nbytes].copy_(source[:nbytes])


def open_streams(device: torch.device) -> Streams:
    return CudaStreams(device) if device.type == "cuda" else InlineStreams()


@dataclass(frozen=True, slots=True)
class StepTimes:
    """What one step cost. `hidden`: it was queued before the device ran dry, so its preparation cost nothing."""

    device_ns: int  # compute stream, first to last kernel
    gap_ns: int  # compute stream idle since the step before
    launch_ns: int  # host time from `since_ns` until everything was queued, without what the device itself ran inline
    hidden: bool
    spans: DeviceSpans | None = None  # when each stream worked, if timed


@dataclass(slots=True)
class _Lane:
    input: torch.Tensor  # uint8 [in_bytes], on the device
    output: torch.Tensor  # uint8 [out_bytes], on the device
    loading: Event | None  # h2d begun; None unless timed
    loaded: Event  # h2d done
    stored: Event  # d2h done


@dataclass(slots=True)
class _Span:
    """Compute stream of one step. One more than lanes, because the next step's gap is measured from `end`."""

    start: Event
    end: Event


@dataclass(slots=True)
class _Launched:
    lane: _Lane
    span: _Span
    previous: _Span | None
    launch_ns: int
    hidden: bool
    tag: Any


class Lanes:
    """D buffer sets used in turn; steps run and retire in the order of their launch.

    `on_done(tag, times)` is called on the retire thread once `host_out` of that step holds its bytes; `on_error(error)`
    once, if the device or `on_done` failed, after which `launch` raises.
    """

    def __init__(
        self,
        streams: Streams,
        device: torch.device,
        *,
        depth: int,
        in_bytes: int,
        out_bytes: int,
        on_done: Callable[[Any, StepTimes], None],
        on_error: Callable[[BaseException], None] | None = None,
        timed: bool = False,
    ) -> None:
        """On the thread that will launch, whose stream becomes `compute`. `timed`: StepTimes also say when each stream
        worked, which costs two more events a step."""
        streams.use(streams.compute)
        self._streams, self._on_done, self._on_error = streams, on_done, on_error
        # Lanes come back in the order in which they were taken; None: no more launches.
        self._free: queue.SimpleQueue[_Lane | None] = queue.SimpleQueue()
        for _ in range(depth):
            lane = _Lane(
                input=torch.empty(in_bytes, dtype=torch.uint8, device=device),
                output=torch.empty(out_bytes, dtype=torch.uint8, device=device),
                loading=streams.event(timing=True) if timed else None,
                loaded=streams.event(timing=timed),
                stored=streams.event(timing=timed),
            )
            self._free.put(lane)
        self._spans = [_Span(streams.event(timing=True), streams.event(timing=True)) for _ in range(depth + 1)]
        self._clock = DeviceClock(streams.event(timing=True), streams.compute) if timed else None
        self._count = 0  # steps launched
        self._launched: queue.SimpleQueue[_Launched | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._retire, name="retire", daemon=True)
        self._thread.start()

    def launch(
        self,
        host_in: torch.Tensor,
        host_out: torch.Tensor,
        step: Step,
        tag: Any = None,
        *,
        in_bytes: int,
        out_bytes: int,
        since_ns: int,
        waited: bool = False,
    ) -> None:
        """Queue one step: copy in, `step(device input, device output)` on the compute stream, copy out.

        Of `host_in` and `host_out`, both uint8, this step uses the first `in_bytes` and `out_bytes`; both stay valid
        until `on_done`. `since_ns` is when the caller got the work (time.monotonic_ns); `waited`: it had to sleep for
        it. Waits only while all lanes are taken. What `step` raises reaches the caller, and the lane is not used again.
        """
        lane = self._free.get()
        if lane is None or self._error is not None:
            self._free.put(None)
            raise RuntimeError("an earlier step failed") from self._error
        streams = self._streams
        span = self._spans[self._count % len(self._spans)]
        previous = self._spans[(self._count - 1) % len(self._spans)] if self._count else None
        if lane.loading is not None:
            lane.loading.record(streams.h2d)
        streams.copy(lane.input, host_in, in_bytes, streams.h2d)
        lane.loaded.record(streams.h2d)
        streams.compute.wait_event(lane.loaded)
        span.start.record(streams.compute)
        step(lane.input, lane.output)
        span.end.record(streams.compute)
        if previous is None:
            hidden = False
        elif streams.inline:
            hidden = not waited
        else:
            hidden = not previous.end.query()
        streams.d2h.wait_event(span.end)
        streams.copy(host_out, lane.output, out_bytes, streams.d2h)
        lane.stored.record(streams.d2h)
        self._count += 1
        self._launched.put(_Launched(lane, span, previous, time.monotonic_ns() - since_ns, hidden, tag))

    def close(self) -> None:
        """Wait for every launched step to retire, then end the retire thread."""
        self._launched.put(None)
        self._thread.join()

    def _retire(self) -> None:
        try:
            while (launched := self._launched.get()) is not None:
                launched.lane.stored.synchronize()
                times = self._measure(launched)
                self._free.put(launched.lane)  # before on_done: it may bring the next step at once
                self._on_done(launched.tag, times)
        except BaseException as error:
            self._error = error
            self._free.put(None)
            if self._on_error is None:
                raise
            self._on_error(error)

    def _measure(self, launched: _Launched) -> StepTimes:
        span, previous = launched.span, launched.previous
        device_ns = _elapsed_ns(span.start, span.end)
        return StepTimes(
            device_ns=device_ns,
            gap_ns=_elapsed_ns(previous.end, span.start) if previous is not None else 0,
            launch_ns=launched.launch_ns - (device_ns if self._streams.inline else 0),
            hidden=launched.hidden,
            spans=self._place(launched.lane, span),
        )

    def _place(self, lane: _Lane, span: _Span) -> DeviceSpans | None:
        if self._clock is None or lane.loading is None:
            return None
        return self._clock.place(StepEvents(lane.loading, lane.loaded, span.start, span.end, lane.stored))


def _elapsed_ns(start: Event, end: Event) -> int:
    return max(0, round(start.elapsed_time(end) * 1e6))
