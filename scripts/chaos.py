"""Kill, stop and desert a serving engine for a while, and check that no stream was lost or changed.

    python scripts/chaos.py --seconds 300 --seed 1                                       # demo model, CPU, float32
    python scripts/chaos.py --seconds 60 --seed 1 --device cuda --random-weights llama-3.1-8b --streams 64
    python scripts/chaos.py --seconds 60 --seed 1 --data-parallel-size 2                 # replicas die as a whole, too
    python scripts/chaos.py --seconds 60 --seed 1 --only hang:frontend                   # one kind of fault

Real processes. Many streams at once (`chaos_streams.py`). Every few seconds a process of the engine is killed, or
stopped for a while, or stopped for longer than the engine bears (`chaos_engine.py`): each of that once, then at random.
Exits with 0 if

- every stream that its client kept open is what transformers says, or ended with an error that the faults explain;
- /debug/invariants held at every look, and nothing is owned at the end;
- file descriptors and threads are what they were, and nothing of the engine is left once the launcher is killed.

With random weights there is no reference: streams must be complete. On a GPU its memory must be free at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import httpx  # noqa: E402
from chaos_engine import FAULTS, REPLICA_FAULTS, Engine, gpu_memory_mib  # noqa: E402
from chaos_streams import Case, Chaos  # noqa: E402
from transformers import AutoTokenizer, LlamaConfig  # noqa: E402
from workloads import SHAPES  # noqa: E402

START_S = 300.0
DTYPES = {"cpu": "float32", "cuda": "bfloat16"}
TINY = LlamaConfig(
    vocab_size=1024, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=2048, eos_token_id=2,
)  # fmt: skip
RANDOM_SHAPES = {**SHAPES, "tiny": TINY}


def known_cases(model: Path, count: int, max_tokens: int) -> list[Case]:
    """Greedy and seeded requests with what transformers makes of them."""
    from tests.e2e.reference import greedy_cases, sampled_cases

    tokenizer = AutoTokenizer.from_pretrained(model)
    made = greedy_cases(count // 2, 120, max_tokens) + sampled_cases(count // 2, 120, max_tokens)
    return [
        Case(
            list(case.prompt),
            {"max_tokens": case.max_tokens, **case.sampling},
            list(case.output),
            tokenizer.decode(case.output, skip_special_tokens=True),
        )
        for case in made
    ]


def random_cases(rng: random.Random, count: int, max_tokens: int) -> list[Case]:
    """Requests of which only the length of the answer is known."""
    sampling = {"temperature": 0.7, "ignore_eos": True}
    return [
        Case(
            [rng.randrange(3, 1000) for _ in range(rng.randint(1, 200))],
            {**sampling, "seed": i, "max_tokens": rng.randint(max_tokens // 2, max_tokens)},
            None,
            "",
        )
        for i in range(count)
    ]


def prepare(args: argparse.Namespace, folder: Path) -> tuple[list[str], list[Case]]:
    """(flags of the model, requests)."""
    if args.random_weights is None:
        cases = known_cases(args.model, args.cases, args.max_tokens)
        return ["--model", str(args.model), "--dtype", DTYPES[args.device]], cases
    RANDOM_SHAPES[args.random_weights].save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(args.model / name, folder)
    flags = ["--model", str(folder), "--random-weights", "--max-model-len", "2048", "--dtype", DTYPES[args.device]]
    return flags, random_cases(random.Random(args.seed), args.cases, args.max_tokens)


async def warm_up(engine: Engine, case: Case) -> None:
    async with httpx.AsyncClient(timeout=START_S) as http:
        body = {"prompt": case.prompt, **case.sampling}
        for _ in range(4):  # both frontends, probably
            (await http.post(f"{engine.url}/completions", json=body)).raise_for_status()


def report(chaos: Chaos, engine: Engine, before: dict[str, tuple[int, int]]) -> None:
    print("faults: " + ", ".join(f"{what} {role} {n}" for (what, role), n in sorted(chaos.faults.counts.items())))
    print(f"streams: {', '.join(f'{end} {n}' for end, n in chaos.ends.most_common())}; {chaos.tokens} tokens")
    print(f"invariants held at {chaos.looks} looks; longest pause of a stream {chaos.longest_gap_s:.1f} s")
    engine.report()
    leaks = engine.leaks(before)
    after = engine.resources()
    for role, (fds, threads) in before.items():
        print(f"{role}: {fds} -> {after[role][0]} fds, {threads} -> {after[role][1]} threads")
    chaos.wrong += leaks


def run(args: argparse.Namespace, folder: Path) -> Chaos:
    shared_memory, gpu_mib = set(os.listdir("/dev/shm")), gpu_memory_mib() if args.device == "cuda" else -1
    (folder / "model").mkdir()
    model, cases = prepare(args, folder / "model")
    engine = Engine(model, args.device, folder, replicas=args.data_parallel_size, only=args.only)
    try:
        asyncio.run(warm_up(engine, cases[0]))
        print(
            f"serving after {engine.ready_s:.1f} s; {args.streams} streams at once for {args.seconds:g} s", flush=True
        )
        before, start_s = engine.resources(), time.monotonic()
        chaos = Chaos(engine, cases, random.Random(args.seed), seconds=args.seconds, streams=args.streams)
        asyncio.run(chaos.run())
        print(f"at rest after {time.monotonic() - start_s:.1f} s")
        report(chaos, engine, before)
        chaos.wrong += engine.end(shared_memory, gpu_mib)
        return chaos
    finally:
        if engine.process.poll() is None:
            engine.process.kill()
        if sys.exc_info()[0] is not None:
            print(engine.log.read_text(errors="replace")[-5000:], file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--streams", type=int, default=200, help="at once")
    parser.add_argument("--cases", type=int, default=40, help="different requests")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--data-parallel-size", type=int, default=1, metavar="M")
    parser.add_argument("--only", metavar="KIND:ROLE", help="no other faults than this, such as hang:frontend")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "demo")
    parser.add_argument("--random-weights", choices=sorted(RANDOM_SHAPES), help="a known shape instead of a model")
    args = parser.parse_args()
    if args.only and tuple(args.only.split(":")) not in FAULTS | REPLICA_FAULTS:
        parser.error(f"--only: one of {', '.join(':'.join(fault) for fault in FAULTS | REPLICA_FAULTS)}")
    if args.device == "cuda" and args.random_weights is None:
        parser.error("--device cuda: bfloat16 has no reference, so --random-weights is needed")
    with tempfile.TemporaryDirectory() as folder:
        chaos = run(args, Path(folder))
    for text in chaos.wrong[:20]:
        print(f"WRONG: {text[:1000]}")
    print(f"seed {args.seed}: {len(chaos.wrong)} wrong")
    return 1 if chaos.wrong or not chaos.ends["complete"] else 0


if __name__ == "__main__":
    sys.exit(main())
