"""Steps with prompt tokens in the room of a CUDA graph: what there is comes out as without padding, which is unseen.

Runs on a GPU in bfloat16, with and without graphs, or on the CPU in float32 under TRITON_INTERPRET=1, without them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch

from executor.graphs import StepGraphs, _mixed_room, token_ladder
from executor.inputs import PlanHeader, StagedPlan
from executor.model import Model
from executor.sampler import Sampler
from executor.slot_state import SlotState
from executor.warmup import synthetic_plan
from ipc.frames import FrameLimits, Plan, PlanFlag, write_plan
from tests.executor.fused_model import INTERPRET, LIMIT, ON_GPU, WIDER, fused_model
from tests.executor.test_architectures import ARCHITECTURES, save_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not ON_GPU and not INTERPRET, reason="needs a CUDA device, or triton and TRITON_INTERPRET=1"),
]

PAGES: Final = 256 // 16  # of a slot
POISON: Final = 300.0


@dataclass
class Bench:
    """A model, slots with random contexts, and the snapshot that every run starts from."""

    model: Model
    limits: FrameLimits
    state: SlotState
    sampler: Sampler
    unpack: Any
    start: dict[str, torch.Tensor]

    def restore(self) -> None:
        for name, tensor in self.tensors().items():
            tensor.copy_(self.start[name])

    def tensors(self) -> dict[str, torch.Tensor]:
        state = self.state
        caches = {f"k{i}": layer.k_cache for i, layer in enumerate(self.model.layers)}
        caches |= {f"v{i}": layer.v_cache for i, layer in enumerate(self.model.layers)}
        return {"position": state.position, "last_token": state.last_token, "block_table": state.block_table} | caches


def make_bench(folder: Path, name: str, max_rows: int, max_tokens: int) -> Bench:
    from executor.unpack_kernel import Unpack

    save_model(folder, ARCHITECTURES[name][0], ARCHITECTURES[name][1] | WIDER)
    model = fused_model(folder, max_num_seqs=max_rows)
    limits = FrameLimits(max_rows, max_tokens, 256, 16, 0)
    model.allocate_kv(1 + max_rows * PAGES)
    state = SlotState(limits, model.device)
    sampler = Sampler(state.last_token, model.vocab_size, 0, model.device)
    random = torch.Generator(model.device).manual_seed(0)
    for layer in model.layers:
        layer.k_cache.normal_(generator=random)
        layer.v_cache.normal_(generator=random)
        layer.k_cache[0], layer.v_cache[0] = POISON, -POISON
    state.block_table[:-1] = torch.arange(1, 1 + max_rows * PAGES, device=model.device).view(max_rows, PAGES)
    state.last_token[:-1] = torch.randint(model.vocab_size, (max_rows,), generator=random, device=model.device)
    state.position[:-1] = torch.randint(0, 120, (max_rows,), generator=random, device=model.device)
    bench = Bench(model, limits, state, sampler, Unpack(state, sampler.tables.params, limits), {})
    bench.start = {name: tensor.clone() for name, tensor in bench.tensors().items()}
    return bench


def random_plan(rng: np.random.Generator, bench: Bench, most_tokens: int) -> Plan:
    """Up to `most_tokens` tokens, few or many of them of decode rows, at least one of a prompt."""
    rows = min(bench.limits.max_rows, most_tokens)
    num_decode = min(rows - 1, int(rng.choice([0, 1, rng.integers(0, rows), rows - 1])))
    left, lengths = most_tokens - num_decode - int(rng.integers(0, 1 + most_tokens // 4)), []
    while len(lengths) < min(33, rows - num_decode) and (left > 0 or not lengths):
        lengths.append(int(rng.integers(1, 1 + max(1, min(left, 130)))))
        left -= lengths[-1]
    plan = synthetic_plan([1] * num_decode + lengths, num_decode, PlanFlag.NONE)
    plan.row_slot = rng.permutation(bench.limits.max_rows)[: num_decode + len(lengths)].astype(np.int32)
    plan.prefill_token = rng.integers(0, bench.model.vocab_size, sum(lengths)).astype(np.int32)
    return plan


def stage(bench: Bench, plan: Plan) -> StagedPlan:
    payload = np.zeros(bench.limits.plan_bytes, np.uint8)
    used = write_plan(payload, plan)
    return StagedPlan(PlanHeader.read(payload), torch.from_numpy(payload[:used]).to(bench.model.device))


def run_eagerly(bench: Bench, staged: StagedPlan) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits, and what the step left behind."""
    bench.restore()
    logits = bench.model.forward(bench.unpack.eager(staged)).float().clone()
    return logits, {name: tensor.clone() for name, tensor in bench.tensors().items()}


def check_left_behind(bench: Bench, want: dict[str, torch.Tensor]) -> None:
    for name, tensor in bench.tensors().items():
        if name[0] not in "kv":
            assert torch.equal(tensor, want[name]), name
            continue
        ours, theirs, before = (
            x[1:].float() for x in (tensor, want[name], bench.start[name])
        )  # without the null block
        written = (theirs != before).any(-1, keepdim=True)
        assert torch.equal(ours.masked_fill(written, 0), before.masked_fill(written, 0)), name
        assert_close(ours.masked_fill(~written, 0), theirs.masked_fill(~written, 0))


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.isfinite().all()
    difference = ((ours - theirs).norm() / theirs.norm()).item()
    assert difference < (LIMIT if ON_GPU else 1e-4), difference


@pytest.mark.parametrize("name", ["llama", "qwen3", "qwen2_window"])
def test_padding_is_unseen(name: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    with torch.inference_mode():
        bench = make_bench(tmp_path, name, 12, 96)
        decoder = bench.model.decoder
        assert decoder is not None
        for ways in decoder.both_ways():
            decoder.ways = ways
            for size in (16, 64, 96) if ON_GPU else (16, 96):
                plan = random_plan(rng, bench, size)
                staged = stage(bench, plan)
                want, left_behind = run_eagerly(bench, staged)
                bench.restore()
                room = _mixed_room(bench.unpack, size, bench.limits.max_rows)
                bench.unpack.point(staged.staged)
                bench.unpack.fill(room)
                logits = bench.model.forward(room)
                assert len(logits) == room.num_rows
                assert_close(logits[: plan.num_rows].float(), want)
                check_left_behind(bench, left_behind)


@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize(("name", "max_rows", "max_tokens"), [("llama", 40, 2048), ("qwen3", 7, 100)])
def test_a_replayed_step_is_the_eager_one_for_every_size_and_mix(
    name: str, max_rows: int, max_tokens: int, tmp_path: Path
) -> None:
    rng = np.random.default_rng(3)
    compute = torch.cuda.Stream()
    with torch.inference_mode(), torch.cuda.stream(compute):
        bench = make_bench(tmp_path, name, max_rows, max_tokens)
        model, state, sampler = bench.model, bench.state, bench.sampler
        graphs = StepGraphs(
            bench.unpack,
            bench.limits,
            parameters=1,
            full_steps=False,
            compute=compute,
            forward=model.forward,
            sample_greedy=sampler.sample_greedy,
        )
        tokens = torch.empty(max_rows, dtype=torch.int32, device=model.device)
        for size in token_ladder(max_tokens, 1):
            for _ in range(6):
                plan = random_plan(rng, bench, size)
                staged = stage(bench, plan)
                want, left_behind = run_eagerly(bench, staged)
                bench.restore()
                bench.unpack._all.token_ids.fill_(1 << 40)
                bench.unpack._all.row_slot.fill_(1 << 40)
                graph = graphs.replay(staged, 0)
                assert graph is not None
                assert plan.num_tokens <= graph.inputs.num_tokens <= size
                rows = plan.num_rows
                assert_close(graph.logits[:rows].float(), want)
                check_left_behind(bench, left_behind)
                bench.restore()
                assert graphs.replay(staged, tokens.data_ptr()) is graph
                assert tokens[:rows].tolist() == graph.logits[:rows].float().argmax(-1).tolist()
                slots = torch.from_numpy(plan.row_slot).long().to(model.device)
                assert state.last_token[slots].tolist() == tokens[:rows].tolist()
                others = torch.ones(max_rows, dtype=torch.bool, device=model.device).index_fill_(0, slots, False)
                assert torch.equal(state.last_token[:-1][others], bench.start["last_token"][:-1][others])


@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
def test_steps_that_fit_no_graph_leave_everything_to_the_caller_and_a_full_one_fits_exactly(tmp_path: Path) -> None:
    compute = torch.cuda.Stream()
    full = synthetic_plan([1] * 8 + [120] * 17, 8, PlanFlag.NONE)
    one_less = synthetic_plan([1] * 7 + [120] * 17, 7, PlanFlag.NONE)
    scored = synthetic_plan([1, 5], 1, PlanFlag.LOGPROBS)
    scored.score_index, scored.score_token = np.array([1], np.int32), np.array([3], np.int32)
    many = synthetic_plan([1] * 4 + [2] * 34, 4, PlanFlag.NONE)
    few = synthetic_plan([1] * 7 + [2] * 33, 7, PlanFlag.NONE)
    one = synthetic_plan([1], 0, PlanFlag.NONE)
    with torch.inference_mode(), torch.cuda.stream(compute):
        bench = make_bench(tmp_path, "llama", 40, full.num_tokens)
        model, sampler = bench.model, bench.sampler
        for full_steps in (False, True):
            staged = stage(bench, one_less)
            model.forward(bench.unpack.eager(staged))
            graphs = StepGraphs(
                bench.unpack, bench.limits, parameters=4 * 10**9, full_steps=full_steps, compute=compute,
                forward=model.forward, sample_greedy=sampler.sample_greedy,
            )  # fmt: skip
            for plan in (scored, many, one_less) if full_steps else (scored, many, one_less, full):
                bench.restore()
                assert graphs.replay(stage(bench, plan), 0) is None
                assert torch.equal(bench.state.position, bench.start["position"])
            asked = torch.cuda.memory_stats()["num_device_alloc"]
            model.forward(bench.unpack.eager(staged))
            assert torch.cuda.memory_stats()["num_device_alloc"] == asked, "capturing has given memory back"
            for plan in (few, one, full) if full_steps else (few, one):
                plan.prefill_token[:] = 1 + np.arange(len(plan.prefill_token)) % 30
                staged = stage(bench, plan)
                want, left_behind = run_eagerly(bench, staged)
                bench.restore()
                graph = graphs.replay(staged, 0)
                assert graph is not None
                assert_close(graph.logits[: plan.num_rows].float(), want)
                check_left_behind(bench, left_behind)
