"""Prometheus metrics under vLLM's names with the prefix `engine:`.

Owned by one serving frontend. Counters and gauges of the engine come from the scheduler's Stats, so every frontend
reports the same; latencies are those of the requests this frontend served.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ipc.clock import now_s
from ipc.schema import Stats

PREFIX: Final = "engine:"
_LABELS: Final = ("model_name", "engine")
_NS: Final = 1e-9
_SHORT_S: Final = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2.5)
_LONG_S: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600)
_TOKENS: Final = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)

# name, help, value
_GAUGES: Final[tuple[tuple[str, str, Callable[[Stats], float]], ...]] = (
    ("num_requests_running", "Requests in the running batch.", lambda s: s.running),
    ("num_requests_waiting", "Requests waiting for a slot or blocks.", lambda s: s.waiting),
    ("kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", lambda s: 1 - s.blocks_free / max(s.blocks_total, 1)),
    ("inflight_steps", "Steps planned and not yet retired.", lambda s: s.inflight),
    ("frontends", "Frontends connected to the scheduler.", lambda s: s.frontends),
    ("executor_epoch", "Lives of the executor before this one.", lambda s: s.epoch),
    (
        "device_longest_bubble_seconds",
        "Longest wait of the device while there was work.",
        lambda s: s.longest_bubble_ns * _NS,
    ),
)
_COUNTERS: Final[tuple[tuple[str, str, Callable[[Stats], float]], ...]] = (
    ("num_preemptions", "Requests preempted for lack of KV blocks.", lambda s: s.preemptions),
    ("prompt_tokens", "Prompt tokens processed.", lambda s: s.prompt_tokens),
    ("generation_tokens", "Tokens generated.", lambda s: s.generation_tokens),
    ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", lambda s: s.prefix_query_tokens),
    ("prefix_cache_hits", "Prompt tokens found in the prefix cache.", lambda s: s.prefix_hit_tokens),
    ("request_rejected", "Requests refused by the scheduler.", lambda s: s.requests_rejected),
    ("steps", "Steps run.", lambda s: s.steps),
    ("hidden_steps", "Steps queued before the device ran dry.", lambda s: s.hidden_steps),
    ("overshoot_rows", "Rows run for requests that had ended.", lambda s: s.overshoot_rows),
    ("device_busy_seconds", "Time the device computed.", lambda s: s.device_ns * _NS),
    ("device_bubble_seconds", "Time the device waited while there was work.", lambda s: s.bubble_ns * _NS),
    ("device_bubbles", "Times the device waited while there was work.", lambda s: s.bubbles),
    ("scheduler_plan_seconds", "Host time spent planning.", lambda s: s.plan_ns * _NS),
    ("scheduler_retire_seconds", "Host time spent on results.", lambda s: s.retire_ns * _NS),
    ("executor_launch_seconds", "Host time spent launching.", lambda s: s.launch_ns * _NS),
    (
        "compilations_while_serving",
        "Kernels compiled, graphs captured after the start; stays 0.",
        lambda s: s.compilations,
    ),
    ("dropped_messages", "Messages undecodable or unroutable; stays 0.", lambda s: s.dropped_messages),
)


class _EngineCollector(Collector):
    """The last Stats message as Prometheus families, made at each scrape."""

    def __init__(self, model_name: str, last_stats: Callable[[], Stats | None]) -> None:
        self._values = (model_name, "0")
        self._last_stats = last_stats

    def collect(self) -> Iterator[Metric]:
        stats = self._last_stats()
        if stats is None:
            return
        for name, text, value in _GAUGES:
            gauge = GaugeMetricFamily(PREFIX + name, text, labels=_LABELS)
            gauge.add_metric(self._values, float(value(stats)))
            yield gauge
        for name, text, value in _COUNTERS:
            counter = CounterMetricFamily(PREFIX + name, text, labels=_LABELS)
            counter.add_metric(self._values, float(value(stats)))
            yield counter
        finished = CounterMetricFamily(
            PREFIX + "request_success", "Requests finished, by reason.", labels=(*_LABELS, "finished_reason")
        )
        for reason, count in stats.requests_finished.items():
            finished.add_metric((*self._values, reason), float(count))
        yield finished


class FrontendMetrics:
    """All that one frontend reports at /metrics."""

    def __init__(self, model_name: str, last_stats: Callable[[], Stats | None]) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_EngineCollector(model_name, last_stats))

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            family = Histogram(PREFIX + name, text, _LABELS, registry=self._registry, buckets=buckets)
            return family.labels(model_name, "0")

        self.first_token = histogram("time_to_first_token_seconds", "From arrival to the first token.", _LONG_S)
        self.inter_token = histogram("inter_token_latency_seconds", "Between tokens of a choice.", _SHORT_S)
        self.whole = histogram("e2e_request_latency_seconds", "From arrival to the last token.", _LONG_S)
        self.prompt_tokens = histogram("request_prompt_tokens", "Prompt tokens of a request.", _TOKENS)
        self.generation_tokens = histogram("request_generation_tokens", "Tokens generated for a request.", _TOKENS)

    def exposition(self) -> bytes:
        """The text format that Prometheus scrapes."""
        return generate_latest(self._registry)


class RequestTimer:
    """Latencies of one request: `tokens` at each part of a stream, `done` at the end."""

    def __init__(self, metrics: FrontendMetrics, prompt_tokens: int) -> None:
        self._metrics = metrics
        self._prompt_tokens = prompt_tokens
        self._arrived_s = now_s()
        self._last_s: dict[int, float] = {}  # of each choice

    def tokens(self, index: int, count: int) -> None:
        """Choice `index` got `count` tokens; those of one part share its delay evenly."""
        if count == 0:
            return
        now = now_s()
        if not self._last_s:
            self._metrics.first_token.observe(now - self._arrived_s)
        last = self._last_s.get(index)
        for _ in range(count if last is not None else 0):
            self._metrics.inter_token.observe((now - (last or now)) / count)
        self._last_s[index] = now

    def done(self, generation_tokens: int) -> None:
        self._metrics.whole.observe(now_s() - self._arrived_s)
        self._metrics.prompt_tokens.observe(self._prompt_tokens)
        self._metrics.generation_tokens.observe(generation_tokens)
