"""engine-bench, engine-top and the step trace on one running engine, as a user runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import httpx

from tests.e2e.engine import running_engine

BENCH = "from frontend.bench.cli import main; raise SystemExit(main())"
TOP = "from frontend.top import main; raise SystemExit(main())"
LIMIT_S = 120
LANES = {
    "scheduler": {"loop"},
    "executor": {"launch thread", "retire thread"},
    "device": {"h2d stream", "compute stream", "d2h stream"},
    "frontend 1": {"event loop"},
}


def tool(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command, environment = [sys.executable, "-P", "-c", code, *arguments], {**os.environ, "COLUMNS": "120"}
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, env=environment, check=False)


def lanes(trace: bytes) -> dict[str, set[str]]:
    events = json.loads(trace)["traceEvents"]
    processes = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    found: dict[str, set[str]] = {}
    for event in events:
        if event["name"] == "thread_name":
            found.setdefault(processes[event["pid"]], set()).add(event["args"]["name"])
    return found


def test_bench_top_and_trace(tmp_path: Path) -> None:
    numbers, report, trace = tmp_path / "bench.json", tmp_path / "bench.html", tmp_path / "trace.json"
    flags = ("--device", "cpu", "--enable-debug-endpoints", "--trace", str(trace), "--num-gpu-blocks-override", "2000")
    with running_engine(*flags) as engine:
        recorded: list[bytes] = []

        def record() -> None:
            request = urllib.request.Request(f"{engine.root}/debug/trace?seconds=4", method="POST")
            with urllib.request.urlopen(request, timeout=LIMIT_S) as answer:
                recorded.append(answer.read())

        thread = threading.Thread(target=record)
        thread.start()
        load = ("--workload", "prefix", "--requests", "12", "--input-len", "40", "--output-len", "12")
        files = ("--json", str(numbers), "--report", str(report))
        done = tool(BENCH, "--url", engine.url, *load, "--concurrency", "4", *files)
        assert done.returncode == 0, done.stderr
        assert "goodput" in done.stdout
        summary = json.loads(numbers.read_bytes())
        assert (summary["requests"], summary["failed"], summary["output_tokens"]) == (12, 0, 144)
        assert summary["ttft_ms"]["p50"] <= summary["e2e_ms"]["p99"]
        assert "data:image/png;base64" in report.read_text()

        wrong = tool(BENCH, "--url", engine.root, "--model", "nobody", "--requests", "1")
        assert wrong.returncode == 1
        assert "nobody" in wrong.stderr

        thread.join(LIMIT_S)
        assert lanes(recorded[0]) == LANES
        shown = tool(TOP, engine.url, "--once", "--interval", "0.2")
        assert shown.returncode == 0, shown.stderr
        for text in ("demo", "tokens/s", "KV cache", "prefix hits", "device idle", "time to first token", "p99"):
            assert text in shown.stdout
    assert lanes(trace.read_bytes()) == LANES
    steps = [e["args"]["step"] for e in json.loads(trace.read_bytes())["traceEvents"] if e["name"] == "compute"]
    assert steps == sorted(set(steps))


def test_every_process_logs_json_if_asked(tmp_path: Path) -> None:
    log, trace = tmp_path / "log", tmp_path / "trace.json"
    flags = ("--log-format", "json", "--log-level", "debug", "--device", "cpu", "--trace", str(trace))
    with log.open("w") as stderr, running_engine(*flags, stderr=stderr) as engine:
        asked = {"prompt": "x", "max_tokens": 2, "no_such_field": 1}
        assert httpx.post(f"{engine.url}/completions", json=asked, timeout=60).status_code == 200
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert {line["process"] for line in lines} >= {"engine-launch", "executor", "frontend"}
    assert any("no_such_field" in line["message"] for line in lines)
    assert any(line["message"] == f"trace written to {trace}" for line in lines)
