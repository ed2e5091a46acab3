"""The whole engine: client -> scheduler -> executor -> client, workloads by name, at each pipeline depth.

    python scripts/bench_offline.py --model models/demo --batch 32 --prompt-len 64 --output-len 256 --depth 1,2,3
    python scripts/bench_offline.py --random-weights llama-3.1-8b --workload headline,trace --depth 2 --json out.json
    python scripts/bench_offline.py --random-weights llama-3.1-8b --output-len 2048 --depth 2 --tensor-parallel-size 1,2

    python scripts/bench_offline.py --random-weights llama-3.1-8b --workload trace --depth 2 --data-parallel-size 1,2

Starts `engine-launch` once per depth, number of ranks and number of replicas, without an HTTP frontend, and sends
token-id prompts over ZMQ, all at once, end of sequence off. M replicas get M times the requests. Flags it does not know
go to `engine-launch`. Columns:

    tp, dp          ranks that share the model, replicas; lines at the end say how many times as fast more of them are;
                    what is said of steps is of one replica's, on average
    tok/s, wall s   output tokens, and the time from the first request sent to the last token received
    limit %         the least time that bytes and FLOPs allow so many GPUs (roofline.py), over the wall time
    step, device ms wall and device time over steps
    over %          wall time over the sum of device times, less 1: all that is not the device's own work
    busy %          device time over device time plus bubbles, by events at step boundaries
    hidden %        steps that were queued before the device ran dry
    bubbles         gaps of more than 20 us while there was work: count, milliseconds in all, longest in microseconds
    plan, retire    host microseconds a step in the scheduler
    launch us       on the executor's launch thread (on the CPU that thread also computes; that is left out)
    comp            kernels compiled or graphs captured in the run: must be 0

`--sampled` adds a run in which every row samples. `--profile FILE` traces steps in the middle of the first workload:
its own row is then slower than the engine is. The workloads `latency` and `burst` are procedures: see interruptions.py.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from bench_engine import Engine, running_engine
from interruptions import Disturbance, Latency, measure_burst, measure_latency
from roofline import H200_BANDWIDTH, H200_FLOPS, ModelCost, model_cost
from trace_report import print_report, read_trace, report
from transformers import AutoConfig
from workloads import SHAPES, WORKLOADS, Workload, greedy, sampled

from frontend import AsyncClient, GenerateParams
from ipc.schema import Stats

CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH", "XDG_CACHE_HOME")


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    workload: str
    sampling: str
    depth: int
    ranks: int
    replicas: int
    requests: int
    tokens: int
    wall_s: float
    tokens_per_s: float
    limit_s: float | None
    steps: int
    step_ms: float
    device_ms: float
    over_device: float
    busy: float
    hidden: float
    bubbles: int
    bubble_ms: float
    longest_bubble_us: float
    longest_step_ms: float
    plan_us: float
    retire_us: float
    launch_us: float
    compilations: int
    preemptions: int


@dataclass
class Results:
    """All that one invocation measured; the JSON file is this."""

    argv: list[str]
    starts: list[dict[str, Any]] = field(default_factory=list)  # depth, ranks, ready_s, phases, description
    rows: list[Row] = field(default_factory=list)
    latency: list[dict[str, Any]] = field(default_factory=list)
    burst: list[dict[str, Any]] = field(default_factory=list)
    profiles: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Limits:
    """What the roofline column is computed from."""

    cost: ModelCost
    bandwidth: float
    flops: float

    def of(self, workload: Workload) -> float:
        lengths = workload.lengths()
        return self.cost.limit_s(lengths, max(o for _, o in lengths) - 1, self.bandwidth, self.flops)


Params = Callable[[int, int], GenerateParams]  # (index, output length)


async def drive(client: AsyncClient, workload: Workload, params: Params, seed: int) -> tuple[int, float, Stats, Stats]:
    """Warm up with short outputs, then run the workload; returns tokens, seconds, and the counters around it."""
    vocab = client.card.vocab_size
    outputs = [o for _, o in workload.lengths()]
    warm, prompts = (workload.prompts(vocab, seed=2 * seed + part) for part in (0, 1))

    async def run(prompt: list[int], index: int, length: int) -> int:
        return (await client.generate(prompt, params(index, length))).completion_tokens

    await asyncio.gather(*(run(p, i, min(8, o)) for i, (p, o) in enumerate(zip(warm, outputs, strict=True))))
    before = await client.stats(restart_longest=True)
    start = time.perf_counter()
    counts = await asyncio.gather(*(run(p, i, o) for i, (p, o) in enumerate(zip(prompts, outputs, strict=True))))
    wall_s = time.perf_counter() - start
    return sum(counts), wall_s, before, await client.stats()


def summarize(
    workload: Workload, sampling: str, depth: int, ranks: int, tokens: int, wall_s: float, before: Stats, after: Stats,
    limits: Limits | None, replicas: int = 1,
) -> Row:  # fmt: skip
    """`workload`: what was run once for each replica."""

    def delta(name: str) -> int:
        value: int = getattr(after, name) - getattr(before, name)
        return value

    steps = max(1, delta("steps"))  # of all replicas
    device_ns = max(1, delta("device_ns"))
    return Row(
        workload=workload.name,
        sampling=sampling,
        depth=depth,
        ranks=ranks,
        replicas=replicas,
        requests=workload.batch * replicas,
        tokens=tokens,
        wall_s=wall_s,
        tokens_per_s=tokens / wall_s,
        limit_s=limits.of(workload) / ranks if limits else None,
        steps=steps,
        step_ms=wall_s / steps * replicas * 1e3,
        device_ms=device_ns / steps / 1e6,
        over_device=wall_s * replicas * 1e9 / device_ns - 1,
        busy=device_ns / (device_ns + delta("bubble_ns")),
        hidden=delta("hidden_steps") / steps,
        bubbles=delta("bubbles"),
        bubble_ms=delta("bubble_ns") / 1e6,
        longest_bubble_us=after.longest_bubble_ns / 1e3,
        longest_step_ms=after.longest_step_ns / 1e6,
        plan_us=delta("plan_ns") / steps / 1e3,
        retire_us=delta("retire_ns") / steps / 1e3,
        launch_us=delta("launch_ns") / steps / 1e3,
        compilations=delta("compilations"),
        preemptions=delta("preemptions"),
    )


HEADER = (
    f"{'workload':14} {'rows':8} {'depth':>5} {'tp':>3} {'dp':>3} {'tok/s':>8} {'wall s':>8} {'limit %':>7} "
    f"{'steps':>6} {'step ms':>8} {'device ms':>9} {'over %':>7} {'busy %':>7} {'hidden %':>8} {'bubbles':>8} "
    f"{'sum ms':>8} {'longest us':>10} {'plan us':>7} {'retire us':>9} {'launch us':>9} {'comp':>5}"
)


def format_row(r: Row) -> str:
    limit = f"{r.limit_s / r.wall_s * 100:7.1f}" if r.limit_s is not None else f"{'-':>7}"
    return (
        f"{r.workload:14} {r.sampling:8} {r.depth:5d} {r.ranks:3d} {r.replicas:3d} {r.tokens_per_s:8.0f} "
        f"{r.wall_s:8.2f} {limit} {r.steps:6d} "
        f"{r.step_ms:8.3f} {r.device_ms:9.3f} {r.over_device * 100:7.2f} {r.busy * 100:7.2f} {r.hidden * 100:8.1f} "
        f"{r.bubbles:8d} {r.bubble_ms:8.2f} {r.longest_bubble_us:10.0f} {r.plan_us:7.0f} {r.retire_us:9.0f} "
        f"{r.launch_us:9.0f} {r.compilations:5d}"
    )


def print_latency(depth: int, found: Latency) -> None:
    print(
        f"latency, depth {depth}: decode rows alone p50 {found.alone_p50_ms:.2f} p99 {found.alone_p99_ms:.2f} ms; "
        f"while {found.arriving_len} prompt tokens are read p50 {found.meanwhile_p50_ms:.2f} "
        f"p99 {found.meanwhile_p99_ms:.2f} max {found.meanwhile_max_ms:.2f} ms; "
        f"bound 2 x {found.decode_step_ms:.2f} + {found.chunk_ms:.2f} = "
        f"{found.bound_ms:.2f} ms: {'holds' if found.holds else 'MISSED'}; first token after "
        f"{found.first_token_ms:.0f} ms",
        flush=True,
    )


def print_burst(depth: int, found: list[Disturbance]) -> None:
    print(
        f"burst, depth {depth}{'':22} {'steps':>6} {'hidden %':>8} {'bubbles':>8} {'sum ms':>8} {'longest us':>10}",
        end="",
    )
    print(f" {'longest step ms':>15} {'comp':>5}")
    for d in found:
        print(
            f"  {d.what:34} {d.steps:6d} {d.hidden * 100:8.1f} {d.bubbles:8d} {d.bubble_ms:8.2f} "
            f"{d.longest_bubble_us:10.0f} {d.longest_step_ms:15.2f} {d.compilations:5d}",
            flush=True,
        )


async def measure(engine: Engine, depth: int, ranks: int, replicas: int, plan: list[Workload], with_sampled: bool,
                  limits: Limits | None, results: Results) -> None:  # fmt: skip
    """Every workload, once for each replica, through one engine; prints each as it ends."""
    choices: list[tuple[str, Params]] = [("greedy", lambda _, o: greedy(o))]
    if with_sampled:
        choices.append(("sampled", sampled))
    async with AsyncClient(engine.endpoint, name="bench") as client:
        seed = 0
        for workload in plan:
            if workload.kind == "latency":
                latency = await measure_latency(client, workload)
                print_latency(depth, latency)
                results.latency.append({"depth": depth, **asdict(latency), "holds": latency.holds})
                continue
            if workload.kind == "burst":
                burst = await measure_burst(client, workload)
                print_burst(depth, burst)
                results.burst += [{"depth": depth, **asdict(d)} for d in burst]
                continue
            print(HEADER)
            for name, params in choices:
                run = await drive(client, replace(workload, copies=replicas), params, seed)
                seed += 1
                row = summarize(workload, name, depth, ranks, *run, limits, replicas)
                results.rows.append(row)
                print(format_row(row), flush=True)
            if with_sampled:
                slow, fast = results.rows[-1].wall_s, results.rows[-2].wall_s
                print(f"{workload.name}: sampled takes {(slow / fast - 1) * 100:+.2f} % of greedy's time", flush=True)


def print_ratios(rows: list[Row]) -> None:
    """How many times as fast more ranks and replicas were, for what ran with several numbers of them."""
    for row in rows:
        alike = [r for r in rows if (r.workload, r.sampling, r.depth) == (row.workload, row.sampling, row.depth)]
        fewest = min(alike, key=lambda r: (r.ranks, r.replicas))
        if (row.ranks, row.replicas) > (fewest.ranks, fewest.replicas):
            ratio = row.tokens_per_s / fewest.tokens_per_s
            print(
                f"{row.workload}, {row.sampling}, depth {row.depth}: tp {row.ranks} dp {row.replicas} is {ratio:.3f}x "
                f"of tp {fewest.ranks} dp {fewest.replicas}; device time a step {fewest.device_ms:.3f} -> "
                f"{row.device_ms:.3f} ms",
                flush=True,
            )


def profile_env(path: Path, depth: int, plan: list[Workload], steps: int) -> tuple[Path, dict[str, str]]:
    """Trace `steps` steps from the middle of the first workload on; the file's name gets the depth."""
    middle = 24 + max(o for _, o in plan[0].lengths()) // 2  # warm-up and prefill take the first two dozen
    target = path.with_name(f"{path.stem}-depth{depth}{path.suffix or '.json'}").resolve()
    return target, {"ENGINE_PROFILE": f"{middle}:{steps}:{target}"}


def print_profile(target: Path, steps: int) -> dict[str, Any]:
    try:
        found = report(read_trace(target))
    except (OSError, ValueError) as error:
        print(f"no profile: {error}")
        return {}
    print_report(found, steps)
    return {"file": str(target), **asdict(found)}


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", help="folder or hub id")
    model.add_argument("--random-weights", choices=sorted(SHAPES), help="a known shape with random bfloat16 weights")
    parser.add_argument("--workload", help=f"some of {','.join(WORKLOADS)}; instead of the three lengths")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--prompt-len", type=int, default=256)
    parser.add_argument("--output-len", type=int, default=512)
    parser.add_argument("--depth", default="1,2")
    parser.add_argument("--data-parallel-size", default="1", metavar="N,M", help="one engine for each")
    parser.add_argument("--tensor-parallel-size", default="1", metavar="N,M", help="one engine for each")
    parser.add_argument("--sampled", action="store_true", help="run each workload a second time with sampling")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="Chrome trace of steps of the first workload")
    parser.add_argument("--profile-steps", type=int, default=50)
    parser.add_argument(
        "--cold", action="store_true", help="fresh compile caches: the first start is cold, later ones warm"
    )
    parser.add_argument("--bandwidth", type=float, default=H200_BANDWIDTH, help="bytes/s (default: %(default)g)")
    parser.add_argument("--peak-flops", type=float, default=H200_FLOPS, help="(default: %(default)g)")
    parser.add_argument(
        "--trace", type=Path, metavar="FILE", help="step traces, FILE-depth1.json …, to plot_timeline.py"
    )
    parser.add_argument("--json", type=Path, help="also write everything here")
    args, flags = parser.parse_known_args(argv)
    unknown = [name for name in (args.workload or "").split(",") if name and name not in WORKLOADS]
    if unknown:
        parser.error(f"no workload {unknown[0]!r}; there are {', '.join(WORKLOADS)}")
    return args, flags


def engine_flags(args: argparse.Namespace, plan: list[Workload], folder: str) -> list[str]:
    if not args.random_weights:
        chosen = ["--model", args.model]
    else:
        SHAPES[args.random_weights].save_pretrained(folder)
        longest = max(workload.max_seq_len for workload in plan)
        chosen = ["--model", folder, "--random-weights", "--dtype", "bfloat16", "--max-model-len", str(longest)]
    return [*chosen, "--max-num-seqs", str(max(workload.max_num_seqs for workload in plan))]


def read_limits(args: argparse.Namespace) -> Limits | None:
    """None for a model whose configuration is not at hand here."""
    try:
        config = SHAPES[args.random_weights] if args.random_weights else AutoConfig.from_pretrained(args.model)
        return Limits(model_cost(config), args.bandwidth, args.peak_flops)
    except Exception as error:
        print(f"no limit column: {error}", file=sys.stderr)
        return None


def main(argv: list[str] | None = None) -> None:
    args, flags = parse(argv)
    custom = Workload("custom", args.batch, args.prompt_len, args.output_len)
    plan = [WORKLOADS[name] for name in args.workload.split(",")] if args.workload else [custom]
    limits = read_limits(args)
    results = Results(argv=sys.argv[1:] if argv is None else argv)
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as caches:
        chosen = engine_flags(args, plan, folder)
        env = {name: f"{caches}/{name.lower()}" for name in CACHES} if args.cold else {}
        numbers = (args.depth, args.tensor_parallel_size, args.data_parallel_size)
        for depth, ranks, replicas in product(*(map(int, some.split(",")) for some in numbers)):
            target, extra = profile_env(args.profile, depth, plan, args.profile_steps) if args.profile else (None, {})
            traced = ["--trace", f"{args.trace.with_suffix('')}-depth{depth}.json"] if args.trace else []
            shape = ["--pipeline-depth", str(depth), "--tensor-parallel-size", str(ranks)]
            shape += ["--data-parallel-size", str(replicas)]
            with running_engine([*chosen, *shape, *flags, *traced], {**env, **extra}) as engine:
                asyncio.run(measure(engine, depth, ranks, replicas, plan, args.sampled, limits, results))
            start = {
                "depth": depth,
                "ranks": ranks,
                "replicas": replicas,
                "ready_s": engine.ready_s,
                "phases": engine.phases,
                "engine": engine.description,
            }
            results.starts.append(start)
            phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in engine.phases.items())
            print(f"depth {depth}: ready after {engine.ready_s:.1f} s ({phases})", flush=True)
            if target is not None:
                results.profiles.append(print_profile(target, args.profile_steps))
            if args.json:
                args.json.write_text(json.dumps(asdict(results), indent=1))
    print_ratios(results.rows)


if __name__ == "__main__":
    main()
