"""What the device did in a trace of ENGINE_PROFILE: its busy share by the union of kernel intervals, and the kernels.

    python scripts/trace_report.py trace.json --steps 50

The busy share counts gaps between kernels of one graph too, unlike events at step boundaries. Work is kernels, memsets
and copies within the device; copies to and from the host run beside it and do not count. The first tenth of the trace
is left out: the pipeline fills there. A kernel's share is of the window; shares that overlap may exceed the union.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Interval = tuple[float, float]  # start and end, microseconds


@dataclass(frozen=True)
class Kernel:
    """All launches of one name inside the window."""

    name: str
    count: int
    total_us: float
    share: float  # of the window


@dataclass(frozen=True)
class TraceReport:
    window_us: float
    busy: float  # share of the window in which at least one kernel ran
    longest_gap_us: float
    launches: int
    kernels: list[Kernel] = field(default_factory=list)  # longest total first


def union_us(intervals: Sequence[Interval]) -> tuple[float, float]:
    """(length of the union, longest gap inside it) of intervals sorted by start."""
    covered, longest, reach = 0.0, 0.0, intervals[0][0]
    for start, end in intervals:
        longest = max(longest, start - reach)
        covered += max(0.0, end - max(start, reach))
        reach = max(reach, end)
    return covered, longest


def is_work(event: dict[str, Any]) -> bool:
    """An event of the device that the next kernel would have to wait for."""
    category = event.get("cat")
    within_device = category == "gpu_memcpy" and "DtoD" in event.get("name", "")
    return event.get("ph") == "X" and (category in ("kernel", "gpu_memset") or within_device)


def report(events: list[dict[str, Any]], skip_share: float = 0.1) -> TraceReport:
    """Raises ValueError if the trace has no work of a device."""
    work = sorted((float(e["ts"]), float(e["ts"]) + float(e["dur"]), str(e["name"])) for e in events if is_work(e))
    if not work:
        raise ValueError("the trace holds no kernels: was it made on a GPU?")
    begin, end = work[0][0], max(stop for _, stop, _ in work)
    begin += skip_share * (end - begin)
    inside = [(max(start, begin), stop, name) for start, stop, name in work if stop > begin]
    window_us = end - begin
    covered, longest = union_us([(begin, begin), *((start, stop) for start, stop, _ in inside)])
    totals: dict[str, list[float]] = defaultdict(list)
    for start, stop, name in inside:
        totals[name].append(stop - start)
    kernels = [Kernel(name, len(us), sum(us), sum(us) / window_us) for name, us in totals.items()]
    kernels.sort(key=lambda kernel: -kernel.total_us)
    return TraceReport(window_us, covered / window_us, longest, len(inside), kernels)


def read_trace(path: Path) -> list[dict[str, Any]]:
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    events: list[dict[str, Any]] = json.loads(text)["traceEvents"]
    return events


def print_report(result: TraceReport, steps: int | None, rows: int = 25) -> None:
    """The table; with `steps`, the number traced, also what one step costs."""
    in_window = steps * 0.9 if steps else None
    print(
        f"union of kernel intervals: busy {result.busy * 100:.2f} % of {result.window_us / 1e3:.2f} ms, "
        f"longest gap {result.longest_gap_us:.1f} us, {result.launches} launches"
        + (f", about {result.launches / in_window:.0f} a step" if in_window else "")
    )
    print(
        f"{'share %':>8} {'calls':>7} {'us each':>9} {'ms':>9}" + (f" {'us/step':>9}" if in_window else "") + "  kernel"
    )
    for kernel in result.kernels[:rows]:
        each = kernel.total_us / kernel.count
        step = f" {kernel.total_us / in_window:9.1f}" if in_window else ""
        print(
            f"{kernel.share * 100:8.2f} {kernel.count:7d} {each:9.2f} {kernel.total_us / 1e3:9.2f}{step}"
            f"  {kernel.name[:100]}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--steps", type=int, help="how many were traced: adds a column of microseconds a step")
    parser.add_argument("--rows", type=int, default=25)
    args = parser.parse_args()
    print_report(report(read_trace(args.trace)), args.steps, args.rows)


if __name__ == "__main__":
    main()
