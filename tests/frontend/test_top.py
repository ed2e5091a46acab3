"""engine-top: what it reads out of /metrics, and what it says when there is nothing to read."""

from __future__ import annotations

import io
import math
import re
from urllib.parse import quote

import pytest
from rich.console import Console

from frontend.top import History, NoMetricsError, Scrape, frame, main, metrics_url, parse, quantile, scrape

TEXT = """\
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{{model_name="demo",engine="0"}} 3.0
# TYPE vllm:generation_tokens counter
vllm:generation_tokens_total{{model_name="demo",engine="0"}} {tokens}
# TYPE vllm:steps counter
vllm:steps_total{{model_name="demo",engine="0"}} {steps}
# TYPE vllm:frontend_tokens counter
vllm:frontend_tokens_total{{frontend="http-7",model_name="demo",engine="0"}} {tokens}
vllm:frontend_tokens_total{{frontend="http-7",model_name="demo",engine="1"}} {tokens}
# TYPE vllm:time_to_first_token_seconds histogram
vllm:time_to_first_token_seconds_bucket{{le="0.1",model_name="demo",engine="0"}} {fast}
vllm:time_to_first_token_seconds_bucket{{le="0.2",model_name="demo",engine="0"}} {slow}
vllm:time_to_first_token_seconds_bucket{{le="+Inf",model_name="demo",engine="0"}} {slow}
vllm:time_to_first_token_seconds_sum{{model_name="demo",engine="0"}} 1.0
vllm:time_to_first_token_seconds_count{{model_name="demo",engine="0"}} {slow}
"""


def at(seconds: float, **values: float) -> Scrape:
    return parse(TEXT.format(**{"tokens": 0, "steps": 0, "fast": 0, "slow": 0, **values}), seconds)


def test_any_prefix_is_understood() -> None:
    scrape = at(1.0, tokens=50)
    assert scrape.model == "demo"
    assert scrape.get("num_requests_running") == 3
    assert scrape.get("generation_tokens_total") == 50
    assert scrape.buckets["time_to_first_token_seconds"][-1] == (math.inf, 0.0)


def test_quantiles_are_those_between_two_scrapes() -> None:
    old, new = at(1.0, fast=100, slow=100), at(2.0, fast=105, slow=110)
    assert quantile(old, new, "time_to_first_token_seconds", 0.5) == pytest.approx(0.1)
    assert quantile(old, new, "time_to_first_token_seconds", 0.9) == pytest.approx(0.18)
    assert quantile(new, new, "time_to_first_token_seconds", 0.5) is None
    assert quantile(old, new, "nothing", 0.5) is None


def test_rates_and_a_restart_of_the_engine() -> None:
    history = History()
    history.add(at(1.0, tokens=100, steps=10))
    history.add(at(3.0, tokens=700, steps=30))
    assert history.rate("generation_tokens_total") == 300
    history.add(at(4.0, tokens=5, steps=1))
    assert history.rate("generation_tokens_total") == 0
    assert history.curve[-1] == 300


def test_a_frame_shows_what_is_there_and_dashes_what_is_not() -> None:
    history = History()
    history.add(at(1.0))
    history.add(at(2.0, tokens=1234, fast=1, slow=2))
    console = Console(width=120, record=True, file=None, force_terminal=False)
    with console.capture() as capture:
        console.print(frame(history, "http://engine/metrics"))
    shown = capture.get()
    assert "1,234 tokens/s" in shown
    assert "100.0 ms" in shown  # the median of one fast and one slow request
    assert re.search(r"device idle +–", shown)
    assert re.search(r"http-7 +0 +2,468", shown)  # its tokens of both replicas


def test_nothing_is_cut_in_a_terminal_of_80_columns() -> None:
    history = History()
    history.add(at(1.0))
    history.add(at(2.0, tokens=1234, fast=1, slow=2))
    console = Console(width=80)
    with console.capture() as capture:
        console.print(frame(history, "http://127.0.0.1:8000/metrics", 80))
    assert "…" not in capture.get()


def test_what_is_no_engine_is_said_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(NoMetricsError, match="not an engine"):
        parse("# TYPE up gauge\nup 1\n", 0.0)
    for other in ("<!doctype html>", "{}"):
        with pytest.raises(NoMetricsError):
            scrape(f"data:text/plain,{quote(other)}")
    assert main(["127.0.0.1:1", "--once"]) == 1
    assert "does not answer" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["host:80", "http://host:80/v1", "http://host:80/v1/", "http://host:80/metrics"])
def test_the_url_may_be_given_in_any_form(given: str) -> None:
    assert metrics_url(given) == "http://host:80/metrics"


def test_replicas_add_up_but_for_what_has_no_sum_and_are_shown_one_by_one() -> None:
    told = {
        "num_requests_running": (3, 4),
        "kv_cache_usage_perc": (0.2, 0.6),
        "frontends": (2, 2),
        "steps_total": (5, 6),
    }
    lines = [f'e:{name}{{engine="{i}"}} {value}' for name, pair in told.items() for i, value in enumerate(pair)]
    scrape = parse("\n".join(lines) + "\n", 1.0)
    assert scrape.values == {
        "num_requests_running": 7,
        "kv_cache_usage_perc": pytest.approx(0.4),
        "frontends": 2,
        "steps_total": 11,
    }
    history = History()
    history.add(scrape)
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(frame(history, "url"))
    text = console.export_text()
    assert "replicas 2" in text
    assert re.search(r"0 +3 +0 +20.0 % +1", text)
    assert re.search(r"1 +4 +0 +60.0 % +1", text)
