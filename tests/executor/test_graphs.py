"""The ladders of graphs, and steps of decode rows. Steps with prompt tokens: `test_mixed_steps`."""

from __future__ import annotations

import pytest
import torch

from executor.graphs import StepGraphs, _borrow, ladder, token_ladder
from executor.inputs import PlanHeader, StagedPlan, StepInputs
from executor.sampler import Sampler
from executor.slot_state import SlotState
from executor.warmup import synthetic_plan
from ipc.frames import FrameLimits, PlanFlag, write_plan


@pytest.mark.parametrize("max_rows", [1, 2, 3, 7, 8, 24, 100, 256, 257, 300, 512])
def test_the_ladder_climbs_to_the_largest_batch_and_pads_little(max_rows: int) -> None:
    sizes = ladder(max_rows)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == max_rows
    assert set(sizes) >= {size for size in (1, 2, 4, 8, 12, 16, 24, 32, 40) if size <= max_rows}
    for rows in range(1, max_rows + 1):
        bucket = next(size for size in sizes if size >= rows)
        assert bucket < 2 * rows
        assert bucket - rows < 16


@pytest.mark.parametrize("parameters", [10_000, 600_000_000, 8_000_000_000])
@pytest.mark.parametrize("max_tokens", [1, 2, 16, 17, 64, 100, 1023, 1024, 1025, 8192])
def test_the_ladder_of_tokens_ends_where_launches_are_hidden(max_tokens: int, parameters: int) -> None:
    sizes = token_ladder(max_tokens, parameters)
    assert sizes == sorted(set(sizes))
    most = {10_000: 4096, 600_000_000: 3072, 8_000_000_000: 256}[parameters]
    assert sizes[-1] == min(max_tokens, most)
    for tokens in range(16, sizes[-1] + 1):
        assert next(size for size in sizes if size >= tokens) < 2 * tokens


@pytest.mark.gpu
def test_replays_gather_the_carry_over_and_leave_other_slots_alone() -> None:
    """A model whose logits point at (token + position) mod vocab: each step's tokens follow from the one before.

    Every third step wants no tokens, so that the one after it finds those of the one before.
    """
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    from executor.unpack_kernel import Unpack

    vocab, device = 97, torch.device("cuda")
    limits = FrameLimits(max_rows=20, max_tokens=64, max_seq_len=64, block_size=4, max_logprobs=0)
    compute = torch.cuda.Stream(device)
    with torch.inference_mode(), torch.cuda.stream(compute):
        state = SlotState(limits, device)

        def forward(inputs: StepInputs) -> torch.Tensor:
            target = ((inputs.token_ids + inputs.positions) % vocab)[inputs.last_index]
            return (target[:, None] == torch.arange(vocab, device=device)).to(torch.bfloat16)

        sampler = Sampler(state.last_token, vocab, 0, device)
        unpack = Unpack(state, sampler.tables.params, limits)
        graphs = StepGraphs(
            unpack, limits, parameters=1, full_steps=False, compute=compute, forward=forward,
            sample_greedy=sampler.sample_greedy,
        )  # fmt: skip
        lanes = torch.full((2, 21), -7, dtype=torch.int32, device=device)[:, 1:]  # the first aligned to 4 bytes only
        state.last_token.copy_(torch.arange(21))
        state.position[:20] = torch.arange(20, device=device)
        last, position = list(range(20)), list(range(20))
        random = torch.Generator().manual_seed(3)
        for step, rows in enumerate((1, 3, 20, 7, 16, 2, 13, 20, 5)):
            slots = torch.randperm(20, generator=random)[:rows].tolist()
            plan = synthetic_plan([1] * rows, rows, PlanFlag.NONE)
            plan.row_slot[:] = slots
            payload = torch.zeros(limits.plan_bytes, dtype=torch.uint8)
            used = write_plan(payload.numpy(), plan)
            staged = StagedPlan(PlanHeader.read(payload.numpy()), payload[:used].to(device))
            lane, wanted = step % 2, step % 3 != 2
            before = lanes.clone()
            graph = graphs.replay(staged, lanes[lane].data_ptr() if wanted else 0)
            assert graph is not None
            tokens = [(last[s] + position[s]) % vocab for s in slots]
            assert graph.logits[:rows].argmax(-1).tolist() == tokens
            if wanted:
                assert lanes[lane, :rows].tolist() == tokens
                assert torch.equal(lanes[1 - lane], before[1 - lane])
            else:
                assert torch.equal(lanes, before)
            for slot, token in zip(slots, tokens, strict=True):
                last[slot] = token if wanted else last[slot]
                position[slot] += 1
            assert state.last_token[:20].tolist() == last
            assert state.position.tolist() == [*position, 0]


@pytest.mark.gpu
def test_there_are_no_graphs_of_more_decode_rows_than_a_plan_has_tokens() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    from executor.unpack_kernel import Unpack

    device, compute = torch.device("cuda"), torch.cuda.Stream()
    limits = FrameLimits(max_rows=40, max_tokens=10, max_seq_len=64, block_size=4, max_logprobs=0)
    with torch.inference_mode(), torch.cuda.stream(compute):
        state = SlotState(limits, device)
        sampler = Sampler(state.last_token, 97, 0, device)

        def forward(inputs: StepInputs) -> torch.Tensor:
            assert len(inputs.token_ids) == inputs.num_tokens <= limits.max_tokens
            return torch.zeros(len(inputs.last_index), 97, device=device)

        StepGraphs(
            Unpack(state, sampler.tables.params, limits), limits, parameters=1, full_steps=True, compute=compute,
            forward=forward, sample_greedy=sampler.sample_greedy,
        )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_borrowed_tensor_is_the_same_memory(dtype: torch.dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    tensor = torch.randn(3, 5, device="cuda").to(dtype)
    alias = _borrow(tensor)
    assert (alias.data_ptr(), alias.dtype, alias.shape) == (tensor.data_ptr(), dtype, tensor.shape)
    tensor.fill_(2.5)
    assert torch.equal(alias, tensor)
