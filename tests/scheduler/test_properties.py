"""The real scheduler against a sequential oracle: any interleaving of arrivals, plans, results, aborts and crashes."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ipc.errors import ProtocolError
from ipc.schema import Admit, FinishReason
from scheduler import planner, retire, state
from scheduler.blocks import BlockPool
from tests.scheduler.pipeline import Pipeline, tiny_config
from tests.scheduler.simulated_gpu import EOS, VOCAB, next_token, sequential_oracle


def trial(seed: int, totals: Counter[str] | None = None) -> None:
    """One random life of a replica; raises AssertionError on any deviation from the oracle."""
    rng = random.Random(seed)
    blocks, block_size = rng.randint(7, 40), rng.choice([2, 4])
    pipeline = Pipeline(
        tiny_config(
            num_blocks=blocks + 1,
            block_size=block_size,
            max_num_seqs=rng.randint(1, 6),
            max_num_batched_tokens=rng.randint(1, 24),
            max_prefill_chunk=rng.choice([None, 1, 5]),
            pipeline_depth=rng.randint(0, 3),
            enable_prefix_caching=rng.random() < 0.8,
        )
    )
    shared = [rng.randrange(1, VOCAB) for _ in range(40)]
    asked: dict[int, tuple[list[int], int, frozenset[int], str]] = {}
    scored = {request_id for request_id in range(12) if rng.random() < 0.3}
    for request_id in range(rng.randint(1, 12)):
        length = rng.randint(1, min(20, blocks * block_size - 2))
        prompt = (shared[: rng.randint(0, length)] + [rng.randrange(1, VOCAB) for _ in range(length)])[:length]
        stop_ids = frozenset(rng.sample(range(1, VOCAB), rng.choice([0, 0, 2])))
        grammar = rng.choice(["", "", "", f"grammar {request_id}"])
        asked[request_id] = prompt, rng.randint(1, min(24, blocks * block_size - length)), stop_ids, grammar
    waiting = list(asked)
    moves = ("match", "plan", "run", "retire")
    pace = {move: rng.choice([0.05, 0.5, 0.8, 1.0]) for move in moves}  # 0.05: a stalled process
    aborts = crashes = scheduler_crashes = 0
    for turn in range(30_000):
        eventful = (
            turn < 1000
        )  # then nothing but progress empties the engine: an abort or a crash would hide a livelock
        if not waiting and not pipeline.state.requests and not pipeline.state.inflight:
            break
        if waiting and rng.random() < 0.5:
            request_id = waiting.pop()
            prompt, max_tokens, stop_ids, grammar = asked[request_id]
            pipeline.admit(
                request_id,
                prompt,
                grammar=grammar,
                max_tokens=max_tokens,
                stop_token_ids=tuple(stop_ids),
                prompt_logprobs=0 if request_id in scored else -1,
            )
        if eventful and rng.random() < 0.02:
            aborts += pipeline.abort(rng.randrange(len(asked)))
        if eventful and rng.random() < 0.01:
            pipeline.crash()
            crashes += 1
        if eventful and rng.random() < 0.01:
            pipeline.scheduler_crash()
            scheduler_crashes += 1
        if rng.random() < pace["match"]:
            pipeline.match()
        moved = pipeline.plan() if rng.random() < pace["plan"] else False
        if rng.random() < pace["run"]:
            moved |= pipeline.run()
        if rng.random() < pace["retire"] or not moved:
            pipeline.retire()
    assert not waiting and not pipeline.state.requests, "livelock"
    assert pipeline.state.pool.num_free == pipeline.state.pool.capacity, "blocks leaked"
    for request_id, (prompt, max_tokens, stop_ids, grammar) in asked.items():
        outcome, expected = pipeline.outcomes[request_id], sequential_oracle(prompt, max_tokens, stop_ids, grammar)
        scores = [(prompt[i], next_token(prompt[:i])) for i in range(1, len(prompt))] if request_id in scored else []
        given_up = outcome.finish in (FinishReason.ABORTED, FinishReason.CRASHED)
        complete = bool(outcome.tokens) or not given_up
        assert outcome.scores == (scores if complete else scores[: len(outcome.scores)])
        if given_up:
            assert outcome.tokens == expected[: len(outcome.tokens)]
        else:
            assert outcome.tokens == expected
            ended = expected[-1] == EOS or expected[-1] in stop_ids
            assert outcome.finish is (FinishReason.STOP if ended else FinishReason.LENGTH)
    if totals is not None:
        counters = pipeline.state.counters
        totals.update(
            preemptions=counters.preemptions,
            hits=counters.prefix_hit_tokens,
            scores=sum(len(outcome.scores) for outcome in pipeline.outcomes.values()),
            overshoot=counters.overshoot_rows,
            aborts=aborts,
            crashes=crashes,
            scheduler_crashes=scheduler_crashes,
            given_up=sum(outcome.finish is FinishReason.CRASHED for outcome in pipeline.outcomes.values()),
            grammar_rows=pipeline.grammar_rows,
        )


@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 2**32))
def test_matches_the_oracle(seed: int) -> None:
    trial(seed)


def test_every_rule_is_exercised() -> None:
    totals: Counter[str] = Counter()
    for seed in range(1100):
        trial(seed, totals)
    assert min(totals.values()) > 50, totals


def _drop_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A finished request's row in flight is taken for its slot's next owner."""
    vacate = state.SlotTable.vacate

    def same_generation(slots: state.SlotTable, slot: int) -> list[int]:
        blocks = vacate(slots, slot)
        slots.generation[slot] -= 1
        return blocks

    monkeypatch.setattr(state.SlotTable, "vacate", same_generation)


def _plan_past_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last token is not known ahead: the row runs once too often."""
    occupy = state.SlotTable.occupy

    def one_more(slots: state.SlotTable, request: object, blocks: list[int], computed: int) -> int:
        slot = occupy(slots, request, blocks, computed)  # type: ignore[arg-type]
        slots.limit[slot] += 1
        return slot

    monkeypatch.setattr(state.SlotTable, "occupy", one_more)


def _register_unwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks become visible to the plan that is still writing them."""
    place = planner._place

    def visible_at_once(*args: object) -> None:
        place(*args)  # type: ignore[arg-type]
        scheduler, request = args[0], args[2]
        for i, digest in enumerate(request.chain):  # type: ignore[attr-defined]
            scheduler.pool.register(int(scheduler.slots.block_table[request.slot, i]), digest)  # type: ignore[attr-defined]

    monkeypatch.setattr(planner, "_place", visible_at_once)


def _keep_cache_over_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    """The prefix index outlives the memory it describes."""

    def attached(scheduler: state.SchedulerState, epoch: int, num_blocks: int) -> list[object]:
        scheduler.epoch, scheduler.attached = epoch, True
        old, scheduler.pool = scheduler.pool, BlockPool(num_blocks)
        for digest, block in old.block_of.items():
            scheduler.pool.register(block, digest)
        return []

    def lost(scheduler: state.SchedulerState) -> list[state.Request]:
        pool = scheduler.pool
        crashed = original(scheduler)
        scheduler.pool = pool
        return crashed

    original = state.SchedulerState.executor_lost
    monkeypatch.setattr(state.SchedulerState, "executor_lost", lost)
    monkeypatch.setattr(state.SchedulerState, "executor_attached", attached)


def _use_last_block_of_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt that is cached to its last token leaves no token to run."""

    def whole(scheduler: state.SchedulerState, request: state.Request) -> list[int]:
        return scheduler.pool.find_prefix(request.chain)

    monkeypatch.setattr(planner, "_find_prefix", whole)


def _forget_output_on_preemption(monkeypatch: pytest.MonkeyPatch) -> None:
    preempt = state.SchedulerState.preempt

    def lossy(scheduler: state.SchedulerState, request: state.Request) -> None:
        preempt(scheduler, request)
        request.tokens = request.tokens[: request.prompt_len]

    monkeypatch.setattr(state.SchedulerState, "preempt", lossy)


def _forget_output_on_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens that frontends have are sampled and sent once more."""
    lost = state.SchedulerState.executor_lost

    def lossy(scheduler: state.SchedulerState) -> list[state.Request]:
        running = [scheduler.slots.request[slot] for slot in scheduler.slots.running.tolist()]
        crashed = lost(scheduler)
        for request in running:
            assert request is not None
            request.tokens = request.tokens[: request.prompt_len]
        return crashed

    monkeypatch.setattr(state.SchedulerState, "executor_lost", lossy)


def _leak_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    release = BlockPool.release
    monkeypatch.setattr(
        BlockPool, "release", lambda pool, blocks: release(pool, blocks[: len(blocks) // 8 * 8 or None])
    )


def _let_the_head_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that needs more than half of the cache is never admitted, and no one overtakes it."""
    admit_waiting = planner._admit_waiting

    def picky(scheduler: state.SchedulerState, draft: planner._Draft) -> None:
        head = scheduler.queue.head()
        if head is None or 2 * len(head.tokens) < scheduler.max_seq_len:
            admit_waiting(scheduler, draft)

    monkeypatch.setattr(planner, "_admit_waiting", picky)


def _forget_output_on_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens that a frontend already has are sent to it again."""
    admit = state.SchedulerState.admit

    def lossy(scheduler: state.SchedulerState, peer: int, message: Admit) -> object:
        return admit(scheduler, peer, msgspec.structs.replace(message, output=b""))

    monkeypatch.setattr(state.SchedulerState, "admit", lossy)


def _believe_results_for_a_dead_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    attached = state.SchedulerState.executor_attached
    monkeypatch.setattr(
        state.SchedulerState, "executor_attached", lambda scheduler, _, blocks: attached(scheduler, 0, blocks)
    )


def _ignore_stop_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    append = retire._append

    def blind(scheduler: state.SchedulerState, *rows: object) -> object:
        slots = scheduler.slots
        kept, slots.num_with_stop_ids = slots.num_with_stop_ids, 0
        finish = append(scheduler, *rows)  # type: ignore[arg-type]
        slots.num_with_stop_ids = kept
        return finish

    monkeypatch.setattr(retire, "_append", blind)


def _score_anew_after_preemption(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores that a frontend has already are sent again."""
    vacate = state.SlotTable.vacate

    def forgetful(slots: state.SlotTable, slot: int) -> list[int]:
        request = slots.request[slot]
        assert request is not None
        request.scored = 0
        return vacate(slots, slot)

    monkeypatch.setattr(state.SlotTable, "vacate", forgetful)


def _score_from_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cached prompt is not run, so that nobody has logits of it."""

    def whole(scheduler: state.SchedulerState, request: state.Request) -> list[int]:
        return scheduler.pool.find_prefix(request.chain[: (len(request.tokens) - 1) // scheduler.limits.block_size])

    monkeypatch.setattr(planner, "_find_prefix", whole)


def _run_ahead_of_the_grammar(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row with a grammar is planned while its last token, and so its mask, is unknown."""

    def all_may(slots: state.SlotTable, running: planner.Int32, grammar_room: int) -> object:
        return running >= 0

    monkeypatch.setattr(planner, "_may_sample", all_may)


def _lose_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that is preempted while its mask is on the way goes on with the mask before."""
    monkeypatch.setattr(state.Request, "awaits_mask", property(lambda request: False))


@pytest.mark.parametrize(
    "break_rule",
    [
        _run_ahead_of_the_grammar,
        _lose_a_mask,
        _drop_nothing,
        _plan_past_the_limit,
        _register_unwritten,
        _keep_cache_over_crash,
        _use_last_block_of_prompt,
        _forget_output_on_preemption,
        _forget_output_on_crash,
        _leak_a_block,
        _let_the_head_wait_for_ever,
        _forget_output_on_replay,
        _believe_results_for_a_dead_scheduler,
        _ignore_stop_ids,
        _score_anew_after_preemption,
        _score_from_the_cache,
    ],
)
def test_a_broken_rule_is_caught(
    break_rule: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    break_rule(monkeypatch)
    with pytest.raises((AssertionError, IndexError, KeyError, ValueError, ProtocolError)):
        for seed in range(400):
            trial(seed)
