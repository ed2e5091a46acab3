"""Every rule of in-flight work by name, at depths 2 and 3: finish, abort, preemption, admission."""

from __future__ import annotations

import pytest

from ipc.errors import ContextLengthError, InvalidParameterError, OverloadedError, UnavailableError
from ipc.frames import INVALID_TOKEN
from ipc.schema import FinishReason
from scheduler.depth import PipelineDepth
from scheduler.planner import make_plan
from scheduler.request import State
from tests.scheduler.pipeline import Pipeline, tiny_config
from tests.scheduler.simulated_gpu import EOS, next_token, sequential_oracle

depths = pytest.mark.parametrize("depth", [2, 3])


def prompt_that(predicate: object, max_tokens: int = 20) -> list[int]:
    """The first short prompt whose oracle output satisfies `predicate`."""
    for a in range(1, 29):
        for b in range(1, 29):
            if predicate(sequential_oracle([a, b], max_tokens)):  # type: ignore[operator]
                return [a, b]
    raise AssertionError("no such prompt")


LONG = prompt_that(lambda out: len(out) == 20 and EOS not in out)
ENDS_THIRD = prompt_that(lambda out: len(out) == 3 and out[-1] == EOS)


def advance(pipeline: Pipeline, tokens: int) -> None:
    """Run until every request has this many tokens."""
    for _ in range(1000):
        if min(len(outcome.tokens) for outcome in pipeline.outcomes.values()) >= tokens:
            return
        pipeline.plan()
        pipeline.run()
        pipeline.retire()
    raise AssertionError(f"no {tokens} tokens each, but {pipeline.outcomes}")


def fill_pipeline(pipeline: Pipeline) -> int:
    """Plan until nothing more can be planned; returns the plans in flight."""
    while pipeline.plan():
        pass
    return len(pipeline.state.inflight)


@depths
def test_in_flight_finish_drops_the_rows_that_ran_on(depth: int) -> None:
    pipeline = Pipeline(tiny_config(pipeline_depth=depth))
    pipeline.admit(1, ENDS_THIRD, max_tokens=20)
    assert fill_pipeline(pipeline) == depth
    pipeline.drain()
    outcome = pipeline.outcomes[1]
    assert outcome.tokens == sequential_oracle(ENDS_THIRD, 20)
    assert outcome.finish is FinishReason.STOP
    assert pipeline.state.counters.overshoot_rows == depth - 1


@depths
def test_a_known_end_is_never_planned_past(depth: int) -> None:
    pipeline = Pipeline(tiny_config(pipeline_depth=depth))
    pipeline.admit(1, LONG, max_tokens=2)
    assert fill_pipeline(pipeline) == 2
    pipeline.drain()
    assert pipeline.outcomes[1].finish is FinishReason.LENGTH
    assert pipeline.state.counters.overshoot_rows == 0


@depths
def test_in_flight_abort_frees_at_once_and_hides_late_rows(depth: int) -> None:
    pipeline = Pipeline(tiny_config(pipeline_depth=depth, max_num_seqs=1))
    pipeline.admit(1, LONG, max_tokens=20)
    assert fill_pipeline(pipeline) == depth
    assert pipeline.abort(1)
    assert pipeline.state.pool.num_free == pipeline.state.pool.capacity
    pipeline.admit(2, ENDS_THIRD, max_tokens=20)  # takes the very slot whose rows are still in flight
    pipeline.drain()
    assert pipeline.outcomes[1].tokens == []
    assert pipeline.outcomes[2].tokens == sequential_oracle(ENDS_THIRD, 20)
    assert pipeline.state.counters.overshoot_rows >= depth


def test_depth_0_is_two_and_three_while_steps_are_short() -> None:
    depth = PipelineDepth(0)
    assert depth.steps == 2
    for device_ns, steps in ((1_000_000, 3), (1_700_000, 3), (5_000_000, 2), (1_700_000, 2), (100_000, 3)):
        for _ in range(100):
            depth.observe(device_ns)
        assert depth.steps == steps
    fixed = PipelineDepth(1)
    fixed.observe(100_000)
    assert fixed.steps == 1


@depths
def test_in_flight_preemption_keeps_tokens_and_repeats_none(depth: int) -> None:
    pipeline = Pipeline(tiny_config(pipeline_depth=depth, num_blocks=7, enable_prefix_caching=False))
    for request_id in (1, 2):
        pipeline.admit(request_id, LONG, max_tokens=20)
    in_flight_when_preempted = 0
    for _ in range(1000):
        before = pipeline.state.counters.preemptions
        while pipeline.plan():
            pass
        if pipeline.state.counters.preemptions > before:
            in_flight_when_preempted = max(in_flight_when_preempted, len(pipeline.state.inflight))
        if not (pipeline.run() | pipeline.retire()):
            break
    assert pipeline.state.counters.preemptions > 0
    assert in_flight_when_preempted == depth
    for request_id in (1, 2):
        assert pipeline.outcomes[request_id].tokens == sequential_oracle(LONG, 20)


@depths
def test_in_flight_admission_joins_the_next_plan(depth: int) -> None:
    pipeline = Pipeline(tiny_config(pipeline_depth=depth))
    pipeline.admit(1, LONG, max_tokens=20)
    assert pipeline.plan()
    pipeline.admit(2, ENDS_THIRD, max_tokens=20)
    assert pipeline.plan()
    plan, _ = pipeline.queued[-1]
    assert plan.num_rows == 2
    assert plan.num_decode == 1
    pipeline.drain()
    assert pipeline.outcomes[1].tokens == sequential_oracle(LONG, 20)
    assert pipeline.outcomes[2].tokens == sequential_oracle(ENDS_THIRD, 20)


def test_preempted_requests_return_before_new_ones() -> None:
    pipeline = Pipeline(tiny_config(num_blocks=7, enable_prefix_caching=False))
    first, second = (pipeline.admit(i, LONG, max_tokens=20) for i in (1, 2))
    while not pipeline.state.counters.preemptions:
        pipeline.plan()
        pipeline.run()
        pipeline.retire()
    late = pipeline.admit(3, [1], max_tokens=1)
    assert (first.state, second.state) == (State.RUNNING, State.WAITING)
    assert pipeline.state.queue.head() is second
    pipeline.drain()
    assert late.state is State.DONE


def test_lowest_priority_is_preempted_first() -> None:
    pipeline = Pipeline(tiny_config(num_blocks=7, enable_prefix_caching=False))
    urgent = pipeline.admit(2, LONG, max_tokens=20)
    background = pipeline.admit(1, LONG, max_tokens=20)
    background.priority, urgent.priority = 5, 0
    while not pipeline.state.counters.preemptions:
        pipeline.plan()
        pipeline.run()
        pipeline.retire()
    assert urgent.state is State.RUNNING
    assert background.state is State.WAITING
    pipeline.drain()


def test_one_budget_covers_decode_rows_and_chunks() -> None:
    pipeline = Pipeline(tiny_config(max_num_batched_tokens=8, pipeline_depth=1))
    pipeline.admit(1, LONG, max_tokens=20)
    pipeline.plan()
    pipeline.admit(2, [1] * 20, max_tokens=1)
    pipeline.run()
    pipeline.retire()
    pipeline.plan()
    plan, _ = pipeline.queued[-1]
    assert (plan.num_decode, plan.num_tokens, plan.row_sample.tolist()) == (1, 8, [1, 0])
    pipeline.drain()


def test_scores_are_planned_only_as_far_as_the_result_has_room() -> None:
    pipeline = Pipeline(tiny_config(max_num_seqs=2, max_num_batched_tokens=64, num_blocks=40))
    room = pipeline.state.limits.max_results
    prompt = [1 + i % 7 for i in range(60)]
    for request_id in (1, 2):
        pipeline.admit(request_id, prompt, max_tokens=2, prompt_logprobs=0)
    pipeline.plan()
    plan, _ = pipeline.queued[-1]
    assert (plan.num_rows, len(plan.score_index), plan.num_tokens) == (1, room - 1, room - 1)
    pipeline.drain()
    for outcome in pipeline.outcomes.values():
        assert outcome.scores == [(prompt[i], next_token(prompt[:i])) for i in range(1, 60)]


def test_a_head_that_waits_for_blocks_looks_its_prefix_up_again_only_when_there_are_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipeline = Pipeline(tiny_config(num_blocks=9))
    state, looked_up = pipeline.state, [0]
    find = state.pool.find_prefix
    monkeypatch.setattr(
        type(state.pool), "find_prefix", lambda pool, chain: looked_up.append(len(chain)) or find(chain)
    )
    pipeline.admit(1, LONG, max_tokens=18)
    pipeline.admit(2, LONG + [1] * 28, max_tokens=2)
    while pipeline.outcomes[1].finish is FinishReason.RUNNING:
        pipeline.plan()
        pipeline.run()
        pipeline.retire()
    assert state.blocked[0] is not None, "it was never blocked"
    assert looked_up == [0, 0, 7], "of each request once, and of none while it waited"
    pipeline.drain()
    assert pipeline.outcomes[2].finish is FinishReason.LENGTH
    assert len(looked_up) == 4


def test_prefix_hits_are_counted_and_salted() -> None:
    pipeline = Pipeline(tiny_config(num_blocks=40))
    prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    for request_id, salt in ((1, ""), (2, ""), (3, "other"), (4, "other")):
        pipeline.admit(request_id, prompt, max_tokens=1, salt=salt)
        pipeline.plan()
        pipeline.run()
        pipeline.retire()
    assert [cached for _, _, cached in pipeline.state.started] == [0, 8, 0, 8]


def test_generated_blocks_are_found_by_a_follow_up() -> None:
    pipeline = Pipeline(tiny_config(num_blocks=40))
    pipeline.admit(1, LONG, max_tokens=12)
    pipeline.drain()
    pipeline.admit(2, LONG + pipeline.outcomes[1].tokens, max_tokens=1)
    pipeline.plan()
    assert pipeline.state.started[-1][2] == 12
    pipeline.drain()


def test_nan_logits_fail_one_request_alone() -> None:
    pipeline = Pipeline(tiny_config(pipeline_depth=1))
    for request_id in (1, 2):
        pipeline.admit(request_id, LONG, max_tokens=4)
    pipeline.plan()
    pipeline.run()
    pipeline.done[0].token[0] = INVALID_TOKEN
    pipeline.retire()
    pipeline.drain()
    assert pipeline.outcomes[1].finish is FinishReason.INVALID_LOGITS
    assert pipeline.outcomes[2].tokens == sequential_oracle(LONG, 4)


def test_nobody_finds_what_a_row_computed_that_came_to_nan() -> None:
    pipeline = Pipeline(tiny_config(num_blocks=40, pipeline_depth=1))
    prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    pipeline.admit(1, prompt, max_tokens=4)
    for _ in range(2):  # its prompt is in the prefix index when it fails
        pipeline.plan()
        pipeline.run()
        if pipeline.state.slots.known[0] > len(prompt):
            pipeline.done[0].token[0] = INVALID_TOKEN
        pipeline.retire()
    assert pipeline.outcomes[1].finish is FinishReason.INVALID_LOGITS
    pipeline.admit(2, prompt, max_tokens=2)
    pipeline.drain()
    assert [cached for _, _, cached in pipeline.state.started] == [0, 0]
    assert pipeline.outcomes[2].tokens == sequential_oracle(prompt, 2)
    pipeline.admit(3, prompt, max_tokens=2)
    pipeline.drain()
    assert pipeline.state.started[-1][2] == 8, "what was computed again is found"


def test_impossible_requests_are_refused_with_both_numbers() -> None:
    pipeline = Pipeline(tiny_config(num_blocks=5, max_num_queued_reqs=1))
    with pytest.raises(ContextLengthError, match=r"16 tokens; you requested 30 \(20 prompt \+ 10 completion\)"):
        pipeline.admit(1, [1] * 20, max_tokens=10)
    with pytest.raises(InvalidParameterError, match=r"token id 29 is outside the vocabulary 0\.\.28"):
        pipeline.admit(1, [29], max_tokens=1)
    with pytest.raises(InvalidParameterError, match="empty"):
        pipeline.admit(1, [], max_tokens=1)
    for bad in (
        {"max_tokens": 0},
        {"top_p": float("nan")},
        {"logprobs": 99},
        {"seed": 2**63},
        {"logit_bias": {99: 1.0}},
        {"logit_bias": {1: 1e300}},
        {"stop_token_ids": (1,) * 10_000},
        {"repetition_penalty": 0.0},
        {"prompt_logprobs": 5},
    ):
        with pytest.raises(InvalidParameterError):
            pipeline.admit(1, [1], **{"max_tokens": 1, **bad})
    pipeline.admit(1, [1], max_tokens=1)
    with pytest.raises(OverloadedError, match="1 requests wait, the limit is 1"):
        pipeline.admit(2, [1], max_tokens=1)
    pipeline.state.draining = True
    with pytest.raises(UnavailableError):
        pipeline.admit(3, [1], max_tokens=1)
    pipeline.drain()


def test_a_request_that_no_longer_fits_a_new_executor_is_named() -> None:
    pipeline = Pipeline(tiny_config())
    big = pipeline.admit(1, [1] * 30, max_tokens=10)
    pipeline.state.executor_lost()
    assert list(pipeline.state.executor_attached(2, 6)) == [big]


def test_replayed_output_counts_towards_the_limit() -> None:
    whole = sequential_oracle(LONG, 10)
    pipeline = Pipeline(tiny_config())
    pipeline.admit(1, LONG, max_tokens=10)
    while len(pipeline.outcomes[1].tokens) < 4:
        pipeline.plan()
        pipeline.run()
        pipeline.retire()
    pipeline.crash()
    pipeline.drain()
    assert pipeline.outcomes[1].tokens == whole
    assert make_plan(pipeline.state) is None


def test_a_request_that_crashes_its_steps_is_given_up_alone() -> None:
    """Two crashes, whoever was beside it; then everyone else goes on with the tokens they had."""
    pipeline = Pipeline(tiny_config(num_blocks=40))
    for request_id in range(1, 5):
        pipeline.admit(request_id, LONG, max_tokens=20)
    advance(pipeline, 5)
    bad = pipeline.state.requests[0, 3]
    crashes = 0
    for _ in range(1000):
        while pipeline.plan():
            pass
        if pipeline.queued and bad.slot in pipeline.queued[0][0].row_slot:
            rows = pipeline.queued[0][0].num_rows
            pipeline.crash()
            crashes += 1
            continue
        if not (pipeline.run() | pipeline.retire()):
            break
    assert crashes == 2
    assert rows == 1, "the second time it ran alone"
    assert pipeline.outcomes.pop(3).finish is FinishReason.CRASHED
    for outcome in pipeline.outcomes.values():
        assert (outcome.tokens, outcome.finish) == (sequential_oracle(LONG, 20), FinishReason.LENGTH)


def test_suspects_run_one_at_a_time_until_each_has_two_more_tokens() -> None:
    pipeline = Pipeline(tiny_config(num_blocks=40))
    for request_id in (1, 2, 3):
        pipeline.admit(request_id, LONG, max_tokens=20)
    fill_pipeline(pipeline)
    pipeline.crash()
    pipeline.admit(4, ENDS_THIRD, max_tokens=20)
    seen: list[int] = []
    last = pipeline.state.requests[0, 3]
    for _ in range(1000):
        if not last.strikes:
            break
        while pipeline.plan():
            plan, _ = pipeline.queued[-1]
            assert plan.num_rows == 1
            request = pipeline.state.slots.request[int(plan.row_slot[0])]
            assert request is not None
            seen.append(request.request_id)
        pipeline.run()
        pipeline.retire()
    assert sorted(set(seen), key=seen.index) == [1, 2, 3]
    assert seen == sorted(seen)
    assert not last.strikes and all(len(pipeline.outcomes[i].tokens) >= 2 for i in (1, 2, 3))
    pipeline.drain()
    assert pipeline.outcomes[4].tokens == sequential_oracle(ENDS_THIRD, 20)


def test_a_suspect_gets_the_blocks_of_those_that_were_acquitted() -> None:
    pipeline = Pipeline(tiny_config(num_blocks=12, enable_prefix_caching=False))
    for request_id in (1, 2):
        pipeline.admit(request_id, LONG, max_tokens=20)
    advance(pipeline, 16)
    pipeline.crash()
    pipeline.drain()
    for request_id in (1, 2):
        assert pipeline.outcomes[request_id].tokens == sequential_oracle(LONG, 20)


def test_a_replay_is_taken_by_a_full_or_draining_scheduler() -> None:
    pipeline = Pipeline(tiny_config(max_num_queued_reqs=1))
    pipeline.admit(1, LONG, max_tokens=20)
    advance(pipeline, 4)
    pipeline.scheduler_crash()
    pipeline.abort(1)
    pipeline.admit(2, LONG, max_tokens=20)
    with pytest.raises(OverloadedError):
        pipeline.admit(3, LONG, max_tokens=20)
    pipeline.state.draining = True
    pipeline.outcomes[1].finish = FinishReason.RUNNING
    pipeline.replay(1)
    pipeline.drain()
    assert pipeline.outcomes[1].tokens == sequential_oracle(LONG, 20)
    assert pipeline.state.counters.prompt_tokens == len(LONG), "that of a replay was counted when it first came"
