"""Kernels alone against their limits: attention of decode and prefill, linear layers, sampling.

    python scripts/bench_kernels.py                              # everything, on CUDA
    python scripts/bench_kernels.py --only linear,decode/ragged  # cases whose group/name contains one of these
    python scripts/bench_kernels.py --device cpu --tiny          # does the bench itself work?

us is the median device time of one call inside a CUDA graph (kernel_timing.py). The limit is bytes over `--bandwidth`
or FLOPs over `--peak-flops`, whichever takes longer. Attention runs through the executor's own backend, the writing of
the new keys and values included; the work list that a step makes once for all its layers is a case of its own.
To compare another linear kernel, add it to LINEAR_KERNELS; another attention backend, to ATTENTION_BACKENDS.
"""

from __future__ import annotations

import argparse
import gc
import json
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from kernel_timing import Call, Measured, copies_needed, time_us
from roofline import H200_BANDWIDTH, H200_FLOPS

from executor.attention import AttentionBackend, LayerSpec, PagedLayer, choose_backend
from executor.inputs import PlanHeader, StagedPlan, StepInputs, build_decode_inputs, build_inputs
from executor.kv_cache import allocate_pages
from executor.sampler import Sampler
from executor.slot_state import SlotState
from executor.warmup import synthetic_plan
from ipc.frames import FrameLimits, Param, PlanFlag, write_plan

PAGE: Final = 16

# -- what is compared

Linear = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # x [rows, in], weight [out, in] -> [rows, out]
LINEAR_KERNELS: dict[str, Linear] = {"cublas": F.linear}

MakeBackend = Callable[[Sequence[LayerSpec], int, torch.device], AttentionBackend]  # (specs, max rows, device)
ATTENTION_BACKENDS: dict[str, MakeBackend] = {
    "ours": lambda specs, rows, device: choose_backend(specs, block_size=PAGE, max_rows=rows, device=device)
}


@dataclass(frozen=True)
class Machine:
    device: torch.device
    bandwidth: float
    flops: float

    def limit_us(self, nbytes: float, flops: float = 0.0) -> float:
        return max(nbytes / self.bandwidth, flops / self.flops) * 1e6


@dataclass(frozen=True)
class Case:
    """One thing to measure: `make(kernel)` builds its calls, each on buffers of its own."""

    group: str
    name: str
    kernel: str
    nbytes: float
    flops: float
    make: Callable[[], list[Call]]


# -- attention


@dataclass(frozen=True)
class Heads:
    q_heads: int
    kv_heads: int
    dim: int
    dtype: torch.dtype

    @property
    def label(self) -> str:
        return f"{self.q_heads}/{self.kv_heads}x{self.dim}"

    def spec(self) -> LayerSpec:
        return LayerSpec(
            q_heads=self.q_heads, kv_heads=self.kv_heads, k_dim=self.dim, v_dim=self.dim, dtype=self.dtype,
            scale=self.dim**-0.5, window=None, softcap=None, has_sinks=False,
        )  # fmt: skip


def ragged_lengths(rows: int, longest: int) -> list[int]:
    """Contexts uniform in [longest / 8, longest], the longest included."""
    rng = np.random.default_rng(0)
    return [longest, *rng.integers(max(1, longest // 8), longest + 1, rows - 1).tolist()]


def paged_state(contexts: Sequence[int], new_tokens: int, device: torch.device) -> tuple[SlotState, FrameLimits, int]:
    """Slots whose rows have `contexts` tokens computed and pages in random order for all; and the number of pages."""
    need = [-(-(context + new_tokens) // PAGE) for context in contexts]
    limits = FrameLimits(len(contexts), len(contexts) * new_tokens, max(need) * PAGE, PAGE, 0)
    state = SlotState(limits, device)
    pages = torch.randperm(sum(need), generator=torch.Generator().manual_seed(0), dtype=torch.int64) + 1
    table = torch.zeros(tuple(state.block_table.shape), dtype=torch.int32)
    taken = 0
    for row, count in enumerate(need):
        table[row, :count] = pages[taken : taken + count].int()
        taken += count
    state.block_table.copy_(table)
    state.position[: len(contexts)] = torch.tensor(contexts, device=device)
    return state, limits, sum(need) + 1


def step_inputs(contexts: Sequence[int], new_tokens: int, device: torch.device) -> tuple[StepInputs, int]:
    """Inputs of a step that adds `new_tokens` to rows of `contexts`, as the executor builds them; and their pages."""
    state, limits, pages = paged_state(contexts, new_tokens, device)
    rows = len(contexts)
    slots = torch.arange(rows, dtype=torch.int32, device=device)
    if new_tokens == 1:
        return build_decode_inputs(slots, state), pages
    plan = synthetic_plan([new_tokens] * rows, 0, PlanFlag.NONE)
    payload = np.zeros(limits.plan_bytes, np.uint8)
    used = write_plan(payload, plan)
    staged = StagedPlan(PlanHeader.read(payload), torch.from_numpy(payload[:used]).to(device))
    return build_inputs(staged, state), pages


def attention_calls(
    make_backend: MakeBackend, heads: Heads, contexts: Sequence[int], new_tokens: int, device: torch.device
) -> list[Call]:
    """`attend` on one layer after the other, as many as leave the cache; `begin` has been called, as once a step."""
    inputs, pages = step_inputs(contexts, new_tokens, device)
    spec = heads.spec()
    backend = make_backend([spec], len(contexts), device)
    backend.begin(inputs)
    tokens = len(contexts) * new_tokens
    copies = copies_needed(sum(c + new_tokens for c in contexts) * spec.bytes_per_token)
    calls: list[Call] = []
    for _ in range(copies):
        k_cache, v_cache = allocate_pages(spec, pages, PAGE, device)
        k_cache.normal_()
        v_cache.normal_()
        layer = PagedLayer(spec, k_cache, v_cache)
        query = torch.randn(tokens, heads.q_heads, heads.dim, dtype=heads.dtype, device=device)
        key, value = (torch.randn(tokens, heads.kv_heads, heads.dim, dtype=heads.dtype, device=device) for _ in "kv")

        def call(layer: PagedLayer = layer, q: torch.Tensor = query, k: torch.Tensor = key, v: torch.Tensor = value):  # type: ignore[no-untyped-def]
            return backend.attend(layer, q, k, v, None)

        calls.append(call)
    return calls


def begin_calls(make_backend: MakeBackend, heads: Heads, contexts: Sequence[int], device: torch.device) -> list[Call]:
    inputs, _ = step_inputs(contexts, 1, device)
    backend = make_backend([heads.spec()], len(contexts), device)
    return [lambda: backend.begin(inputs)]


def attention_case(
    group: str, name: str, kernel: str, heads: Heads, contexts: Sequence[int], new_tokens: int, device: torch.device
) -> Case:
    """Bytes: every key and value once, queries in, results out. FLOPs: both products over all visible pairs."""
    spec = heads.spec()
    kv_tokens = sum(context + new_tokens for context in contexts)
    io_bytes = 2 * len(contexts) * new_tokens * heads.q_heads * heads.dim * heads.dtype.itemsize
    pairs = sum(new_tokens * context + new_tokens * (new_tokens + 1) // 2 for context in contexts)
    make_backend = ATTENTION_BACKENDS[kernel]
    return Case(
        group, name, kernel,
        nbytes=kv_tokens * spec.bytes_per_token + io_bytes,
        flops=4.0 * pairs * heads.q_heads * heads.dim,
        make=lambda: attention_calls(make_backend, heads, contexts, new_tokens, device),
    )  # fmt: skip


def attention_cases(machine: Machine, tiny: bool) -> Iterator[Case]:
    """Decode over lengths, batch sizes, group sizes and head sizes; prefill of chunks over contexts."""
    device, dtype = machine.device, torch.float32 if tiny else torch.bfloat16
    base = Heads(4, 2, 16, dtype) if tiny else Heads(32, 8, 128, dtype)
    groups = [(2, 2)] if tiny else [(8, 8), (16, 8), (32, 8), (64, 8), (16, 1)]
    dims = [8] if tiny else [64, 96, 128, 256]
    lengths = [64, 96] if tiny else [1024, 4096, 8192, 16_384, 32_768]
    batches = [1, 3] if tiny else [1, 8, 32, 64, 128, 256, 512]
    middle, rows = (64, 4) if tiny else (4096, 32)
    budget = 8 * 1024**3  # bytes of KV of one case
    for kernel in ATTENTION_BACKENDS:
        for length in lengths:
            even, ragged = [length - 1] * rows, [n - 1 for n in ragged_lengths(rows, length)]
            yield attention_case("decode", f"even {rows}x{length} {base.label}", kernel, base, even, 1, device)
            yield attention_case("decode", f"ragged {rows}x{length} {base.label}", kernel, base, ragged, 1, device)
        for batch in batches:
            if batch * middle * base.spec().bytes_per_token <= budget:
                name = f"batch {batch}x{middle} {base.label}"
                yield attention_case("decode", name, kernel, base, [middle - 1] * batch, 1, device)
        shapes = [Heads(q, kv, base.dim, dtype) for q, kv in groups] + [
            Heads(base.q_heads, base.kv_heads, dim, dtype) for dim in dims
        ]
        for shape in shapes:
            name = f"shape {rows}x{middle} {shape.label}"
            yield attention_case("decode", name, kernel, shape, [middle - 1] * rows, 1, device)
        chunk = 32 if tiny else 2048
        for context in (0, 3 * chunk):
            name = f"{chunk} over {context} {base.label}"
            yield attention_case("prefill", name, kernel, base, [context], chunk, device)
        name = f"8x{chunk // 4} over 0 {base.label}"
        yield attention_case("prefill", name, kernel, base, [0] * 8, chunk // 4, device)
        for batch in batches:
            contexts = ragged_lengths(batch, middle)
            make = ATTENTION_BACKENDS[kernel]
            yield Case("worklist", f"ragged {batch}x{middle}", kernel, 4.0 * batch, 0.0,
                       lambda make=make, contexts=contexts: begin_calls(make, base, contexts, device))  # type: ignore[misc]  # fmt: skip


# -- linear layers

LAYERS: Final = {
    "8b qkv": (4096, 6144),
    "8b o": (4096, 4096),
    "8b gate_up": (4096, 28_672),
    "8b down": (14_336, 4096),
    "8b lm_head": (4096, 128_256),
    "0.6b qkv": (1024, 4096),
    "0.6b o": (2048, 1024),
    "0.6b gate_up": (1024, 6144),
    "0.6b down": (3072, 1024),
    "0.6b lm_head": (1024, 151_936),
}
ROWS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


def linear_cases(machine: Machine, tiny: bool) -> Iterator[Case]:
    device, dtype = machine.device, torch.float32 if tiny else torch.bfloat16
    layers = {"tiny": (32, 48)} if tiny else LAYERS
    for layer, (inputs, outputs) in layers.items():
        for rows in (1, 4) if tiny else ROWS:
            nbytes = dtype.itemsize * (inputs * outputs + rows * (inputs + outputs))
            for kernel, multiply in LINEAR_KERNELS.items():

                def make(n: int = outputs, k: int = inputs, m: int = rows, multiply: Linear = multiply) -> list[Call]:
                    x = torch.randn(m, k, dtype=dtype, device=device)
                    weights = [
                        torch.randn(n, k, dtype=dtype, device=device)
                        for _ in range(copies_needed(n * k * dtype.itemsize))
                    ]
                    return [lambda w=w: multiply(x, w) for w in weights]  # type: ignore[misc]

                yield Case("linear", f"{layer} M={rows}", kernel, nbytes, 2.0 * rows * inputs * outputs, make)


# -- sampling

STAGES: Final = {
    "greedy": PlanFlag.NONE,
    "sample": PlanFlag.SAMPLE,
    "filter": PlanFlag.SAMPLE | PlanFlag.FILTER,
    "penalty": PlanFlag.SAMPLE | PlanFlag.PENALTY,
    "all": PlanFlag.SAMPLE | PlanFlag.FILTER | PlanFlag.PENALTY | PlanFlag.BIAS,
    "logprobs": PlanFlag.LOGPROBS,
}


def sampling_params(rows: int, device: torch.device) -> torch.Tensor:
    """int32 [rows, Param.COUNT] of rows that use every stage."""
    params = np.zeros((rows, int(Param.COUNT)), np.int32)
    floats = params.view(np.float32)
    params[:, Param.SEED_LOW] = np.arange(rows)
    params[:, Param.TOP_K] = 50
    params[:, Param.FEATURES] = int(STAGES["all"])
    floats[:, Param.TEMPERATURE], floats[:, Param.TOP_P], floats[:, Param.REPETITION] = 0.8, 0.95, 1.1
    floats[:, Param.PRESENCE], floats[:, Param.FREQUENCY] = 0.5, 0.2
    return torch.from_numpy(params).to(device)


def sampling_calls(rows: int, vocab: int, flags: PlanFlag, device: torch.device, dtype: torch.dtype) -> list[Call]:
    sampler = Sampler(torch.zeros(rows + 1, dtype=torch.int64, device=device), vocab, 20, device)
    slots = torch.arange(rows, device=device)
    sampler.admit(slots, sampling_params(rows, device))
    position = torch.full((rows,), 100, dtype=torch.int32, device=device)
    asked = torch.ones(rows, dtype=torch.int32, device=device)
    copies = copies_needed(rows * vocab * dtype.itemsize)
    logits = [torch.randn(rows, vocab, dtype=dtype, device=device) for _ in range(copies)]
    return [lambda x=x: sampler.sample(x, slots, position, asked, flags) for x in logits]  # type: ignore[misc]


def sampling_cases(machine: Machine, tiny: bool) -> Iterator[Case]:
    """Against reading the logits once."""
    device, dtype = machine.device, torch.float32 if tiny else torch.bfloat16
    for vocab in (128,) if tiny else (128_256, 151_936):
        for rows in (1, 4) if tiny else (1, 32, 256):
            for stage, flags in STAGES.items():
                nbytes = rows * vocab * dtype.itemsize
                yield Case("sampling", f"{stage} {rows}x{vocab}", "ours", nbytes, 0.0,
                           lambda r=rows, v=vocab, f=flags: sampling_calls(r, v, f, device, dtype))  # type: ignore[misc]  # fmt: skip


# -- all together

GROUPS: Final = (attention_cases, linear_cases, sampling_cases)


def wanted(case: Case, only: Sequence[str]) -> bool:
    return not only or any(part in f"{case.group}/{case.name}" for part in only)


def format_result(result: Measured, case: Case) -> str:
    rate = case.flops / result.us / 1e6 if case.group in ("prefill", "linear") else 0.0
    tflops = f"{rate:9.1f}" if rate else f"{'':9}"
    return (
        f"{result.group:9} {result.name:28} {result.kernel:10} {result.us:10.2f} {result.limit_us:10.2f} "
        f"{result.of_limit * 100:8.1f} {case.nbytes / result.us / 1e6:7.2f} {tflops}"
    )


def run(machine: Machine, only: Sequence[str], tiny: bool, replays: int) -> tuple[list[Measured], list[str]]:
    """Measure and print every case; returns results, and cases that failed, which do not stop the others."""
    results, failed = [], []
    print(
        f"{'group':9} {'case':28} {'kernel':10} {'us':>10} {'limit us':>10} {'limit %':>8} {'TB/s':>7} {'TFLOP/s':>9}"
    )
    for cases in GROUPS:
        for case in cases(machine, tiny):
            if not wanted(case, only):
                continue
            try:
                us = time_us(case.make(), machine.device, replays)
            except Exception as error:
                traceback.print_exc()
                failed.append(f"{case.group}/{case.name}/{case.kernel}: {error}")
                continue
            result = Measured(case.group, case.name, case.kernel, us, machine.limit_us(case.nbytes, case.flops))
            results.append(result)
            print(format_result(result, case), flush=True)
            gc.collect()
            if machine.device.type == "cuda":
                torch.cuda.empty_cache()
    return results, failed


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="comma-separated parts of group/case")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy sizes: tests the bench, not the kernels")
    parser.add_argument("--replays", type=int, default=15)
    parser.add_argument("--bandwidth", type=float, default=H200_BANDWIDTH, help="bytes/s (default: %(default)g)")
    parser.add_argument("--peak-flops", type=float, default=H200_FLOPS, help="(default: %(default)g)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    machine = Machine(torch.device(args.device), args.bandwidth, args.peak_flops)
    with torch.inference_mode():
        results, failed = run(machine, [part for part in args.only.split(",") if part], args.tiny, args.replays)
    if args.json:
        rows = [{**asdict(result), "of_limit": result.of_limit} for result in results]
        args.json.write_text(json.dumps(rows, indent=1))
    if failed:
        raise SystemExit("failed:\n" + "\n".join(failed))


if __name__ == "__main__":
    main()
