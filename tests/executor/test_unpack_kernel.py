"""The launch that readies a step leaves what the torch version leaves, whatever lay there before, and pads the rest.

Runs on a GPU, or on the CPU under TRITON_INTERPRET=1 where triton is installed.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import pytest
import torch

from executor.inputs import PlanHeader, StagedPlan, StepInputs, apply_slots, build_inputs
from executor.sampler import Sampler
from executor.slot_state import SlotState
from executor.warmup import synthetic_plan
from ipc.frames import NULL_BLOCK, FrameLimits, Param, Plan, PlanFlag, write_plan
from tests.executor.fused_model import INTERPRET, ON_GPU

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not ON_GPU and not INTERPRET, reason="needs a CUDA device, or triton and TRITON_INTERPRET=1"),
]

DEVICE: Final = torch.device("cuda" if ON_GPU else "cpu")
# More rows and more tokens than one pass of the kernel takes.
LIMITS: Final = FrameLimits(max_rows=600, max_tokens=1400, max_seq_len=1600, block_size=4, max_logprobs=0)
POISON: Final = -7
WRITTEN: Final = (
    "token_ids",
    "positions",
    "slot_mapping",
    "row_slot",
    "query_start",
    "kv_len",
    "last_index",
)
VOCAB: Final = 50


def random_plan(rng: np.random.Generator, num_decode: int, lengths: list[int], admits: int, deltas: int) -> Plan:
    lens = [1] * num_decode + lengths
    plan = synthetic_plan(lens, num_decode, PlanFlag.NONE)
    plan.row_slot = rng.permutation(LIMITS.max_rows)[: len(lens)].astype(np.int32)
    plan.row_sample = rng.integers(0, 2, len(lens)).astype(np.int32)
    plan.prefill_token = rng.integers(0, VOCAB, len(plan.prefill_token)).astype(np.int32)
    plan.admit_slot = rng.permutation(LIMITS.max_rows)[:admits].astype(np.int32)
    plan.admit_params = rng.integers(0, 90, (admits, Param.COUNT)).astype(np.int32)
    entries = rng.permutation(LIMITS.max_rows * LIMITS.max_blocks_per_seq)[:deltas]
    plan.block_slot, plan.block_index = (part.astype(np.int32) for part in divmod(entries, LIMITS.max_blocks_per_seq))
    plan.block_id = rng.integers(1, 10_000, deltas).astype(np.int32)
    return plan


def stage(plan: Plan) -> StagedPlan:
    payload = np.full(LIMITS.plan_bytes, 0xA5, np.uint8)
    used = write_plan(payload, plan)
    return StagedPlan(PlanHeader.read(payload), torch.from_numpy(payload[:used].copy()).to(DEVICE))


def random_slots(rng: np.random.Generator) -> tuple[SlotState, Sampler]:
    state = SlotState(LIMITS, DEVICE)
    state.last_token[:-1] = torch.from_numpy(rng.integers(0, VOCAB, LIMITS.max_rows))
    state.position[:-1] = torch.from_numpy(rng.integers(0, 400, LIMITS.max_rows))
    state.block_table[:-1] = torch.from_numpy(rng.integers(1, 9000, tuple(state.block_table[:-1].shape)))
    return state, Sampler(state.last_token, VOCAB, 0, DEVICE)


def poisoned(unpack: object) -> dict[str, torch.Tensor]:
    """All of the memory of inputs, poisoned."""
    memory = {name: getattr(unpack._all, name) for name in WRITTEN}  # type: ignore[attr-defined]
    for tensor in memory.values():
        tensor.fill_(POISON)
    return memory


# decode rows, lengths of prefill rows, room for rows and for tokens
CASES: Final = [
    (1, [], 1, 1),
    (3, [], 4, 4),
    (300, [], 304, 304),
    (600, [], 600, 600),
    (0, [1], 16, 16),
    (0, [100], 128, 128),
    (2, [1, 5, 1], 16, 16),
    (15, [1], 16, 16),
    (40, [7] * 20, 256, 256),
    (590, [1, 2, 3, 60], 600, 768),
    (100, [1000, 3], 600, 1400),
]


@pytest.mark.parametrize(("num_decode", "lengths", "rows", "tokens"), CASES)
def test_inputs_are_those_of_torch_and_the_rest_is_padding(
    num_decode: int, lengths: list[int], rows: int, tokens: int
) -> None:
    from executor.unpack_kernel import Unpack

    for seed, (admits, deltas) in enumerate([(0, 0), (2, 3), (70, 700)]):
        plan = random_plan(np.random.default_rng(seed), num_decode, lengths, admits, deltas)
        (want, want_sampler), (got, got_sampler) = (random_slots(np.random.default_rng(seed)) for _ in range(2))
        staged = stage(plan)
        apply_slots(staged, want, want_sampler)
        expected = build_inputs(staged, want)
        unpack = Unpack(got, got_sampler.tables.params, LIMITS)
        memory = poisoned(unpack)
        decode = rows if not lengths else min(rows, tokens - 1)
        inputs = unpack.room(rows=rows, decode=decode, prefill=len(lengths), tokens=tokens)
        unpack.point(staged.staged)
        unpack.fill(inputs)
        check_planned(inputs, expected)
        check_padding(inputs, expected, got.null_slot)
        for name, tensor in memory.items():
            assert (tensor[len(getattr(inputs, name)) :] == POISON).all(), name
        for name in ("position", "last_token", "block_table"):
            assert torch.equal(getattr(got, name), getattr(want, name)), name
        assert torch.equal(got_sampler.tables.params, want_sampler.tables.params)
        assert int(got.position[got.null_slot]) == 0


def check_planned(inputs: StepInputs, expected: StepInputs) -> None:
    for name in WRITTEN:
        ours, theirs = getattr(inputs, name), getattr(expected, name)
        assert ours.dtype == theirs.dtype, name
        assert ours[: len(theirs)].tolist() == theirs.tolist(), name


def check_padding(inputs: StepInputs, expected: StepInputs, null_slot: int) -> None:
    rows, tokens = expected.num_rows, expected.num_tokens
    assert (inputs.row_slot[rows:] == null_slot).all()
    assert (inputs.positions[tokens:] == 0).all()
    assert (inputs.slot_mapping[tokens:] == NULL_BLOCK).all()
    assert ((inputs.token_ids[tokens:] >= 0) & (inputs.token_ids[tokens:] < VOCAB)).all()
    assert ((inputs.last_index >= 0) & (inputs.last_index < inputs.num_tokens)).all()
    if inputs.decode_only:  # each a row of one token
        assert inputs.counts.tolist() == [inputs.num_rows] * 2
        assert inputs.query_start.tolist() == list(range(inputs.num_rows + 1))
        assert (inputs.kv_len[rows:] == 1).all()
    else:
        assert inputs.counts.tolist() == [rows, expected.num_decode]
        assert (inputs.query_start[rows:] == tokens).all()
        assert (inputs.kv_len[rows:] == 0).all()


def test_each_launch_reads_the_plan_it_is_pointed_at_and_any_address_comes_through() -> None:
    from executor.unpack_kernel import Unpack

    (want, want_sampler), (got, got_sampler) = (random_slots(np.random.default_rng(3)) for _ in range(2))
    unpack = Unpack(got, got_sampler.tables.params, LIMITS)
    for seed, address in enumerate([0, 0x7F0123456784, 1, 16, 1 << 31, 0]):
        lengths = [5] * (seed % 2)
        staged = stage(random_plan(np.random.default_rng(seed), 3, lengths, 2, 3))
        apply_slots(staged, want, want_sampler)
        inputs = unpack.room(rows=8, decode=8 - len(lengths), prefill=len(lengths), tokens=8)
        unpack.point(staged.staged, address)
        unpack.fill(inputs)
        assert unpack.token_address.tolist() == [address]
        check_planned(inputs, build_inputs(staged, want))
        for name in ("position", "block_table"):
            assert torch.equal(getattr(got, name), getattr(want, name)), name


def test_greedy_tokens_go_where_the_step_was_pointed() -> None:
    from executor.unpack_kernel import Unpack

    state, sampler = random_slots(np.random.default_rng(1))
    unpack = Unpack(state, sampler.tables.params, LIMITS)
    inputs = unpack.room(rows=4, decode=4, prefill=0, tokens=4)
    staged = stage(synthetic_plan([1] * 3, 3, PlanFlag.NONE))
    lanes = torch.full((2, 4), POISON, dtype=torch.int32, device=DEVICE)
    for lane, token in ((0, 7), (1, 9), (0, 11)):
        logits = torch.zeros(4, VOCAB, device=DEVICE)
        logits[torch.arange(4), token + torch.arange(4)] = 1.0
        other = lanes[1 - lane].clone()
        unpack.point(staged.staged, lanes[lane].data_ptr())
        unpack.fill(inputs)
        sampler.sample_greedy(logits, inputs.row_slot, unpack.token_address)
        assert lanes[lane].tolist() == [token, token + 1, token + 2, token + 3]
        assert torch.equal(lanes[1 - lane], other)
        assert state.last_token[:3].tolist() == [token, token + 1, token + 2]
    unpack.point(staged.staged)
    unpack.fill(inputs)
    before, carried = lanes.clone(), state.last_token.clone()
    sampler.sample_greedy(torch.rand(4, VOCAB, device=DEVICE), inputs.row_slot, unpack.token_address)
    assert torch.equal(lanes, before)
    assert torch.equal(state.last_token, carried)


@pytest.mark.parametrize(
    ("num_decode", "lengths", "tokens"),
    [(4, [9, 30], 64), (5, [100, 25], 192), (21, [], 21), (400, [1000], LIMITS.max_tokens)],
)
def test_an_eager_step_has_room_for_its_rows_alone_and_its_scores_come_last(
    num_decode: int, lengths: list[int], tokens: int
) -> None:
    from executor.unpack_kernel import Unpack

    rng = np.random.default_rng(5)
    plan = random_plan(rng, num_decode, lengths, 2, 10)
    plan.score_index, plan.score_token = (np.array(values, np.int32) for values in ([5, 6, 20], [1, 2, 3]))
    want, sampler = random_slots(np.random.default_rng(6))
    got, _ = random_slots(np.random.default_rng(6))
    staged = stage(plan)
    apply_slots(staged, want, sampler)
    expected = build_inputs(staged, want)
    unpack = Unpack(got, sampler.tables.params, LIMITS)
    poisoned(unpack)
    inputs = unpack.eager(staged)
    assert inputs.has_exact_rows
    for name in ("num_rows", "num_decode", "num_prefill"):
        assert getattr(inputs, name) == getattr(expected, name), name
    assert inputs.num_tokens == len(inputs.token_ids) == tokens
    check_planned(inputs, expected)
    check_padding(inputs, expected, got.null_slot)
    assert inputs.last_index[-3:].tolist() == [5, 6, 20]


def test_inputs_of_nothing_are_padding_alone() -> None:
    from executor.unpack_kernel import Unpack

    state, sampler = random_slots(np.random.default_rng(1))
    before = state.position.clone()
    unpack = Unpack(state, sampler.tables.params, LIMITS)
    poisoned(unpack)
    for room in ((8, 8, 0, 8), (16, 15, 16, 16)):
        inputs = unpack.room(rows=room[0], decode=room[1], prefill=room[2], tokens=room[3])
        unpack.point_at_nothing()
        unpack.fill(inputs)
        assert (inputs.row_slot == state.null_slot).all()
        assert (inputs.slot_mapping == NULL_BLOCK).all()
        assert inputs.counts.tolist() == ([8, 8] if inputs.decode_only else [0, 0])
    assert torch.equal(state.position, before)


def test_there_is_no_room_beyond_the_memory() -> None:
    from executor.unpack_kernel import Unpack

    state, sampler = random_slots(np.random.default_rng(1))
    unpack = Unpack(state, sampler.tables.params, LIMITS)
    with pytest.raises(AssertionError, match=f"room for {LIMITS.max_tokens + 1} tokens"):
        unpack.room(rows=1, decode=0, prefill=1, tokens=LIMITS.max_tokens + 1)
    with pytest.raises(AssertionError, match=f"room for {LIMITS.max_rows + 1} rows"):
        unpack.room(rows=LIMITS.max_rows + 1, decode=0, prefill=1, tokens=LIMITS.max_tokens)
