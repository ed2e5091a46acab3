"""Prometheus metrics under vLLM's names, behind a prefix of the user's choice; replica N has the label engine="N".

Owned by one serving frontend. Everything comes from the schedulers' Stats, so every frontend reports the same. Must
never count anything itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from typing import Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from ipc.histograms import FAMILIES, unpack_histograms
from ipc.schema import Stats

_LABELS: Final = ("model_name", "engine")
_NS: Final = 1e-9

# name, help, value
_GAUGES: Final[tuple[tuple[str, str, Callable[[Stats], float]], ...]] = (
    ("num_requests_running", "Requests in the running batch.", lambda s: s.running),
    ("num_requests_waiting", "Requests waiting for a slot or blocks.", lambda s: s.waiting),
    ("kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", lambda s: 1 - s.blocks_free / max(s.blocks_total, 1)),
    ("inflight_steps", "Steps planned and not yet retired.", lambda s: s.inflight),
    ("frontends", "Frontends connected to the scheduler.", lambda s: s.frontends),
    ("longest_step_seconds", "Longest step on the device.", lambda s: s.longest_step_ns * _NS),
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
    """The last Stats of each replica as Prometheus families, made at each scrape."""

    def __init__(self, prefix: str, model_name: str, last_stats: Callable[[], Mapping[int, Stats]]) -> None:
        self._prefix = prefix
        self._model_name = model_name
        self._last_stats = last_stats

    def collect(self) -> Iterator[Metric]:
        replicas = [((self._model_name, str(number)), stats) for number, stats in self._last_stats().items()]
        if not replicas:
            return
        for name, text, value in _GAUGES:
            gauge = GaugeMetricFamily(self._prefix + name, text, labels=_LABELS)
            for labels, stats in replicas:
                gauge.add_metric(labels, float(value(stats)))
            yield gauge
        for name, text, value in _COUNTERS:
            counter = CounterMetricFamily(self._prefix + name, text, labels=_LABELS)
            for labels, stats in replicas:
                counter.add_metric(labels, float(value(stats)))
            yield counter
        finished = CounterMetricFamily(
            self._prefix + "request_success", "Requests finished, by reason.", labels=(*_LABELS, "finished_reason")
        )
        for labels, stats in replicas:
            for reason, count in stats.requests_finished.items():
                finished.add_metric((*labels, reason), float(count))
        yield finished
        yield from self._frontends(replicas)
        yield from self._histograms(replicas)

    def _frontends(self, replicas: list[tuple[tuple[str, str], Stats]]) -> Iterator[Metric]:
        """Of each client that is connected now; one that leaves takes its samples with it."""
        names = (*_LABELS, "frontend")
        requests = GaugeMetricFamily(self._prefix + "frontend_requests", "Open requests of a frontend.", labels=names)
        backlog = GaugeMetricFamily(
            self._prefix + "frontend_backlog_rows", "Tokens that a frontend has not taken yet.", labels=names
        )
        tokens = CounterMetricFamily(self._prefix + "frontend_tokens", "Tokens sent to a frontend.", labels=names)
        for labels, stats in replicas:
            for peer in stats.peers:
                which = (*labels, f"{peer.name}-{peer.pid}")
                requests.add_metric(which, float(peer.requests))
                backlog.add_metric(which, float(peer.backlog_rows))
                tokens.add_metric(which, float(peer.tokens))
        yield from (requests, backlog, tokens)

    def _histograms(self, replicas: list[tuple[tuple[str, str], Stats]]) -> Iterator[Metric]:
        made = [HistogramMetricFamily(self._prefix + family.name, family.text, labels=_LABELS) for family in FAMILIES]
        for labels, stats in replicas:
            for histogram, (family, total, counts) in zip(made, unpack_histograms(stats.histograms), strict=False):
                edges = [str(float(edge)) for edge in family.edges] + ["+Inf"]
                histogram.add_metric(labels, list(zip(edges, accumulate(counts), strict=True)), total)
        yield from (histogram for histogram in made if histogram.samples)


def make_registry(prefix: str, model_name: str, last_stats: Callable[[], Mapping[int, Stats]]) -> CollectorRegistry:
    """What a frontend shows at /metrics; `last_stats`, by replica, is asked at each scrape. `prefix`: without colon."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_EngineCollector(f"{prefix}:", model_name, last_stats))
    return registry


def exposition(registry: CollectorRegistry) -> bytes:
    """The text format that Prometheus scrapes."""
    return generate_latest(registry)
