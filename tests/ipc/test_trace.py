"""The flight recorder: what is recorded when, what is overwritten, and the JSON made of it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

import pytest

from ipc import trace as trace_module
from ipc.errors import ProtocolError
from ipc.trace import FOREVER_NS, Act, Trace, Track, create_trace, open_trace


@pytest.fixture
def memory() -> Iterator[int]:
    fd = create_trace(recording=False)
    yield fd
    os.close(fd)


def test_nothing_is_recorded_until_armed_and_nothing_after(memory: int) -> None:
    writer, reader = Trace(memory), Trace(memory)
    writer.span(Track.LAUNCH, Act.LAUNCH, 10, 20, step=1)
    reader.arm(100)
    writer.span(Track.LAUNCH, Act.LAUNCH, 30, 40, step=2)
    writer.span(Track.LAUNCH, Act.LAUNCH, 100, 140, step=3)
    assert [span[3] for span in reader.spans(Track.LAUNCH).tolist()] == [2]


def test_arming_for_less_does_not_end_a_longer_recording(memory: int) -> None:
    trace = Trace(memory)
    trace.arm(FOREVER_NS)
    trace.arm(5)
    trace.span(Track.COMPUTE, Act.COMPUTE, 50, 60)
    assert len(trace.spans(Track.COMPUTE)) == 1


def test_old_spans_are_overwritten_and_the_rest_is_in_order(memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_module, "CAPACITY", 8)
    trace = Trace(memory)
    trace.arm(FOREVER_NS)
    for step in range(20):
        trace.span(Track.SCHEDULER, Act.PLAN, step, step + 1, step)
    assert trace.spans(Track.SCHEDULER)[:, 3].tolist() == list(range(12, 20))
    assert trace.spans(Track.SCHEDULER, since_ns=17)[:, 3].tolist() == [17, 18, 19]


def test_the_json_has_a_lane_for_each_process_and_stream(memory: int) -> None:
    trace = Trace(memory)
    trace.arm(FOREVER_NS)
    trace.span(Track.SCHEDULER, Act.PLAN, 1_000, 3_000, step=7, rows=4)
    trace.span(Track.COMPUTE, Act.COMPUTE, 4_000, 9_500, step=7, rows=4)
    trace.span(Track.FRONTEND + 1, Act.FAN_OUT, 10_000, 11_000, rows=4)
    events = json.loads(trace.chrome())["traceEvents"]
    lanes = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    processes = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    spans = {processes[e["pid"]]: e for e in events if e["ph"] == "X"}
    assert set(spans) == {"scheduler", "device", "frontend 2"}
    assert lanes[spans["device"]["tid"]] == "compute stream"
    assert (spans["device"]["name"], spans["device"]["ts"], spans["device"]["dur"]) == ("compute", 4.0, 5.5)
    assert spans["scheduler"]["args"] == {"step": 7, "rows": 4}


def test_each_replica_has_its_lanes_and_frontends_come_after_them() -> None:
    fd = create_trace(recording=True, replicas=100)  # more tracks than a page has words
    try:
        for replica in (0, 1, 99):
            Trace(fd, replica).span(Track.COMPUTE, Act.COMPUTE, 4_000, 5_000, step=replica)
        Trace(fd).span(Track.FRONTEND, Act.FAN_OUT, 6_000, 7_000)
        assert Trace(fd, 99).spans(Track.COMPUTE)[:, 3].tolist() == [99]
        events = json.loads(Trace(fd).chrome())["traceEvents"]
    finally:
        os.close(fd)
    processes = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert [processes[e["pid"]] for e in events if e["ph"] == "X"] == [
        "device of replica 0", "device of replica 1", "device of replica 99", "frontend 1",
    ]  # fmt: skip


def test_other_memory_is_refused_and_none_is_none() -> None:
    fd = os.memfd_create("other")
    os.ftruncate(fd, 1 << 16)
    try:
        with pytest.raises(ProtocolError, match="not a trace"):
            Trace(fd)
    finally:
        os.close(fd)
    assert open_trace(-1) is None
