"""Throughput of the whole engine: client -> scheduler -> executor -> client, at each pipeline depth.

    python scripts/bench_offline.py --model models/demo --batch 32 --prompt-len 64 --output-len 256 --depth 1,2,3
    python scripts/bench_offline.py --random-weights llama-3.1-8b --workload headline --depth 1,2 --json out.json

Starts `engine-launch` once per depth without an HTTP frontend and sends token-id prompts over ZMQ, all at once, end of
sequence off. Columns: output tokens per second of wall time; wall and device milliseconds a step; busy = device time
over device time plus bubbles (the device idle while there was work), by CUDA events at step boundaries (a monotonic
clock on the CPU); hidden = share of steps that were queued before the device ran dry; host microseconds a step in the
scheduler (plan, retire) and on the executor's launch thread (on the CPU that is the step itself).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from transformers import LlamaConfig, PreTrainedConfig, Qwen3Config

from frontend import AsyncClient
from frontend.request import GenerateParams
from ipc.schema import Stats

SHAPES: dict[str, PreTrainedConfig] = {
    "llama-3.1-8b": LlamaConfig(
        vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=131_072, rms_norm_eps=1e-5, eos_token_id=128_001,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0}, tie_word_embeddings=False,
    ),
    "qwen3-0.6b": Qwen3Config(
        vocab_size=151_936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=40_960, eos_token_id=151_645,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0}, tie_word_embeddings=True,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Workload:
    """Requests sent all at once: `batch` of one shape, or, with `ragged`, both lengths uniform in [low, high]."""

    batch: int
    prompt_len: int
    output_len: int
    ragged: tuple[int, int] | None = None

    def lengths(self) -> list[tuple[int, int]]:
        if self.ragged is None:
            return [(self.prompt_len, self.output_len)] * self.batch
        rng = np.random.default_rng(0)
        low, high = self.ragged
        return [(int(p), int(o)) for p, o in rng.integers(low, high + 1, (self.batch, 2))]


WORKLOADS: dict[str, Workload] = {
    "headline": Workload(32, 256, 8192),
    "trace": Workload(512, 0, 0, (100, 1024)),
    "small-1": Workload(1, 256, 512),
    "small-32": Workload(32, 256, 512),
    "small-256": Workload(256, 256, 512),
    "small-trace": Workload(256, 0, 0, (100, 1024)),
}


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    depth: int
    tokens: int
    wall_s: float
    tokens_per_s: float
    steps: int
    step_ms: float
    device_ms: float
    busy: float
    hidden: float
    plan_us: float
    retire_us: float
    launch_us: float
    ready_s: float


async def drive(endpoint: str, workload: Workload) -> tuple[int, float, Stats, Stats]:
    """Warm up with short outputs, then run the workload; returns tokens, seconds, and the counters around it."""
    rng = np.random.default_rng(0)
    async with AsyncClient(endpoint, name="bench") as client:
        vocab = client.card.vocab_size
        jobs = [(rng.integers(1, vocab, p).tolist(), o) for p, o in workload.lengths()]

        async def run(prompt: list[int], length: int) -> int:
            params = GenerateParams(max_tokens=length, temperature=0.0, ignore_eos=True)
            return (await client.generate(prompt, params)).completion_tokens

        await asyncio.gather(*(run(rng.integers(1, vocab, len(p)).tolist(), min(8, o)) for p, o in jobs))
        before = await client.stats()
        start = time.perf_counter()
        tokens = sum(await asyncio.gather(*(run(p, o) for p, o in jobs)))
        wall_s = time.perf_counter() - start
        return tokens, wall_s, before, await client.stats()


def summarize(depth: int, tokens: int, wall_s: float, before: Stats, after: Stats, ready_s: float) -> Row:
    def delta(name: str) -> int:
        value: int = getattr(after, name) - getattr(before, name)
        return value

    steps = max(1, delta("steps"))
    device_ns = delta("device_ns")
    return Row(
        depth=depth,
        tokens=tokens,
        wall_s=wall_s,
        tokens_per_s=tokens / wall_s,
        steps=steps,
        step_ms=wall_s / steps * 1e3,
        device_ms=device_ns / steps / 1e6,
        busy=device_ns / max(1, device_ns + delta("bubble_ns")),
        hidden=delta("hidden_steps") / steps,
        plan_us=delta("plan_ns") / steps / 1e3,
        retire_us=delta("retire_ns") / steps / 1e3,
        launch_us=delta("launch_ns") / steps / 1e3,
        ready_s=ready_s,
    )


def measure(model: list[str], depth: int, workload: Workload, flags: list[str]) -> Row:
    """Start an engine, run the workload through it, stop it."""
    command = [sys.executable, "-P", "-m", "frontend.launch", *model, "--frontends", "0", "--port", "0"]
    command += ["--pipeline-depth", str(depth), *flags]
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as engine:
        try:
            assert engine.stdout is not None
            line = engine.stdout.readline()
            ready_s = time.perf_counter() - start
            endpoint = re.search(r"(ipc|tcp)://\S+\.sock", line)
            if endpoint is None:
                raise SystemExit(f"the engine did not start: {line!r}")
            return summarize(depth, *asyncio.run(drive(endpoint.group(), workload)), ready_s)
        finally:
            engine.terminate()


def print_table(rows: list[Row]) -> None:
    print(
        f"{'depth':>5} {'tok/s':>9} {'wall s':>8} {'steps':>7} {'step ms':>8} {'device ms':>9} {'busy %':>7} "
        f"{'hidden %':>8} {'plan us':>8} {'retire us':>9} {'launch us':>9} {'ready s':>8}"
    )
    for r in rows:
        print(
            f"{r.depth:5d} {r.tokens_per_s:9.0f} {r.wall_s:8.2f} {r.steps:7d} {r.step_ms:8.3f} {r.device_ms:9.3f} "
            f"{r.busy * 100:7.2f} {r.hidden * 100:8.1f} {r.plan_us:8.0f} {r.retire_us:9.0f} {r.launch_us:9.0f} "
            f"{r.ready_s:8.1f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", help="folder or hub id")
    model.add_argument("--random-weights", choices=sorted(SHAPES), help="a known shape with random bfloat16 weights")
    parser.add_argument("--workload", choices=sorted(WORKLOADS), help="a named workload instead of the three lengths")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--prompt-len", type=int, default=256)
    parser.add_argument("--output-len", type=int, default=512)
    parser.add_argument("--depth", default="1,2")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    args, flags = parser.parse_known_args()
    workload = WORKLOADS.get(args.workload) or Workload(args.batch, args.prompt_len, args.output_len)
    longest = max(p + o for p, o in workload.lengths())
    with tempfile.TemporaryDirectory() as folder:
        if args.random_weights:
            SHAPES[args.random_weights].save_pretrained(folder)
            chosen = [folder, "--random-weights", "--dtype", "bfloat16", "--max-model-len", str(longest)]
        else:
            chosen = [args.model]
        chosen += ["--max-num-seqs", str(workload.batch)]
        rows = [measure(chosen, int(depth), workload, flags) for depth in args.depth.split(",")]
    print_table(rows)
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
