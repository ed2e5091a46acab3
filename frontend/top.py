"""`engine-top`: an engine at a glance, live in a terminal, from its /metrics.

Reads over HTTP what any dashboard could, from this host or another, so it needs nothing of the engine but its URL.
Rates are those between two scrapes, latencies those of the last WINDOW_S seconds.
"""

from __future__ import annotations

import argparse
import http.client
import os
import sys
import time
import urllib.error
import urllib.request
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ipc.clock import now_s

WINDOW_S: Final = 30.0
MAX_FRONTENDS: Final = 8  # rows
WIDE_COLUMNS: Final = 112  # enough for two panels beside each other
HISTORY: Final = 60  # values of the curve
_ANCHOR: Final = ":num_requests_running"  # the metric that every engine of this family has, after its prefix
_SHARES: Final = {"kv_cache_usage_perc"}  # over replicas: the mean
_MOST: Final = {"frontends", "executor_epoch", "longest_step_seconds", "device_longest_bubble_seconds"}  # the most
_BARS: Final = " ▁▂▃▄▅▆▇█"
_TIMEOUT_S: Final = 5.0
_LATENCIES: Final = (
    ("time to first token", "time_to_first_token_seconds"),
    ("between tokens", "inter_token_latency_seconds"),
    ("whole request", "e2e_request_latency_seconds"),
    ("in the queue", "request_queue_time_seconds"),
)


class NoMetricsError(Exception):
    """The URL does not answer with the metrics of an engine; the text says what it does."""


@dataclass(frozen=True, slots=True)
class Scrape:
    """One answer of /metrics. Values are summed over labels, but for those that have no sum over replicas, histogram
    buckets (family -> (edge, count)), and what is told of each frontend and each replica.
    """

    at_s: float
    model: str
    values: dict[str, float]
    buckets: dict[str, list[tuple[float, float]]]
    frontends: dict[str, dict[str, float]]  # name and pid -> what is told of it, over all replicas
    replicas: dict[str, dict[str, float]]  # number -> what is told of it

    def get(self, name: str) -> float:
        return self.values.get(name, 0.0)


def parse(text: str, at_s: float) -> Scrape:
    """Raises NoMetricsError if these are not the metrics of an engine."""
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    anchor = next((s for s in samples if s.name.endswith(_ANCHOR)), None)
    if anchor is None:
        raise NoMetricsError(f"no metric ends in {_ANCHOR}: this is not an engine")
    prefix = anchor.name.removesuffix(_ANCHOR[1:])
    replicas: dict[str, dict[str, float]] = {}
    buckets: dict[str, dict[float, float]] = {}
    frontends: dict[str, dict[str, float]] = {}
    for sample in samples:
        name = sample.name.removeprefix(prefix)
        if name.endswith("_bucket"):
            family = buckets.setdefault(name.removesuffix("_bucket"), {})
            edge = float(sample.labels["le"])
            family[edge] = family.get(edge, 0.0) + sample.value
        elif "frontend" in sample.labels:
            told = frontends.setdefault(sample.labels["frontend"], {})
            told[name] = told.get(name, 0.0) + sample.value
        else:
            told = replicas.setdefault(sample.labels.get("engine", ""), {})
            told[name] = told.get(name, 0.0) + sample.value
    model = anchor.labels.get("model_name", "?")
    sorted_buckets = {name: sorted(edges.items()) for name, edges in buckets.items()}
    return Scrape(at_s, model, _total(list(replicas.values())), sorted_buckets, frontends, replicas)


def _total(replicas: Sequence[dict[str, float]]) -> dict[str, float]:
    """What is told of replicas, as of one engine."""
    values: dict[str, list[float]] = {}
    for told in replicas:
        for name, value in told.items():
            values.setdefault(name, []).append(value)
    return {
        name: max(found) if name in _MOST else sum(found) / (len(found) if name in _SHARES else 1)
        for name, found in values.items()
    }


def scrape(url: str) -> Scrape:
    """Ask the engine at `url`. Raises NoMetricsError."""
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as answer:
            text = answer.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        raise NoMetricsError(f"{url} answers {error.code} {error.reason}") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise NoMetricsError(f"{url} does not answer: {error}") from error
    try:
        return parse(text, now_s())
    except ValueError as error:
        raise NoMetricsError(f"{url} does not answer with metrics: {error}") from error


def quantile(old: Scrape, new: Scrape, family: str, q: float) -> float | None:
    """The q-quantile of what was observed between two scrapes, linear inside a bucket; None if nothing was."""
    edges = [edge for edge, _ in new.buckets.get(family, [])]
    before = dict(old.buckets.get(family, []))
    counts = [count - before.get(edge, 0.0) for edge, count in new.buckets.get(family, [])]  # cumulative
    if not counts or counts[-1] <= 0:
        return None
    rank = q * counts[-1]
    index = bisect_left(counts, rank)
    if edges[index] == float("inf"):
        return edges[index - 1]
    low, seen = (edges[index - 1], counts[index - 1]) if index else (0.0, 0.0)
    return low + (edges[index] - low) * (rank - seen) / (counts[index] - seen)


class History:
    """The scrapes of the last WINDOW_S seconds, at least two, and the curve of the throughput."""

    def __init__(self) -> None:
        self._scrapes: deque[Scrape] = deque()
        self.curve: deque[float] = deque(maxlen=HISTORY)

    def add(self, scrape: Scrape) -> None:
        if self._scrapes and scrape.get("steps_total") < self._scrapes[-1].get("steps_total"):
            self._scrapes.clear()  # another engine answers now: its counters began anew
        self._scrapes.append(scrape)
        while len(self._scrapes) > 2 and scrape.at_s - self._scrapes[0].at_s > WINDOW_S:
            self._scrapes.popleft()
        if len(self._scrapes) > 1:
            self.curve.append(self.rate("generation_tokens_total"))

    @property
    def last(self) -> Scrape:
        return self._scrapes[-1]

    @property
    def _pair(self) -> tuple[Scrape, Scrape]:
        return self._scrapes[-2] if len(self._scrapes) > 1 else self._scrapes[-1], self._scrapes[-1]

    def delta(self, name: str) -> float:
        old, new = self._pair
        return new.get(name) - old.get(name)

    def rate(self, name: str) -> float:
        old, new = self._pair
        return self.delta(name) / (new.at_s - old.at_s) if new.at_s > old.at_s else 0.0

    def frontend_rate(self, frontend: str, name: str) -> float:
        old, new = self._pair
        grown = new.frontends[frontend].get(name, 0.0) - old.frontends.get(frontend, {}).get(name, 0.0)
        return grown / (new.at_s - old.at_s) if new.at_s > old.at_s else 0.0

    def quantile(self, family: str, q: float) -> float | None:
        return quantile(self._scrapes[0], self._scrapes[-1], family, q)


def ratio(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value * 100:.1f} %"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _bar(share: float, width: int = 14) -> Text:
    full = round(max(0.0, min(1.0, share)) * width)
    color = "green" if share < 0.8 else "yellow" if share < 0.95 else "red"
    return Text("█" * full, style=color) + Text("░" * (width - full), style="bright_black")


def _curve(values: Sequence[float]) -> Text:
    top = max(values, default=0.0) or 1.0
    return Text("".join(_BARS[round(value / top * (len(_BARS) - 1))] for value in values), style="cyan")


def _grid(rows: Sequence[tuple[str, RenderableType]]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bright_black", no_wrap=True)
    table.add_column(no_wrap=True)
    for label, value in rows:
        table.add_row(label, value)
    return table


def _work(history: History) -> Table:
    last = history.last
    kv = last.get("kv_cache_usage_perc")
    hits = ratio(history.delta("prefix_cache_hits_total"), history.delta("prefix_cache_queries_total"))
    if hits is None:
        hits = ratio(last.get("prefix_cache_hits_total"), last.get("prefix_cache_queries_total"))
    waiting = int(last.get("num_requests_waiting"))
    return _grid(
        [
            ("output", Text(f"{history.rate('generation_tokens_total'):,.0f} tokens/s", style="bold green")),
            ("prompt", f"{history.rate('prompt_tokens_total'):,.0f} tokens/s"),
            ("running", str(int(last.get("num_requests_running")))),
            ("waiting", Text(str(waiting), style="yellow" if waiting else "")),
            ("finished", f"{history.rate('request_success_total'):,.1f} requests/s"),
            ("KV cache", _bar(kv) + Text(f" {kv * 100:.1f} %")),
            ("prefix hits", _percent(hits)),
            ("preempted", f"{last.get('num_preemptions_total'):,.0f}"),
            ("refused", f"{last.get('request_rejected_total'):,.0f}"),
        ]
    )


def _device(history: History) -> Table:
    last = history.last
    busy, idle = history.delta("device_busy_seconds_total"), history.delta("device_bubble_seconds_total")
    idle_share = ratio(idle, busy + idle)
    steps = history.delta("steps_total")

    def per_step_us(name: str) -> str:
        value = ratio(history.delta(name) * 1e6, steps)
        return "–" if value is None else f"{value:,.0f} µs"

    bad = "green" if idle_share is not None and idle_share < 0.02 else "yellow"
    dropped = last.get("dropped_messages_total")
    return _grid(
        [
            ("device idle", Text(_percent(idle_share), style="" if idle_share is None else f"bold {bad}")),
            ("step on device", _duration(ratio(busy, steps))),
            ("steps", f"{history.rate('steps_total'):,.0f} /s"),
            ("hidden steps", _percent(ratio(history.delta("hidden_steps_total"), steps))),
            ("in flight", str(int(last.get("inflight_steps")))),
            ("plan", per_step_us("scheduler_plan_seconds_total")),
            ("retire", per_step_us("scheduler_retire_seconds_total")),
            ("launch", per_step_us("executor_launch_seconds_total")),
            ("dropped", Text(f"{dropped:.0f}", style="bold red" if dropped else "")),
        ]
    )


def _latencies(history: History) -> Table:
    table = Table(box=None, padding=(0, 1), header_style="bright_black")
    table.add_column("", style="bright_black", no_wrap=True)
    for name in ("p50", "p90", "p99"):
        table.add_column(name, justify="right", no_wrap=True)
    for label, family in _LATENCIES:
        if family in history.last.buckets:
            table.add_row(label, *(_duration(history.quantile(family, q)) for q in (0.5, 0.9, 0.99)))
    return table


def _frontends(history: History) -> Table:
    table = Table(box=None, padding=(0, 1), header_style="bright_black")
    table.add_column("", no_wrap=True)
    for name in ("requests", "tokens/s", "behind"):
        table.add_column(name, justify="right", no_wrap=True)
    rows = sorted(history.last.frontends.items())
    for name, told in rows[:MAX_FRONTENDS]:
        backlog = int(told.get("frontend_backlog_rows", 0))
        table.add_row(
            name,
            f"{told.get('frontend_requests', 0):,.0f}",
            f"{history.frontend_rate(name, 'frontend_tokens_total'):,.0f}",
            Text(f"{backlog:,}", style="yellow" if backlog else ""),
        )
    if len(rows) > MAX_FRONTENDS:
        table.add_row(f"and {len(rows) - MAX_FRONTENDS} more")
    return table


def _replicas(history: History) -> Table:
    table = Table(box=None, padding=(0, 2), header_style="bright_black")
    table.add_column("replica", style="bright_black", no_wrap=True)
    for name in ("running", "waiting", "KV cache", "executor life"):
        table.add_column(name, justify="right", no_wrap=True)
    rows = sorted(history.last.replicas.items(), key=lambda row: (len(row[0]), row[0]))
    for number, told in rows[:MAX_FRONTENDS]:
        table.add_row(
            number,
            f"{told.get('num_requests_running', 0):,.0f}",
            f"{told.get('num_requests_waiting', 0):,.0f}",
            _percent(told.get("kv_cache_usage_perc")),
            f"{told.get('executor_epoch', 0) + 1:.0f}",
        )
    if len(rows) > MAX_FRONTENDS:
        table.add_row(f"and {len(rows) - MAX_FRONTENDS} more")
    return table


def _side_by_side(left: RenderableType, right: RenderableType) -> Table:
    table = Table.grid(expand=True, padding=(0, 1))
    table.add_column(ratio=1)
    table.add_column(ratio=1)
    table.add_row(left, right)
    return table


def frame(history: History, url: str, columns: int = WIDE_COLUMNS) -> RenderableType:
    """The whole picture, for a terminal of so many columns; what a low one cuts off is at the end."""
    last = history.last
    head = Text.assemble(
        (last.model, "bold"),
        ("  " + url, "bright_black"),
        (f"  clients {int(last.get('frontends'))}", "bright_black"),
        (f"  replicas {len(last.replicas)}", "bright_black"),
        (f"  executor life {int(last.get('executor_epoch')) + 1}", "bright_black"),
    )
    work = Panel(_work(history), title="work")
    device = Panel(_device(history), title="device and host, a step")
    latencies = Panel(_latencies(history), title=f"latency, last {WINDOW_S:.0f} s")
    frontends = Panel(_frontends(history), title="frontends and clients")
    top = max(history.curve, default=0.0)
    curve = Panel(_curve(history.curve), title=f"output tokens/s, at most {top:,.0f}")
    several = [Panel(_replicas(history), title="replicas")] if len(last.replicas) > 1 else []
    if columns < WIDE_COLUMNS:
        return Group(head, _side_by_side(work, device), latencies, curve, frontends, *several)
    return Group(head, _side_by_side(work, device), _side_by_side(latencies, frontends), *several, curve)


def metrics_url(url: str) -> str:
    """/metrics of the engine whose address, with or without /v1, the user gave."""
    if "://" not in url:
        url = f"http://{url}"
    return url.rstrip("/").removesuffix("/metrics").removesuffix("/v1") + "/metrics"


def watch(url: str, interval_s: float, console: Console) -> None:
    """Draw until interrupted; an engine that is away is waited for."""
    history = History()
    with Live(console=console, screen=console.is_terminal, auto_refresh=False) as live:
        while True:
            try:
                history.add(scrape(url))
                live.update(frame(history, url, console.width), refresh=True)
            except NoMetricsError as error:
                live.update(Panel(Text(str(error), style="red"), title="engine-top"), refresh=True)
            time.sleep(interval_s)


def once(url: str, interval_s: float, console: Console) -> None:
    """One frame: what happened within one interval. Raises NoMetricsError."""
    history = History()
    history.add(scrape(url))
    time.sleep(interval_s)
    history.add(scrape(url))
    console.print(frame(history, url, console.width))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of `engine-top`."""
    parser = argparse.ArgumentParser(prog="engine-top", description="Watch a running engine.")
    parser.add_argument("url", nargs="?", default="http://127.0.0.1:8000", help="of the engine (default: %(default)s)")
    parser.add_argument("--interval", type=float, default=1.0, metavar="S", help="between two looks (default: 1)")
    parser.add_argument("--once", action="store_true", help="print one frame and leave")
    options = parser.parse_args(sys.argv[1:] if argv is None else argv)
    if not options.interval > 0:
        parser.error(f"argument --interval: must be above 0, got {options.interval:g}")
    url, console = metrics_url(options.url), Console()
    try:
        (once if options.once else watch)(url, options.interval, console)
    except NoMetricsError as error:
        print(f"engine-top: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
