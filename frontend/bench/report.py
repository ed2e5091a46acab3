"""From times to numbers, and to a table, JSON, a picture or a page.

Every latency is what a client saw. TTFT runs from the moment a request was due, so a client that falls behind an open
loop cannot flatter the server; TPOT is (end of text - first text) / (tokens - 1); ITL the gaps between events.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from frontend.bench.load import Answer

_QUANTILES: Final = (50, 90, 99)
_INK, _GRID, _COLORS = "#1d2433", "#e6e9f0", ("#1f6feb", "#12a594", "#f5a524", "#8e4ec6")


class Latency(msgspec.Struct, frozen=True):
    """Milliseconds."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: float


class Slo(msgspec.Struct, frozen=True):
    """What a user puts up with, in milliseconds; None: anything."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2e_ms: float | None = None


class Summary(msgspec.Struct, frozen=True):
    """One run. Rates are per second of the whole run, the ramp at both ends included."""

    workload: str
    load: str  # such as "8 users" or "4 requests/s"
    duration_s: float
    requests: int
    failed: int
    prompt_tokens: int
    output_tokens: int
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    goodput_per_s: float  # requests a second within the limits
    slo: Slo
    ttft_ms: Latency | None
    itl_ms: Latency | None
    tpot_ms: Latency | None
    e2e_ms: Latency | None
    errors: dict[str, int]


class Times(msgspec.Struct, frozen=True):
    """Latencies in milliseconds; `good` says of each successful request whether it kept the limits."""

    ttft: list[float]
    itl: list[float]
    tpot: list[float]
    e2e: list[float]
    good: list[bool]


def times_of(answers: Sequence[Answer], slo: Slo) -> Times:
    """The latencies of the requests that succeeded."""
    times = Times([], [], [], [], [])
    for answer in answers:
        if answer.error is not None:
            continue
        e2e = (answer.end_s - answer.due_s) * 1e3
        first = answer.text_s[0] if answer.text_s else answer.end_s
        ttft = (first - answer.due_s) * 1e3
        tpot = None
        if answer.text_s and answer.output_tokens > 1:
            tpot = (answer.text_s[-1] - first) * 1e3 / (answer.output_tokens - 1)
        times.ttft.append(ttft)
        times.e2e.append(e2e)
        times.itl.extend((np.diff(answer.text_s) * 1e3).tolist())
        if tpot is not None:
            times.tpot.append(tpot)
        limits = ((ttft, slo.ttft_ms), (tpot, slo.tpot_ms), (e2e, slo.e2e_ms))
        times.good.append(all(limit is None or value is None or value <= limit for value, limit in limits))
    return times


def _latency(values: Sequence[float]) -> Latency | None:
    if not values:
        return None
    p50, p90, p99 = np.percentile(values, _QUANTILES).tolist()
    return Latency(float(np.mean(values)), p50, p90, p99, max(values))


def summarize(answers: Sequence[Answer], duration_s: float, *, workload: str, load: str, slo: Slo) -> Summary:
    good = [answer for answer in answers if answer.error is None]
    times = times_of(answers, slo)
    prompt, output = sum(a.prompt_tokens for a in good), sum(a.output_tokens for a in good)
    errors: dict[str, int] = {}
    for answer in answers:
        if answer.error is not None:
            errors[answer.error] = errors.get(answer.error, 0) + 1
    return Summary(
        workload=workload,
        load=load,
        duration_s=duration_s,
        requests=len(answers),
        failed=len(answers) - len(good),
        prompt_tokens=prompt,
        output_tokens=output,
        requests_per_s=len(good) / duration_s,
        output_tokens_per_s=output / duration_s,
        total_tokens_per_s=(prompt + output) / duration_s,
        goodput_per_s=sum(times.good) / duration_s,
        slo=slo,
        ttft_ms=_latency(times.ttft),
        itl_ms=_latency(times.itl),
        tpot_ms=_latency(times.tpot),
        e2e_ms=_latency(times.e2e),
        errors=errors,
    )


LATENCY_NAMES: Final = (
    ("ttft_ms", "time to first token"),
    ("itl_ms", "between events"),
    ("tpot_ms", "per output token"),
    ("e2e_ms", "whole request"),
)


def headline(summary: Summary) -> list[tuple[str, str]]:
    """Label and value of each number that is not a latency."""
    s = summary
    return [
        ("workload", f"{s.workload}, {s.load}"),
        ("requests", f"{s.requests} in {s.duration_s:.1f} s, {s.failed} failed"),
        ("tokens", f"{s.prompt_tokens:,} prompt, {s.output_tokens:,} output"),
        ("throughput", f"{s.requests_per_s:.2f} requests/s, {s.output_tokens_per_s:,.0f} output tokens/s"),
        ("goodput", f"{s.goodput_per_s:.2f} requests/s within {describe(s.slo)}"),
    ]


def describe(slo: Slo) -> str:
    limits = [f"{name} {value:g} ms" for name, value in (("TTFT", slo.ttft_ms), ("TPOT", slo.tpot_ms),
                                                         ("E2E", slo.e2e_ms)) if value is not None]  # fmt: skip
    return ", ".join(limits) or "no limits"


def picture(summary: Summary, answers: Sequence[Answer]) -> bytes:
    """A PNG: throughput over time, and the distributions of the latencies. Needs matplotlib (extra `plot`)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    times = times_of(answers, summary.slo)
    figure, axes = plt.subplots(2, 2, figsize=(13, 7.4), facecolor="white")
    _draw_throughput(axes[0, 0], answers, summary.duration_s)
    panels = ((axes[0, 1], times.ttft, "time to first token", summary.slo.ttft_ms),
              (axes[1, 0], times.itl, "between events", None),
              (axes[1, 1], times.e2e, "whole request", summary.slo.e2e_ms))  # fmt: skip
    for (ax, values, title, limit), color in zip(panels, _COLORS[1:], strict=True):
        _draw_distribution(ax, values, title, limit, color)
    figure.suptitle(
        f"{summary.workload}, {summary.load}: {summary.output_tokens_per_s:,.0f} output tokens/s, "
        f"{summary.requests_per_s:.2f} requests/s, {summary.failed} failed",
        fontsize=13, fontweight="bold", color=_INK, x=0.02, ha="left",
    )  # fmt: skip
    figure.tight_layout(rect=(0, 0, 1, 0.97), h_pad=2, w_pad=2)
    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=130)
    plt.close(figure)
    return target.getvalue()


def _style(ax: Any, title: str, x: str, y: str) -> None:
    ax.set_title(title, loc="left", fontsize=11, color=_INK, fontweight="bold")
    ax.set_xlabel(x, fontsize=9, color=_INK)
    ax.set_ylabel(y, fontsize=9, color=_INK)
    ax.grid(color=_GRID, linewidth=0.8)
    ax.set_axisbelow(True)
    ax.tick_params(labelsize=9, colors=_INK, length=0)
    for side in ax.spines.values():
        side.set_visible(False)


def _draw_throughput(ax: Any, answers: Sequence[Answer], duration_s: float) -> None:
    start = min(answer.due_s for answer in answers)
    stamps = np.array([stamp - start for answer in answers for stamp in answer.text_s])
    counts, edges = np.histogram(stamps, bins=np.linspace(0, max(duration_s, 1e-3), 61))
    ax.fill_between(edges[:-1], counts / np.diff(edges), step="post", color=_COLORS[0], alpha=0.85, linewidth=0)
    ax.set_ylim(bottom=0)
    _style(ax, "events with text, a second", "seconds", "")


def _draw_distribution(ax: Any, values: Sequence[float], title: str, limit: float | None, color: str) -> None:
    _style(ax, title, "milliseconds", "share of all, %")
    if not values:
        return
    ordered = np.sort(values)
    ax.plot(ordered, np.arange(1, len(ordered) + 1) / len(ordered) * 100, color=color, linewidth=2)
    for q in _QUANTILES:
        value = float(np.percentile(ordered, q))
        ax.plot(value, q, "o", color=color, markersize=5)
        side = {"xytext": (7, -11), "ha": "left"} if value < 0.8 * ordered[-1] else {"xytext": (-7, 4), "ha": "right"}
        ax.annotate(f"p{q} {value:,.1f}", (value, q), textcoords="offset points", fontsize=9, color=_INK, **side)
    if limit is not None:
        ax.axvline(limit, color="#e5484d", linewidth=1.2, linestyle="--")
    ax.set_ylim(0, 103)
    ax.set_xlim(left=0)


def page(summary: Summary, answers: Sequence[Answer]) -> str:
    """One HTML file with the numbers and the picture in it."""
    rows = "".join(f"<tr><th>{label}<td colspan=5>{html.escape(value)}" for label, value in headline(summary))
    cells = ""
    for name, label in LATENCY_NAMES:
        latency: Latency | None = getattr(summary, name)
        if latency is not None:
            numbers = "".join(f"<td>{getattr(latency, field):,.1f}" for field in Latency.__struct_fields__)
            cells += f"<tr><th>{label}{numbers}"
    heads = "".join(f"<th>{field}" for field in Latency.__struct_fields__)
    errors = "".join(f"<li>{count} x {html.escape(text)}" for text, count in summary.errors.items())
    image = base64.b64encode(picture(summary, answers)).decode()
    return (
        "<!doctype html><meta charset=utf-8><title>engine-bench</title><style>body{font:15px system-ui;color:#1d2433;"
        "max-width:1100px;margin:2rem auto;padding:0 1rem}th{text-align:left;font-weight:600;"
        "padding:.3rem 1.2rem .3rem 0}"
        "td{padding:.3rem 1.2rem .3rem 0;font-variant-numeric:tabular-nums}img{max-width:100%}</style>"
        f"<h1>engine-bench</h1><table>{rows}<tr><th>milliseconds{heads}{cells}</table>"
        f"{f'<ul>{errors}</ul>' if errors else ''}<img alt='throughput and latencies' "
        f"src='data:image/png;base64,{image}'>\n"
    )


def write_report(file: Path, summary: Summary, answers: Sequence[Answer]) -> None:
    """A .png holds the picture, a .html everything."""
    if file.suffix == ".png":
        file.write_bytes(picture(summary, answers))
    else:
        file.write_text(page(summary, answers), encoding="utf-8")
