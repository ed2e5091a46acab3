"""What /metrics says, and that whatever names a metric names one that exists."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from frontend.metrics import exposition, make_registry
from ipc.errors import ProtocolError
from ipc.histograms import FAMILIES, Distribution, Histograms, unpack_histograms
from ipc.schema import PeerStats
from tests.frontend.scripted_scheduler import stats

DOCS = Path(__file__).resolve().parents[2] / "docs"
# The parts of vLLM's own names that dashboards and routers read.
VLLM_NAMES = [
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "num_preemptions_total",
    "prompt_tokens_total",
    "generation_tokens_total",
    "request_success_total",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "time_to_first_token_seconds_bucket",
    "inter_token_latency_seconds_bucket",
    "request_time_per_output_token_seconds_bucket",
    "e2e_request_latency_seconds_bucket",
    "request_queue_time_seconds_bucket",
    "request_prefill_time_seconds_bucket",
    "request_decode_time_seconds_bucket",
    "request_inference_time_seconds_bucket",
    "request_prompt_tokens_bucket",
    "request_generation_tokens_bucket",
    "request_params_max_tokens_bucket",
    "iteration_tokens_total_bucket",
]


def samples(
    prefix: str = "engine", histograms: Histograms | None = None
) -> dict[str, list[tuple[dict[str, str], float]]]:
    """Sample name -> labels and values, as a Prometheus server parses them."""
    packed = (histograms or Histograms()).pack()
    peers = [PeerStats("http", 12, 3, 500, 0)]
    finished = {"stop": 3, "length": 4}
    last = stats(requests_finished=finished, blocks_total=10, blocks_free=4, histograms=packed, peers=peers)
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(exposition(make_registry(prefix, "m", lambda: {0: last})).decode()):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def test_names_are_those_of_vllm_behind_the_prefix() -> None:
    found = samples("vllm")
    assert {f"vllm:{name}" for name in VLLM_NAMES} <= found.keys()
    common = {"model_name": "m", "engine": "0"}.items()
    assert all(labels.items() >= common for entries in found.values() for labels, _ in entries)
    assert found["vllm:kv_cache_usage_perc"][0][1] == pytest.approx(0.6)


def test_a_histogram_is_cumulative_and_exact() -> None:
    histograms = Histograms()
    for value in (0.0005, 0.001, 0.0011, 3.0):
        histograms.observe(Distribution.INTER_TOKEN_S, value)
    histograms.observe(Distribution.INTER_TOKEN_S, 0.02, times=6)
    found = samples(histograms=histograms)
    name = "engine:inter_token_latency_seconds"
    buckets = {labels["le"]: value for labels, value in found[f"{name}_bucket"]}
    assert (buckets["0.001"], buckets["0.002"], buckets["0.02"], buckets["2.5"], buckets["+Inf"]) == (2, 3, 9, 9, 10)
    assert found[f"{name}_count"][0][1] == 10
    assert found[f"{name}_sum"][0][1] == pytest.approx(0.0005 + 0.001 + 0.0011 + 3 + 0.12)


def test_each_frontend_has_its_samples() -> None:
    peers = [PeerStats("http", 12, 3, 500, 0), PeerStats("client", 13, 1, 40, 7)]
    found = exposition(make_registry("engine", "m", lambda: {0: stats(peers=peers)})).decode()
    labels = 'engine="0",frontend="client-13",model_name="m"'
    for name, value in (("requests", "1.0"), ("tokens_total", "40.0"), ("backlog_rows", "7.0")):
        assert f"engine:frontend_{name}{{{labels}}} {value}" in found


def test_replicas_are_told_apart_by_their_label() -> None:
    registry = make_registry("engine", "m", lambda: {0: stats(running=3), 12: stats(running=4)})
    found = exposition(registry).decode()
    assert 'engine:num_requests_running{engine="0",model_name="m"} 3.0' in found
    assert 'engine:num_requests_running{engine="12",model_name="m"} 4.0' in found
    assert found.count("# TYPE engine:num_requests_running gauge") == 1


def test_a_table_of_another_version_is_a_protocol_error() -> None:
    with pytest.raises(ProtocolError):
        list(unpack_histograms(Histograms().pack()[:-8]))


def test_the_dashboard_and_the_docs_name_only_metrics_that_exist() -> None:
    found = samples()
    dashboard = json.loads((DOCS / "grafana.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    named = set(re.findall(r"engine:\w+", " ".join(expressions)))
    assert len(named) > 25
    assert named <= found.keys()
    section = (DOCS / "operations.md").read_text().partition("\n## Metrics\n")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    documented = {name for row in rows for name in re.findall(r"`(\w+)", row)}
    families = {re.sub(r"^engine:|_(total|bucket|count|sum)$", "", name) for name in found} | {"iteration_tokens_total"}
    assert documented == families - {"iteration_tokens"}
    assert {family.name for family in FAMILIES} <= documented
