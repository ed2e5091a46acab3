"""The Triton kernels of sampling against the CPU's stages, which are checked against transformers in test_sampler.

They run on a GPU, or on the CPU under TRITON_INTERPRET=1 where triton is installed.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from executor import sampler_cpu
from executor.sampler import Sampler
from ipc.frames import INVALID_TOKEN, PlanFlag
from tests.executor.sampler_rows import Bench, Row, random_rows

_ON_GPU = torch.cuda.is_available()
_INTERPRET = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None
DEVICE = "cuda" if _ON_GPU else "cpu"
VOCABULARIES = [1000, 1001, 128256, 151936] if _ON_GPU else [1000, 20011]
INF = float("inf")

needs_gpu = pytest.mark.skipif(not _ON_GPU, reason="needs a CUDA device")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (_ON_GPU or _INTERPRET), reason="needs a CUDA device, or triton and TRITON_INTERPRET=1"),
]


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Every torch.empty is filled with NaN or the largest integer, so what a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def random_logits(rows: int, vocab: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return (torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)


def choose(bench: Bench, logits: torch.Tensor, rows: list[Row]) -> torch.Tensor:
    from executor import sampler_kernels

    return sampler_kernels.choose_tokens(bench.sampler.tables, logits.to(DEVICE), *bench.step(rows)).cpu()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("seed", range(4 if _ON_GPU else 2))
def test_random_mixtures_choose_what_the_cpu_chooses(vocab: int, dtype: torch.dtype, seed: int) -> None:
    count = 48 if _ON_GPU else 8
    rows = random_rows(np.random.default_rng(seed + vocab), count, vocab)
    rows[0] = replace(rows[0], temperature=1.0, top_k=1)
    logits = random_logits(count, vocab, dtype, seed)
    logits[2, vocab - 1] = float("nan")
    reference, bench = Bench(vocab, rows), Bench(vocab, rows, DEVICE)
    want, got = reference.sample(logits).token, choose(bench, logits, rows)
    assert got[2] == INVALID_TOKEN
    differ = (want != got).nonzero().flatten().tolist()
    # A logarithm may round otherwise: now and then two scores, or the edge of a nucleus, are that close.
    assert len(differ) <= count // 48, [(i, rows[i], int(want[i]), int(got[i])) for i in differ]
    counts = (t.sampler.tables.token_counts.cpu().sum(dim=1)[[r.slot for r in rows]] for t in (reference, bench))
    assert torch.equal(*counts), "as many tokens counted"


@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_greedy_takes_the_first_of_equal_maxima(vocab: int) -> None:
    logits = random_logits(6, vocab, torch.bfloat16, 1)
    logits[1, [vocab - 1, 7]] = 90.0
    logits[2] = 0.0
    logits[3] = -INF
    logits[4, 5] = INF
    logits[5, 0] = float("nan")
    rows = [Row(slot) for slot in range(6)]
    want = [int(logits[0].argmax()), 7, 0, 0, 5, INVALID_TOKEN]
    assert choose(Bench(vocab, rows, DEVICE), logits, rows).tolist() == want
    sampled = [*rows, Row(6, temperature=1.0, top_p=0.5, repetition=1.1)]
    with_noise = choose(Bench(vocab, sampled, DEVICE), torch.cat([logits, logits[:1]]), sampled)
    assert with_noise[:6].tolist() == want


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_redirected_tokens_go_where_the_address_says_and_are_carried_over(vocab: int, dtype: torch.dtype) -> None:
    logits = random_logits(6, vocab, dtype, 2)
    logits[1] = 0.0
    logits[4, vocab - 1] = float("nan")
    rows = [Row(slot) for slot in (5, 0, 3, 9, 2, 7)]
    want = Bench(vocab, rows, DEVICE)
    token = choose(want, logits, rows)
    assert token[4] == INVALID_TOKEN
    bench = Bench(vocab, rows, DEVICE)
    memory = torch.full((9,), -7, dtype=torch.int32, device=DEVICE)
    redirect(bench, logits, rows, memory[1:].data_ptr())  # aligned to 4 bytes only
    assert memory.tolist() == [-7, *token.tolist(), -7, -7]
    assert torch.equal(bench.sampler.tables.last_token, want.sampler.tables.last_token)


@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_at_address_0_nothing_is_carried_over(vocab: int) -> None:
    rows = [Row(slot) for slot in range(6)]
    bench = Bench(vocab, rows, DEVICE)
    before = bench.sampler.tables.last_token.clone()
    redirect(bench, random_logits(6, vocab, torch.bfloat16, 2), rows, 0)
    assert torch.equal(bench.sampler.tables.last_token, before)


def redirect(bench: Bench, logits: torch.Tensor, rows: list[Row], address: int) -> None:
    slot, *_ = bench.step(rows)
    bench.sampler.sample_greedy(logits.to(DEVICE), slot, bench.tensor([address], torch.int64))


def logit_shapes(vocab: int) -> dict[str, torch.Tensor]:
    """Rows [vocab] that are hard for a search: ties, gaps, huge spreads, forbidden tokens."""
    generator = torch.Generator().manual_seed(vocab)
    normal = torch.randn(vocab, generator=generator)
    one_hot = torch.zeros(vocab)
    one_hot[vocab // 2] = 100.0
    masked = torch.where(torch.rand(vocab, generator=generator) < 0.99, -INF, normal)
    lowest = torch.where(torch.rand(vocab, generator=generator) < 0.5, torch.finfo(torch.float32).min, normal)
    exponents = torch.exp2(torch.randint(-140, 5, (vocab,), generator=generator).float())
    few_values = torch.randint(-2, 3, (vocab,), generator=generator).float()
    return {
        "normal": normal * 4,
        "equal": torch.full((vocab,), -3.25),
        "one hot": one_hot,
        "masked": masked,
        "lowest": lowest,
        "exponents": exponents,
        "few values": few_values,
        "coarse": (normal * 3).to(torch.bfloat16).float(),
    }


@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize(
    "asks",
    [{"top_k": 2}, {"top_k": 50}, {"top_k": 128}, {"top_k": 900}, {"min_p": 0.2}, {"top_k": 5, "min_p": 0.9}],
    ids=lambda asks: "-".join(asks),
)
def test_top_k_and_min_p_keep_exactly_what_a_sort_keeps(vocab: int, asks: dict[str, float]) -> None:
    want, got, x = thresholds(vocab, asks)
    possible = x > -INF
    assert torch.equal(possible & (x >= want), possible & (x >= got))


@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize(
    "asks",
    [{"top_p": 0.1}, {"top_p": 0.9}, {"top_p": 0.999}, {"top_p": 0.5, "top_k": 40}, {"top_p": 0.9, "min_p": 0.1}],
    ids=lambda asks: "-".join(f"{k}{v}" for k, v in asks.items()),
)
def test_top_p_keeps_the_smallest_nucleus(vocab: int, asks: dict[str, float]) -> None:
    want, got, x = thresholds(vocab, asks)
    before, _, _ = thresholds(vocab, {**asks, "top_p": 1.0})
    mass = torch.softmax(torch.where(x >= before, x, -INF).double() / 0.7, dim=1)
    for row in range(len(x)):
        kept = (x[row] >= got[row]) & (x[row] > -INF)
        assert mass[row, kept].sum() >= asks["top_p"] - 1e-5
        assert mass[row, x[row] > x[row, kept].min()].sum() < asks["top_p"] + 1e-5
    differs = (x > -INF) & ((x >= want) != (x >= got))
    assert (mass * differs).sum(dim=1).max() < 1e-5, "only a rounding at the edge may make a difference"


@pytest.mark.parametrize(
    "asks",
    [{"top_p": 0.9}, {"top_p": 0.8, "top_k": 300}, {"top_p": 0.8, "top_k": 50}],
    ids=["nucleus", "top k", "few"],
)
def test_more_candidates_than_the_list_holds_are_searched_in_the_row(
    asks: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    from executor import threshold_kernels

    _, listed, x = thresholds(20011, asks)
    monkeypatch.setattr(threshold_kernels, "_FEW", 32)
    monkeypatch.setattr(threshold_kernels, "_HELD", 32)
    _, searched, _ = thresholds(20011, asks)
    mass = torch.softmax(x.double() / 0.7, dim=1)
    assert (mass * ((x >= listed) != (x >= searched))).sum(dim=1).max() < 1e-5


def thresholds(vocab: int, asks: dict[str, float]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The sort's and the kernel's thresholds [rows, 1], and the logits [rows, vocab], one row of each shape."""
    from executor import sampler_kernels, threshold_kernels

    x = torch.stack(list(logit_shapes(vocab).values()))
    rows = [Row(slot, temperature=0.7, **asks) for slot in range(len(x))]
    bench = Bench(vocab, rows, DEVICE)
    tables, (slot, position, *_) = bench.sampler.tables, bench.step(rows)
    prepared, summary = sampler_kernels.prepare(tables, x.to(DEVICE), slot, position)
    got = threshold_kernels.filter_threshold(tables, prepared, summary, slot).cpu()
    want = sampler_cpu.filter_threshold(
        x.numpy(),
        np.full(len(x), 0.7, np.float32),
        np.full(len(x), asks.get("top_k", 0), np.int32),
        np.full(len(x), asks.get("top_p", 1.0), np.float32),
        np.full(len(x), asks.get("min_p", 0.0), np.float32),
    )
    return torch.from_numpy(want).unsqueeze(1), got.unsqueeze(1), x


def test_rows_of_a_wider_tensor() -> None:
    """Logits may be a view whose rows are further apart than the vocabulary."""
    wide = random_logits(8, 1100, torch.float32, 3)
    rows = random_rows(np.random.default_rng(3), 8, 1000)
    got = choose(Bench(1000, rows, DEVICE), wide.to(DEVICE)[:, :1000], rows)
    assert got.tolist() == Bench(1000, rows).sample(wide[:, :1000].contiguous()).token.tolist()


ALL = {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "repetition": 1.2, "bias": ((3, 1.0, 1 << 30),), "logprobs": 3}


@needs_gpu
def test_nothing_waits_for_the_device() -> None:
    rows = [Row(slot, seed=slot, **ALL) for slot in range(8)]
    bench = Bench(1000, rows, DEVICE)
    logits = random_logits(8, 1000, torch.bfloat16, 0).to(DEVICE)
    step = bench.step(rows)
    slot = bench.tensor([1, 2])
    params = torch.from_numpy(np.stack([rows[1].params(), rows[2].params()])).to(DEVICE)
    token, value = bench.tensor([5, 6]), bench.tensor([0.5, 0.25], torch.float32)
    torch.use_deterministic_algorithms(False)  # it has its own ways to wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        bench.sampler.admit(slot, params)
        bench.sampler.set_history(slot, slot, token, token)
        bench.sampler.set_bias(slot, slot, token, value, token)
        bench.sampler.sample(logits, *step)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def warm_up(sampler: Sampler, logits: torch.Tensor) -> None:
    """Compile every kernel that `sample` can need for logits like these [rows, vocab_size], at the null slot."""
    null_slot = torch.full((len(logits),), len(sampler.tables.params) - 1, device=logits.device)
    zero = torch.zeros(len(logits), dtype=torch.int32, device=logits.device)
    for prepare in (PlanFlag.NONE, PlanFlag.BIAS | PlanFlag.PENALTY):
        for choice in (PlanFlag.NONE, PlanFlag.SAMPLE, PlanFlag.SAMPLE | PlanFlag.FILTER):
            sampler.sample(logits, null_slot, zero, zero, prepare | choice | PlanFlag.LOGPROBS)


@needs_gpu
@pytest.mark.parametrize("asks", [{}, ALL], ids=["greedy", "everything"])
def test_a_captured_step_replays_with_new_contents(asks: dict[str, object]) -> None:
    rows = [Row(slot, seed=slot, position=5, **asks) for slot in range(8)]
    bench, eager = Bench(128256, rows, DEVICE), Bench(128256, rows, DEVICE)
    logits = random_logits(8, 128256, torch.bfloat16, 0).to(DEVICE)
    slot, position, row_sample, flags = bench.step(rows)
    warm_up(bench.sampler, logits)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = bench.sampler.sample(logits, slot, position, row_sample, flags)
    for step in range(5):
        fresh = random_logits(8, 128256, torch.bfloat16, 10 + step)
        logits.copy_(fresh)
        position.fill_(6 + step)
        graph.replay()
        want = eager.sample(fresh, [replace(row, position=6 + step) for row in rows])
        assert torch.equal(out.token, want.token)
        if want.top_logprob is not None:
            assert torch.equal(out.top_logprob, want.top_logprob)
    assert torch.equal(bench.sampler.tables.token_counts, eager.sampler.tables.token_counts)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_is_compiled_after_warm_up(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    rows = [Row(slot, seed=slot, **ALL) for slot in range(33)]
    bench = Bench(128256, rows, DEVICE)
    logits = random_logits(33, 128256, dtype, 0).to(DEVICE)
    warm_up(bench.sampler, logits[:2])
    compiled: list[object] = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda **event: compiled.append(event["repr"]))
    slot, position, row_sample, _ = bench.step(rows)
    for flags in range(32):
        for count in (1, 16, 33):
            columns = (slot[:count], position[:count], row_sample[:count])
            bench.sampler.sample(logits[:count], *columns, PlanFlag(flags))
    assert not compiled


@needs_gpu
def test_sampling_at_the_null_slot_leaves_no_trace() -> None:
    bench = Bench(1000, [Row(0, **ALL)], DEVICE)
    tables = bench.sampler.tables
    before = (tables.params.clone(), tables.token_counts.clone())
    warm_up(bench.sampler, random_logits(4, 1000, torch.bfloat16, 0).to(DEVICE))
    assert torch.equal(tables.params, before[0])
    assert torch.equal(tables.token_counts, before[1])
