"""The same workload through other engines and ours, one after the other, with the ratio.

    python scripts/bench_peers.py --random-weights llama-3.1-8b --workload headline
    python scripts/bench_peers.py --model models/demo --batch 8 --prompt-len 32 --output-len 64     # on a CPU

Peers: `transformers`, continuous batching with its best settings (asynchronous, CUDA graphs, compiled, FlashAttention 3
where it is installed); `vllm`, if it can be imported; `tandem`, this engine at `--depth`. Each runs in a process of its
own, so that none finds the GPU's memory taken. Greedy, end of sequence off, all requests at once, random token ids; a
run with short outputs comes before the one that is timed. Requests of different lengths end by their own max_tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from workloads import SHAPES, WORKLOADS, Workload

PEERS = ("transformers", "vllm", "tandem")
MARK = "bench_peers result: "
LIMIT_S = 1800.0


@dataclass(frozen=True)
class Outcome:
    """One engine's run."""

    peer: str
    version: str
    tokens: int
    wall_s: float
    settings: str

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.wall_s


@dataclass(frozen=True)
class Job:
    """What a child process is told."""

    peer: str
    folder: str  # with config.json; weights only if not `random_weights`
    random_weights: bool
    workload: Workload
    depth: int
    device: str  # "cuda" or "cpu"


def run_tandem(job: Job) -> Outcome:
    """Through the client, as bench_offline does."""
    from bench_engine import running_engine
    from bench_offline import drive
    from workloads import greedy

    from frontend import AsyncClient

    flags = ["--model", job.folder, "--pipeline-depth", str(job.depth), "--max-num-seqs", str(job.workload.batch)]
    flags += ["--device", job.device]
    if job.random_weights:
        flags += ["--random-weights", "--dtype", "bfloat16", "--max-model-len", str(job.workload.max_seq_len)]

    async def measure(endpoint: str) -> tuple[int, float]:
        async with AsyncClient(endpoint, name="bench") as client:
            tokens, wall_s, _, _ = await drive(client, job.workload, lambda _, o: greedy(o), seed=0)
            return tokens, wall_s

    with running_engine(flags) as engine:
        tokens, wall_s = asyncio.run(measure(engine.endpoint))
    return Outcome("tandem", engine.description.partition(",")[0], tokens, wall_s, f"depth {job.depth}")


def flash_attention_3() -> bool:
    """transformers can take it: from the package, or through `kernels` from the hub's cache."""
    from transformers.utils import is_flash_attn_3_available

    return bool(is_flash_attn_3_available())


def run_transformers(job: Job) -> Outcome:
    """`ContinuousBatchingManager` with the settings that measured best: asynchronous, CUDA graphs, compile level 1."""
    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
    from transformers.generation import ContinuousBatchingConfig

    cuda = job.device == "cuda"
    attention = "flash_attention_3" if cuda and flash_attention_3() else "sdpa"
    torch.manual_seed(0)
    if job.random_weights:
        config = AutoConfig.from_pretrained(job.folder)
        with torch.device(job.device):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention)
    else:
        model = AutoModelForCausalLM.from_pretrained(job.folder, dtype="auto", attn_implementation=attention)
        model = model.to(job.device)
    model.eval()
    prompts = job.workload.prompts(model.config.get_text_config().vocab_size, seed=1)
    warm = job.workload.prompts(model.config.get_text_config().vocab_size, seed=0)
    outputs = [o for _, o in job.workload.lengths()]
    generation = GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=max(outputs))
    options: dict[str, Any] = {"max_requests_per_batch": len(prompts), "allow_block_sharing": False}
    if cuda:
        options |= {"use_async_batching": True, "use_cuda_graph": True, "default_compile_level": 1}
    else:
        longest = sum(-(-(p + o) // 256) + 1 for p, o in job.workload.lengths())
        options |= {"num_blocks": max(16, 2 * longest), "max_batch_tokens": 2048}
    manager = model.init_continuous_batching(
        generation_config=generation, continuous_batching_config=ContinuousBatchingConfig(**options)
    )
    if cuda:
        manager.warmup()
    manager.start()
    try:
        collect(manager, warm, [min(8, o) for o in outputs])
        tokens, wall_s = collect(manager, prompts, outputs)
    finally:
        manager.stop(block=True)
    settings = f"{attention}, {', '.join(f'{k}={v}' for k, v in options.items())}"
    return Outcome("transformers", transformers.__version__, tokens, wall_s, settings)


def collect(manager: Any, prompts: list[list[int]], outputs: list[int]) -> tuple[int, float]:
    """(tokens, seconds) of one run. Raises RuntimeError if a request fails or the manager dies."""
    start = time.perf_counter()
    for prompt, length in zip(prompts, outputs, strict=True):
        manager.add_request(prompt, max_new_tokens=length)
    tokens = finished = 0
    while finished < len(prompts):
        result = manager.get_result(timeout=1)
        if result is None:
            if not manager.is_running():
                raise RuntimeError("transformers' continuous batching stopped")
        elif result.error is not None:
            raise RuntimeError(f"transformers failed a request: {result.error}")
        elif result.is_finished():
            finished += 1
            tokens += len(result.generated_tokens)
    return tokens, time.perf_counter() - start


def run_vllm(job: Job) -> Outcome:
    """vLLM's offline engine; compile, full graphs and asynchronous scheduling are its defaults."""
    import vllm
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=job.folder,
        load_format="dummy" if job.random_weights else "auto",
        skip_tokenizer_init=True,
        dtype="bfloat16" if job.random_weights else "auto",
        max_model_len=job.workload.max_seq_len,
        max_num_seqs=job.workload.batch,
        enable_prefix_caching=False,
    )
    vocab = llm.llm_engine.model_config.get_vocab_size()
    outputs = [o for _, o in job.workload.lengths()]

    def run(seed: int, lengths: list[int]) -> tuple[int, float]:
        params = [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True, detokenize=False) for n in lengths]
        inputs = [{"prompt_token_ids": prompt} for prompt in job.workload.prompts(vocab, seed)]
        start = time.perf_counter()
        results = llm.generate(inputs, params, use_tqdm=False)
        return sum(len(r.outputs[0].token_ids) for r in results), time.perf_counter() - start

    run(0, [min(8, o) for o in outputs])
    tokens, wall_s = run(1, outputs)
    return Outcome("vllm", vllm.__version__, tokens, wall_s, "defaults, prefix caching off")


RUNNERS: dict[str, Callable[[Job], Outcome]] = {
    "transformers": run_transformers,
    "vllm": run_vllm,
    "tandem": run_tandem,
}


def run_child(job: Job) -> Outcome | None:
    """`job` in a process of its own; None, with the reason printed, if it fails."""
    command = [sys.executable, __file__, "--child", json.dumps(asdict(job))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        try:
            stdout, _ = child.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.communicate()
            print(f"{job.peer}: not done after {LIMIT_S:.0f} s", flush=True)
            return None
    for line in stdout.splitlines():
        if line.startswith(MARK):
            return Outcome(**json.loads(line.removeprefix(MARK)))
    print(f"{job.peer}: failed with exit code {child.returncode}\n{stdout[-2000:]}", flush=True)
    return None


def child_main(text: str) -> None:
    fields = json.loads(text)
    workload = fields.pop("workload")
    workload["ragged"] = tuple(workload["ragged"]) if workload["ragged"] else None
    outcome = RUNNERS[fields["peer"]](Job(workload=Workload(**workload), **fields))
    print(MARK + json.dumps(asdict(outcome)), flush=True)


def print_table(outcomes: list[Outcome]) -> None:
    ours = next((o for o in outcomes if o.peer == "tandem"), None)
    print(f"{'engine':14} {'tokens':>8} {'wall s':>9} {'tok/s':>9} {'ratio':>7}  version, settings")
    for o in outcomes:
        ratio = f"{ours.tokens_per_s / o.tokens_per_s:6.2f}x" if ours else f"{'-':>7}"
        print(f"{o.peer:14} {o.tokens:8d} {o.wall_s:9.2f} {o.tokens_per_s:9.0f} {ratio}  {o.version}, {o.settings}")
    if ours:
        print("ratio: tandem's tokens/s over the engine's")
    expected = {o.tokens for o in outcomes}
    if len(expected) > 1:
        print(f"the engines generated different numbers of tokens, {sorted(expected)}: compare with care")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--model", help="folder")
    model.add_argument("--random-weights", choices=sorted(SHAPES), help="a known shape with random bfloat16 weights")
    parser.add_argument("--workload", choices=sorted(n for n, w in WORKLOADS.items() if w.kind == "throughput"))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--prompt-len", type=int, default=256)
    parser.add_argument("--output-len", type=int, default=512)
    parser.add_argument("--peers", default=",".join(PEERS), help="default: %(default)s")
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda if torch finds it")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        child_main(args.child)
        return
    if not (args.model or args.random_weights):
        parser.error("--model or --random-weights is needed")
    workload = WORKLOADS.get(args.workload) or Workload("custom", args.batch, args.prompt_len, args.output_len)
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as folder:
        if args.random_weights:
            SHAPES[args.random_weights].save_pretrained(folder)
        device = args.device or default_device()
        for peer in args.peers.split(","):
            if peer not in RUNNERS:
                parser.error(f"no peer {peer!r}; there are {', '.join(PEERS)}")
            if peer == "vllm" and importlib.util.find_spec("vllm") is None:
                print("vllm: not installed here", flush=True)
                continue
            job = Job(peer, args.model or folder, bool(args.random_weights), workload, args.depth, device)
            outcome = run_child(job)
            if outcome is not None:
                outcomes.append(outcome)
                print(f"{peer}: {outcome.tokens_per_s:.0f} tokens/s", flush=True)
    print_table(outcomes)
    if args.json:
        args.json.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1))


def default_device() -> str:
    """Asked of the driver, not of torch: a CUDA context here would take memory from the children."""
    from frontend.launch import cuda_devices

    return "cuda" if cuda_devices() else "cpu"


if __name__ == "__main__":
    main()
