"""`engine-bench`: flags in, load out, a table, JSON and a report at the end."""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import math
import os
import sys
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import uvloop
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from frontend.bench.load import Answer, Target, ask_once, open_session, run_load
from frontend.bench.report import LATENCY_NAMES, Latency, Slo, Summary, headline, summarize, write_report
from frontend.bench.workloads import LOADS, Ask, with_arrivals
from ipc.clock import now_s


def _flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="engine-bench",
        description="Load any server of the OpenAI API. With --rate an open loop of Poisson arrivals, with "
        "--concurrency a closed loop of users; the default is a closed loop of 32.",
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="of the API (default: %(default)s)")
    parser.add_argument("--model", help="default: the first that the server lists")
    parser.add_argument("--api-key-env", default="OPENAI_API_KEY", metavar="NAME", help="variable with the key")
    parser.add_argument("--workload", choices=sorted(LOADS), default="random")
    parser.add_argument("--input-len", type=int, default=256, metavar="WORDS", help="mean of prompts (default: 256)")
    parser.add_argument("--output-len", type=int, default=128, metavar="TOKENS", help="mean of answers (default: 128)")
    parser.add_argument("--requests", type=int, default=200, metavar="N", help="default: 200")
    loop = parser.add_mutually_exclusive_group()
    loop.add_argument("--rate", type=float, metavar="R", help="requests a second, on average; inf: all at once")
    loop.add_argument("--concurrency", type=int, metavar="N", help="users, each with one request at a time")
    parser.add_argument("--chat", action="store_true", help="chat completions instead of completions")
    parser.add_argument("--allow-eos", action="store_true", help="let answers end early (default: ignore_eos is sent)")
    parser.add_argument("--extra-body", type=json.loads, default={}, metavar="JSON", help="more fields of each request")
    parser.add_argument("--ttft", type=float, metavar="MS", help="limit for goodput")
    parser.add_argument("--tpot", type=float, metavar="MS", help="limit for goodput")
    parser.add_argument("--e2e", type=float, metavar="MS", help="limit for goodput")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="S", help="of one request (default: 600)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write a picture (.png) or a page (.html)")
    return parser


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    for name in ("input_len", "output_len", "requests", "timeout", "rate", "concurrency"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            parser.error(f"argument --{name.replace('_', '-')}: must be above 0, got {value:g}")
    if not isinstance(options.extra_body, dict):
        parser.error("argument --extra-body: expected a JSON object")
    if options.json is not None:
        _check_writable(parser, "--json", options.json)
    if options.report is not None:
        if options.report.suffix not in (".png", ".html"):
            parser.error(f"argument --report: expected a name that ends in .png or .html, got {options.report}")
        if importlib.util.find_spec("matplotlib") is None:
            parser.error("argument --report: needs matplotlib: pip install 'tandem-engine[plot]'")
        _check_writable(parser, "--report", options.report)


def _check_writable(parser: argparse.ArgumentParser, flag: str, path: Path) -> None:
    """Known before the load rather than after it; a file that is there keeps its content, none is left behind."""
    is_new = not os.path.lexists(path)
    try:
        path.open("ab").close()
    except OSError as error:
        parser.error(f"argument {flag}: cannot write {path}: {error.strerror}")
    if is_new:
        path.unlink()


def _first_model(url: str, api_key: str | None) -> str:
    request = urllib.request.Request(f"{url}/models")
    if api_key:
        request.add_header("Authorization", f"Bearer {api_key}")
    with urllib.request.urlopen(request, timeout=10) as answer:
        return str(json.load(answer)["data"][0]["id"])


def _target(options: argparse.Namespace) -> Target:
    url, api_key = options.url.rstrip("/"), os.environ.get(options.api_key_env)
    if not urllib.parse.urlsplit(url).path:
        url += "/v1"  # a server's address alone is as good
    extra: dict[str, Any] = {} if options.allow_eos else {"ignore_eos": True}
    model = options.model or _first_model(url, api_key)
    return Target(url, model, api_key, options.chat, {**extra, **options.extra_body})


async def _probe(target: Target, ask: Ask, timeout_s: float) -> Answer:
    """One request before all others: a wrong URL or model is known at once, and the server is warm."""
    async with open_session(target, timeout_s) as session:
        return await ask_once(session, target, Ask(ask.prompt, min(ask.max_tokens, 4)), now_s())


def _run(options: argparse.Namespace, target: Target, console: Console) -> tuple[Summary, list[Answer]] | None:
    rng = np.random.default_rng(options.seed)
    asks = LOADS[options.workload](rng, options.requests, options.input_len, options.output_len)
    concurrency = None if options.rate is not None else (options.concurrency or 32)
    load = f"{concurrency} users"
    if options.rate is not None:
        asks = with_arrivals(asks, options.rate, rng)
        load = f"{options.rate:g} requests/s" if math.isfinite(options.rate) else "all at once"
    probe = uvloop.run(_probe(target, asks[0], options.timeout))
    if probe.error is not None:
        print(f"engine-bench: {target.path}: {probe.error}", file=sys.stderr)
        return None
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[tokens]:,} tokens, {task.fields[failed]} failed"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(f"{options.workload}, {load}", total=len(asks), tokens=0, failed=0)
        counts = {"tokens": 0, "failed": 0}

        def on_answer(answer: Answer) -> None:
            counts["tokens"] += answer.output_tokens
            counts["failed"] += answer.error is not None
            progress.update(task, advance=1, tokens=counts["tokens"], failed=counts["failed"])

        answers, duration_s = uvloop.run(
            run_load(target, asks, concurrency=concurrency, timeout_s=options.timeout, on_answer=on_answer)
        )
    slo = Slo(options.ttft, options.tpot, options.e2e)
    return summarize(answers, duration_s, workload=options.workload, load=load, slo=slo), answers


def _print(summary: Summary, console: Console) -> None:
    numbers = Table.grid(padding=(0, 2))
    for label, value in headline(summary):
        numbers.add_row(f"[bright_black]{label}", value)
    table = Table(box=None, padding=(0, 2), header_style="bright_black")
    table.add_column("milliseconds", style="bright_black")
    for name in Latency.__struct_fields__:
        table.add_column(name, justify="right")
    for field, label in LATENCY_NAMES:
        latency: Latency | None = getattr(summary, field)
        if latency is not None:
            table.add_row(label, *(f"{getattr(latency, name):,.1f}" for name in Latency.__struct_fields__))
    console.print(numbers)
    console.print(table)
    for text, count in summary.errors.items():
        console.print(f"{count} x {text}", style="red", markup=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of `engine-bench`: 0 if every request succeeded, else 1."""
    parser = _flags()
    options = parser.parse_args(sys.argv[1:] if argv is None else argv)
    _check(parser, options)
    console = Console()
    try:
        target = _target(options)
        found = _run(options, target, console)
    except (OSError, KeyError, IndexError, ValueError) as error:
        print(f"engine-bench: {options.url}: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        return 130
    if found is None:
        return 1
    summary, answers = found
    _print(summary, console)
    if options.json:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(summary), indent=1))
    if options.report:
        write_report(options.report, summary, answers)
    return 1 if summary.failed else 0


if __name__ == "__main__":
    sys.exit(main())
