"""Draws two step traces, synchronous above asynchronous: what each process and each stream did, on one time scale.

    python scripts/bench_offline.py --random-weights llama-3.1-8b --batch 32 --depth 1,2 --trace traces.json
    python scripts/plot_timeline.py traces-depth1.json traces-depth2.json docs/timeline.png

Shown is a stretch of decode steps from the middle of each trace. The share beside a title is that of the compute stream
over all decode steps of the trace, not of the stretch alone. Copies last a few microseconds: they are drawn wider than
they are, so that they can be seen.
"""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle

INK, MUTED, PAPER, LINE = "#1d2433", "#7a8499", "#ffffff", "#e6e9f0"
IDLE = "#e5484d"
COMPUTE = ("#1f6feb", "#6ea8fe")  # steps alternate between the two
COLORS = {
    "plan": "#f5a524",
    "retire": "#8e4ec6",
    "deliver": "#c9a3e8",
    "messages": "#d6d9e2",
    "launch": "#12a594",
    "publish": "#8e4ec6",
    "copy_in": "#0d8a6a",
    "copy_out": "#d6409f",
    "fan_out": "#e8a6d0",
}
# (label, process, lane); from top to bottom
LANES = (
    ("Scheduler", "scheduler", "loop"),
    ("Executor: launch", "executor", "launch thread"),
    ("GPU: copy in", "device", "h2d stream"),
    ("GPU: compute", "device", "compute stream"),
    ("GPU: copy out", "device", "d2h stream"),
    ("Executor: retire", "executor", "retire thread"),
    ("Frontend", "frontend 1", "event loop"),
)
LEGEND = (
    ("plan", "plan the next step"),
    ("retire", "take the tokens, publish"),
    ("deliver", "send to frontends"),
    ("launch", "queue the kernels"),
    ("copy_in", "plan to the GPU"),
    ("copy_out", "tokens to the host"),
)


@dataclass(frozen=True)
class Span:
    """Milliseconds since the start of the trace."""

    name: str
    start: float
    end: float
    step: int
    rows: int


class Timeline:
    """One trace, by lane."""

    def __init__(self, file: Path) -> None:
        events = json.loads(file.read_bytes())["traceEvents"]
        names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
        processes = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
        spans = [e for e in events if e["ph"] == "X"]
        if not spans:
            raise SystemExit(f"{file} holds no spans")
        first = min(e["ts"] for e in spans)
        self.lanes: dict[tuple[str, str], list[Span]] = {}
        for e in spans:
            start = (e["ts"] - first) / 1e3
            span = Span(e["name"], start, start + e["dur"] / 1e3, e["args"]["step"], e["args"]["rows"])
            self.lanes.setdefault((processes[e["pid"]], names[e["pid"], e["tid"]]), []).append(span)
        compute = self.lanes.get(("device", "compute stream"))
        if not compute:
            raise SystemExit(f"{file} has no compute stream")
        self.steps = _longest_steady(compute)

    @property
    def step_ms(self) -> float:
        return (self.steps[-1].start - self.steps[0].start) / max(1, len(self.steps) - 1)

    @property
    def busy(self) -> float:
        """Share of the time from the first of the steps to the last in which the compute stream worked."""
        return sum(s.end - s.start for s in self.steps[:-1]) / (self.steps[-1].start - self.steps[0].start)

    def middle(self) -> float:
        """Just before a step in the middle of the trace."""
        step = self.steps[len(self.steps) // 2]
        return step.start - 0.12 * self.step_ms


def _longest_steady(compute: list[Span]) -> list[Span]:
    """The longest run of steps with the same number of rows: everybody decodes, nobody comes or goes."""
    runs: list[list[Span]] = [[]]
    for span in compute:
        if runs[-1] and runs[-1][-1].rows != span.rows:
            runs.append([])
        runs[-1].append(span)
    longest = max(runs, key=len)
    if len(longest) < 8:
        raise SystemExit(f"no 8 steps in a row have the same rows; the longest run has {len(longest)}")
    return longest[2:-2]  # the ends hold prompts and stragglers


def draw(ax: Axes, timeline: Timeline, width_ms: float, title: str, scale_ms: float) -> None:
    """One panel. `scale_ms`: the width of the picture in time; shorter stretches leave their right side empty."""
    start = timeline.middle()
    lanes = [lane for lane in LANES if lane[1:] in timeline.lanes]
    least = scale_ms * 0.0022
    heights = _heights(lanes)
    for (label, *place), y in zip(lanes, heights, strict=True):
        is_compute = place[1] == "compute stream"
        ax.add_patch(Rectangle((0, y - 0.4), width_ms, 0.8, facecolor="#f7f8fb", edgecolor="none", zorder=0))
        ax.text(-0.008 * scale_ms, y, label, ha="right", va="center", fontsize=10.5, color=INK,
                fontweight="bold" if is_compute else "normal")  # fmt: skip
        for span in timeline.lanes[place[0], place[1]]:
            left, right = span.start - start, span.end - start
            if right <= 0 or left >= width_ms:
                continue
            left, right = max(left, 0.0), min(max(right, left + least), width_ms)
            color = COMPUTE[span.step % 2] if is_compute else COLORS[span.name]
            ax.add_patch(Rectangle((left, y - 0.36), right - left, 0.72, facecolor=color, edgecolor="none", zorder=2))
            if is_compute and right - left > 0.05 * scale_ms:
                ax.text((left + right) / 2, y, f"step {_relative(timeline, span, start)}", ha="center", va="center",
                        fontsize=10.5, color=PAPER, fontweight="bold", zorder=3)  # fmt: skip
            elif (
                place[1] == "launch thread"
                and right - left < 0.3 * timeline.step_ms
                and right + 0.03 * scale_ms < width_ms
            ):
                ax.text(right + 0.003 * scale_ms, y, _relative(timeline, span, start), ha="left", va="center",
                        fontsize=9, color=MUTED, zorder=3)  # fmt: skip
        if is_compute:
            _draw_idle(ax, timeline, start, width_ms, y, scale_ms)
    ax.set_xlim(0, scale_ms)
    ax.set_ylim(heights[-1] - 0.7, heights[0] + 0.7)
    ax.set_yticks([])
    ax.tick_params(axis="x", length=0, colors=MUTED, labelsize=9.5)
    ax.grid(axis="x", color=LINE, linewidth=0.8, zorder=1)
    for side in ax.spines.values():
        side.set_visible(False)
    ax.set_title(title, loc="left", fontsize=13.5, fontweight="bold", color=INK, pad=10)
    text = f"{timeline.step_ms:.2f} ms a step, GPU busy {timeline.busy * 100:.1f} %"
    ax.set_title(text, loc="right", fontsize=12.5, color=INK, pad=10)


def _heights(lanes: list[tuple[str, str, str]]) -> list[float]:
    """From the top down; below the compute stream there is room for the length of a gap."""
    heights, y = [], 0.0
    for _, _, lane in lanes:
        heights.append(y)
        y -= 1.4 if lane == "compute stream" else 1.0
    return heights


def _relative(timeline: Timeline, span: Span, start: float) -> str:
    first = next(s.step for s in timeline.steps if s.start >= start)
    return "N" if span.step == first else f"N{span.step - first:+d}"


def _draw_idle(ax: Axes, timeline: Timeline, start: float, width_ms: float, y: float, scale_ms: float) -> None:
    compute = timeline.lanes["device", "compute stream"]
    for before, after in itertools.pairwise(compute):
        left, right = before.end - start, after.start - start
        if left <= 0 or right >= width_ms or right - left < 0.004 * scale_ms:
            continue
        ax.add_patch(Rectangle((left, y - 0.36), right - left, 0.72, facecolor="#fdecec", edgecolor=IDLE, hatch="////",
                               linewidth=0, zorder=2))  # fmt: skip
        if right - left > 0.02 * scale_ms:
            ax.text((left + right) / 2, y - 0.44, f"idle {right - left:.2f} ms", ha="center", va="top", fontsize=8.5,
                    color=IDLE, zorder=4)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("synchronous", type=Path)
    parser.add_argument("asynchronous", type=Path)
    parser.add_argument("picture", type=Path, help="PNG or SVG")
    parser.add_argument("--steps", type=float, default=4.3, help="length of the stretch, in steps of the first trace")
    parser.add_argument("--caption", default="", help="under the picture: model, batch, device")
    args = parser.parse_args()
    timelines = [Timeline(args.synchronous), Timeline(args.asynchronous)]
    width_ms = args.steps * timelines[0].step_ms
    plt.rcParams.update({"font.family": "DejaVu Sans", "hatch.color": IDLE, "hatch.linewidth": 0.7})
    rows = [sum(lane[1:] in t.lanes for lane in LANES) for t in timelines]
    figure, axes = plt.subplots(
        2, 1, figsize=(15, 1.9 + 0.5 * sum(rows)), height_ratios=rows, facecolor=PAPER, sharex=True
    )
    titles = (
        "Synchronous: plan, run, wait, repeat",
        "Asynchronous: the next step is planned and queued while this one runs",
    )
    for ax, timeline, title in zip(axes, timelines, titles, strict=True):
        draw(ax, timeline, width_ms, title, width_ms)
    axes[1].set_xlabel("milliseconds", fontsize=10, color=MUTED)
    ticks = axes[1].get_xticks()
    axes[1].set_xticks([t for t in np.asarray(ticks) if 0 <= t <= width_ms])
    handles = [Patch(facecolor=COMPUTE[0], label="GPU computes a step")]
    handles += [Patch(facecolor=COLORS[name], label=text) for name, text in LEGEND]
    handles += [Patch(facecolor="#fdecec", edgecolor=IDLE, hatch="////", linewidth=0, label="GPU idle")]
    figure.legend(handles=handles, loc="lower center", ncols=8, frameon=False, fontsize=9.5, labelcolor=INK,
                  handlelength=1.4, columnspacing=1.6, bbox_to_anchor=(0.52, 0.0))  # fmt: skip
    if args.caption:
        figure.text(0.985, 0.985, args.caption, ha="right", va="top", fontsize=9.5, color=MUTED)
    figure.tight_layout(rect=(0.0, 0.05, 1.0, 0.97 if args.caption else 1.0), h_pad=2.4)
    figure.savefig(args.picture, dpi=160, facecolor=PAPER)


if __name__ == "__main__":
    main()
