"""Lanes: bytes, order, back-pressure, timing and failure, on the CPU device and, where there is one, on CUDA."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from executor.lanes import InlineEvent, InlineStreams, Lanes, StepTimes, open_streams

CPU = torch.device("cpu")
WAIT_S = 20.0


class Done:
    """Collects what the retire thread reports."""

    def __init__(self) -> None:
        self.tags: list[Any] = []
        self.times: list[StepTimes] = []

    def __call__(self, tag: Any, times: StepTimes) -> None:
        self.tags.append(tag)
        self.times.append(times)


def make_lanes(on_done: Callable[[Any, StepTimes], None], depth: int = 2, **options: Any) -> Lanes:
    return Lanes(InlineStreams(), CPU, depth=depth, in_bytes=64, out_bytes=64, on_done=on_done, **options)


def launch(
    lanes: Lanes, host_in: torch.Tensor, host_out: torch.Tensor, step: Any, tag: Any = None, **more: Any
) -> None:
    """All bytes of both, unless `more` says otherwise."""
    nbytes = {"in_bytes": len(host_in), "out_bytes": len(host_out)}
    lanes.launch(host_in, host_out, step, tag, since_ns=time.monotonic_ns(), **nbytes | more)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_bytes_go_through_in_order_and_state_carries_over(depth: int) -> None:
    done = Done()
    lanes = make_lanes(done, depth)
    total = torch.zeros((), dtype=torch.int64)

    def step(staged: torch.Tensor, output: torch.Tensor) -> None:
        values = staged[:16].view(torch.int64)
        total.add_(values.sum())
        output[:8].view(torch.int64).copy_(total)

    ins = [torch.tensor([i, 2 * i], dtype=torch.int64).view(torch.uint8) for i in range(40)]
    outs = [torch.full((8,), 255, dtype=torch.uint8) for _ in range(40)]
    for i in range(40):
        launch(lanes, ins[i], outs[i], step, i)
    lanes.close()
    assert done.tags == list(range(40))
    assert [int(out.view(torch.int64)) for out in outs] == [3 * i * (i + 1) // 2 for i in range(40)]


def test_only_the_used_bytes_are_copied() -> None:
    done = Done()
    lanes = make_lanes(done)
    host_out = torch.full((32,), 7, dtype=torch.uint8)
    host_in, seen = torch.arange(8, dtype=torch.uint8), torch.zeros(64, dtype=torch.uint8)

    def step(staged: torch.Tensor, output: torch.Tensor) -> None:
        seen.copy_(staged)
        output.fill_(9)

    launch(lanes, torch.full((8,), 5, dtype=torch.uint8), torch.empty(0, dtype=torch.uint8), step)
    launch(lanes, torch.full((8,), 6, dtype=torch.uint8), torch.empty(0, dtype=torch.uint8), step)
    launch(lanes, host_in, host_out[8:], step, in_bytes=4, out_bytes=4)
    lanes.close()
    assert seen[:8].tolist() == [0, 1, 2, 3, 5, 5, 5, 5]
    assert host_out.tolist() == [7] * 8 + [9] * 4 + [7] * 20


class GatedEvent(InlineEvent):
    """Complete only when the gate is open: a device that takes its time."""

    def __init__(self, gate: threading.Event) -> None:
        super().__init__()
        self._gate = gate

    def synchronize(self) -> None:
        assert self._gate.wait(WAIT_S)


class GatedStreams(InlineStreams):
    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()

    def event(self, *, timing: bool) -> InlineEvent:
        return GatedEvent(self.gate)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_launch_waits_only_while_all_lanes_are_taken(depth: int) -> None:
    streams, done = GatedStreams(), Done()
    lanes = Lanes(streams, CPU, depth=depth, in_bytes=8, out_bytes=8, on_done=done)
    host = torch.zeros(8, dtype=torch.uint8)
    launched: list[int] = []

    def launch_all() -> None:
        for i in range(depth + 1):
            launch(lanes, host, host, lambda *_: None, i)
            launched.append(i)

    thread = threading.Thread(target=launch_all, daemon=True)
    thread.start()
    thread.join(0.2)
    assert thread.is_alive()
    assert launched == list(range(depth))
    assert done.tags == []
    streams.gate.set()
    thread.join(WAIT_S)
    assert not thread.is_alive()
    lanes.close()
    assert done.tags == list(range(depth + 1))


def test_a_step_is_hidden_unless_it_is_the_first_or_the_caller_waited_for_it() -> None:
    done = Done()
    lanes = make_lanes(done)
    host = torch.zeros(8, dtype=torch.uint8)
    for waited in (True, False, True, False):
        launch(lanes, host, host, lambda *_: None, waited=waited)
    lanes.close()
    assert [times.hidden for times in done.times] == [False, True, False, True]


def test_times_come_from_the_compute_stream() -> None:
    """A clock of known events: start and end of two steps at 100..130 and 150..190."""

    class Clock(InlineStreams):
        def event(self, *, timing: bool) -> InlineEvent:
            return Tick() if timing else InlineEvent()

    ticks = iter((100, 130, 150, 190))

    class Tick(InlineEvent):
        def record(self, stream: Any) -> None:
            self._time_ns = next(ticks)

    done = Done()
    lanes = Lanes(Clock(), CPU, depth=2, in_bytes=8, out_bytes=8, on_done=done)
    host = torch.zeros(8, dtype=torch.uint8)
    for _ in range(2):
        launch(lanes, host, host, lambda *_: None)
    lanes.close()
    assert [(times.device_ns, times.gap_ns) for times in done.times] == [(30, 0), (40, 20)]


def test_an_error_while_retiring_is_reported_once_and_ends_launching() -> None:
    reported: list[BaseException] = []
    failed = threading.Event()

    def on_done(tag: Any, times: StepTimes) -> None:
        raise ValueError(f"step {tag}")

    def on_error(error: BaseException) -> None:
        reported.append(error)
        failed.set()

    lanes = make_lanes(on_done, depth=1, on_error=on_error)
    host = torch.zeros(8, dtype=torch.uint8)
    launch(lanes, host, host, lambda *_: None, 5)
    assert failed.wait(WAIT_S)
    for tag in (6, 7):
        with pytest.raises(RuntimeError, match="earlier step failed"):
            launch(lanes, host, host, lambda *_: None, tag)
    assert [str(error) for error in reported] == ["step 5"]


def test_an_error_in_a_step_reaches_the_caller() -> None:
    def step(staged: torch.Tensor, output: torch.Tensor) -> None:
        raise ValueError("bad step")

    lanes = make_lanes(Done())
    host = torch.zeros(8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="bad step"):
        launch(lanes, host, host, step)
    lanes.close()


@pytest.mark.gpu
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_on_cuda_the_host_runs_ahead_and_nothing_races(depth: int) -> None:
    """Stalls on random streams make every race of the lanes happen; the sums must still be right."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    device = torch.device("cuda")
    streams, done = open_streams(device), Done()
    lanes = Lanes(streams, device, depth=depth, in_bytes=1 << 16, out_bytes=64, on_done=done)
    steps = 60
    ins = [torch.full((1 << 16,), i % 200, dtype=torch.uint8).pin_memory() for i in range(steps)]
    outs = [torch.zeros(8, dtype=torch.uint8).pin_memory() for _ in range(steps)]
    total = torch.zeros((), dtype=torch.int64, device=device)
    torch.cuda.synchronize()
    stall = torch.Generator().manual_seed(depth)

    def step(staged: torch.Tensor, output: torch.Tensor) -> None:
        torch.cuda._sleep(int(torch.randint(1, 2_000_000, (), generator=stall)))
        total.add_(staged.sum())
        output[:8].view(torch.int64).copy_(total)

    for i in range(steps):
        launch(lanes, ins[i], outs[i], step, i)
        for stream in (streams.h2d, streams.d2h):
            with torch.cuda.stream(stream):
                torch.cuda._sleep(int(torch.randint(1, 1_000_000, (), generator=stall)))
    lanes.close()
    expected, running = [], 0
    for i in range(steps):
        running += (i % 200) << 16
        expected.append(running)
    assert [int(out.view(torch.int64)) for out in outs] == expected
    assert done.tags == list(range(steps))
    assert not done.times[0].hidden
    if depth > 1:
        assert sum(times.hidden for times in done.times) > steps // 2


@pytest.mark.gpu
def test_on_cuda_a_launch_does_not_wait_for_the_device() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    device = torch.device("cuda")
    streams, done = open_streams(device), Done()
    lanes = Lanes(streams, device, depth=2, in_bytes=64, out_bytes=64, on_done=done)
    host_in, host_out = torch.zeros(8, dtype=torch.uint8).pin_memory(), torch.zeros(8, dtype=torch.uint8).pin_memory()
    finished = torch.cuda.Event()

    def step(staged: torch.Tensor, output: torch.Tensor) -> None:
        torch.cuda._sleep(400_000_000)
        finished.record()

    launch(lanes, host_in, host_out, step)
    assert not finished.query()
    lanes.close()
    assert finished.query()
