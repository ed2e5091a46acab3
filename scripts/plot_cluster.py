"""Draws the rows of simulate_cluster.py: what holds and what does not as replicas are added. Imported by it only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

if TYPE_CHECKING:
    from simulate_cluster import Row

INK, MUTED, PAPER, LINE = "#1d2433", "#7a8499", "#ffffff", "#e6e9f0"
COLORS: Final = {"poisson": "#1f6feb", "bursty": "#e5484d"}
Curve = tuple[str, str, "Callable[[Row], float]"]  # label, line style, value

PANELS: Final[tuple[tuple[str, str, bool, tuple[Curve, ...]], ...]] = (  # title, unit, log scale, curves
    ("Throughput of one replica", "tokens/s", False, (("", "-", lambda r: r.tokens_s / r.replicas),)),
    (
        "Time to the first token",
        "ms",
        True,
        (("p50", "-", lambda r: r.ttft_ms[0]), ("p99", "--", lambda r: r.ttft_ms[1])),
    ),
    (
        "Time between tokens",
        "ms",
        True,
        (("p50", "-", lambda r: r.itl_ms[0]), ("p99", "--", lambda r: r.itl_ms[1])),
    ),
    ("Prompt tokens found in the prefix cache", "%", False, (("", "-", lambda r: r.hits * 100),)),
    ("Tokens of the busiest replica over the mean", "", False, (("", "-", lambda r: r.most),)),
    (
        "Share of a core in use",
        "%",
        False,
        (("each scheduler", "-", lambda r: r.scheduler * 100), ("each frontend", "--", lambda r: r.frontend * 100)),
    ),
)


def draw(rows: Sequence[Row], picture: Path) -> None:
    """One panel a number, replicas from left to right, a color a kind of arrivals."""
    plt.rcParams.update({"font.family": "DejaVu Sans"})
    figure, axes = plt.subplots(2, 3, figsize=(14, 7.4), facecolor=PAPER)
    for ax, (title, unit, log, curves) in zip(axes.flat, PANELS, strict=True):
        for arrivals, color in COLORS.items():
            mine = [row for row in rows if row.arrivals == arrivals]
            for label, style, value in curves:
                name = ", ".join(part for part in (arrivals, label) if part)
                ax.plot([r.replicas for r in mine], [value(r) for r in mine], style, color=color, marker="o",
                        markersize=4, linewidth=1.8, label=name)  # fmt: skip
        _dress(ax, title, unit, log, sorted({row.replicas for row in rows}))
    figure.tight_layout(h_pad=2.2, w_pad=1.6)
    figure.savefig(picture, dpi=110, facecolor=PAPER)


def _dress(ax: Axes, title: str, unit: str, log: bool, replicas: Sequence[int]) -> None:
    ax.set_title(title + (f", {unit}" if unit else ""), loc="left", fontsize=11.5, fontweight="bold", color=INK)
    ax.set_xscale("log", base=2)
    ax.set_xticks(replicas, [str(n) for n in replicas])
    if log:
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        ax.yaxis.set_minor_formatter(lambda y, _: f"{y:g}" if f"{y:g}"[0] in "25" else "")
    else:
        ax.set_ylim(bottom=0)
    ax.set_xlabel("replicas", fontsize=9.5, color=MUTED)
    ax.tick_params(which="both", length=0, colors=MUTED, labelsize=9)
    ax.grid(axis="y", color=LINE, linewidth=0.8)
    for side in ax.spines.values():
        side.set_visible(False)
    ax.legend(frameon=False, fontsize=8.5, labelcolor=INK)
