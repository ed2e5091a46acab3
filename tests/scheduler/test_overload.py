"""More work than there is room for: what is refused, and that whatever was taken runs in the end."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipc.errors import OverloadedError
from ipc.schema import Admit, SamplingParams, pack_tokens
from scheduler.request import ARRIVALS_PER_PRIORITY, Request, State
from scheduler.state import SchedulerState
from tests.scheduler.pipeline import Outcome, Pipeline, tiny_config


def admit(state: SchedulerState, request_id: int, prompt: int = 2, max_tokens: int = 2, priority: int = 0) -> Request:
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    return state.admit(0, Admit(request_id, pack_tokens([1] * prompt), params, priority))


def test_the_queue_is_limited_in_requests_and_in_tokens() -> None:
    state = Pipeline(tiny_config(max_num_queued_reqs=3, max_num_queued_tokens=20)).state
    admit(state, 1, prompt=12)
    with pytest.raises(OverloadedError, match=r"21 tokens would wait, the limit is 20 \(12 wait\)"):
        admit(state, 2, prompt=9)
    admit(state, 3, prompt=8)
    state.abort(0, 3)
    admit(state, 4, prompt=4)
    admit(state, 5, prompt=4)
    with pytest.raises(OverloadedError, match="3 requests wait, the limit is 3"):
        admit(state, 6, prompt=1)
    state.abort(0, 1)
    admit(state, 7, prompt=1)


def test_an_empty_queue_takes_a_prompt_of_any_length() -> None:
    state = Pipeline(tiny_config(max_num_queued_tokens=5)).state
    admit(state, 1, prompt=30)
    with pytest.raises(OverloadedError):
        admit(state, 2, prompt=1)


def test_requests_that_wait_for_their_grammar_count_too() -> None:
    state = Pipeline(tiny_config(max_num_queued_tokens=30)).state
    params = SamplingParams(max_tokens=2, temperature=0.0)
    state.admit(0, Admit(1, pack_tokens([1] * 20), params, grammar="any"))
    assert (state.load, state.num_waiting_tokens) == ((0, 1, 20), 20)
    with pytest.raises(OverloadedError, match=r"31 tokens would wait, the limit is 30 \(20 wait\)"):
        admit(state, 2, prompt=11)
    state.abort(0, 1)
    assert state.num_waiting_tokens == 0


def test_a_queue_forgets_what_was_aborted_behind_its_head() -> None:
    state = Pipeline(tiny_config()).state
    kept = [admit(state, i) for i in range(5)]
    for i in range(5, 2000):
        admit(state, i)
        state.abort(0, i)
        assert len(state.queue._heap) < 100
    assert [state.queue.pop() for _ in kept] == kept


def later_ones_that_ran_first(pipeline: Pipeline, patient: Request, rival: dict[str, int]) -> int:
    """Runs with a queue that never empties of newer `rival`s until `patient` is done; how many overtook it."""
    state, rivals, overtook = pipeline.state, [patient], set[int]()
    for _ in range(5000):
        while len(state.queue) < 6:
            pipeline.outcomes[len(rivals)] = Outcome()
            rivals.append(admit(state, len(rivals), **rival))
        pipeline.plan()
        pipeline.run()
        pipeline.retire()
        if not patient.started_ns:
            overtook |= {request.request_id for request in rivals if request.started_ns}
        if patient.state is State.DONE:
            return len(overtook)
    raise AssertionError("it starved")


@pytest.mark.parametrize("depth", [1, 2])
def test_a_long_request_is_not_starved_by_short_ones(depth: int) -> None:
    """It needs nearly all blocks; nobody overtakes the head of the queue, so they become free."""
    pipeline = Pipeline(tiny_config(pipeline_depth=depth, max_prefill_chunk=4))
    for i in range(100, 104):
        pipeline.outcomes[i] = Outcome()
        admit(pipeline.state, i)
    pipeline.outcomes[0] = Outcome()
    long = admit(pipeline.state, 0, prompt=44, max_tokens=20)
    assert later_ones_that_ran_first(pipeline, long, {"prompt": 2, "max_tokens": 2}) == 0


@pytest.mark.parametrize("priority", [1, 2, 5])
def test_a_request_of_low_priority_is_overtaken_by_a_bounded_number(
    monkeypatch: pytest.MonkeyPatch, priority: int
) -> None:
    monkeypatch.setattr("scheduler.request.ARRIVALS_PER_PRIORITY", 20)
    pipeline = Pipeline(tiny_config())
    pipeline.outcomes[0] = Outcome()
    patient = admit(pipeline.state, 0, priority=priority)
    overtook = later_ones_that_ran_first(pipeline, patient, {"priority": 0})
    assert 20 * priority - 6 <= overtook <= 20 * priority


@given(st.integers(-5, 5), st.integers(-5, 5), st.integers(0, 20_000))
def test_priority_is_worth_a_number_of_arrivals(mine: int, others: int, arrivals: int) -> None:
    state = SchedulerState(tiny_config())
    first, later = admit(state, 1, priority=mine), admit(state, 2, priority=others)
    later.arrival = first.arrival + arrivals + 1
    assert (later.order < first.order) == (arrivals + 1 < ARRIVALS_PER_PRIORITY * (mine - others))
