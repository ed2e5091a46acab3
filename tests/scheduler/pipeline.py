"""Drives the real scheduler against the simulated GPU: plans run and results return as late as a test likes."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import msgspec
import numpy as np

from ipc.config import EngineConfig
from ipc.frames import Plan
from ipc.results import Result
from ipc.schema import Admit, FinishReason, ModelCard, SamplingParams, pack_tokens
from scheduler.planner import make_plan
from scheduler.request import Request, State
from scheduler.retire import retire
from scheduler.state import SchedulerState
from tests.scheduler.simulated_gpu import EOS, VOCAB, SimulatedGpu, allowed_tokens


def tiny_config(**changes: object) -> EngineConfig:
    card = ModelCard("tiny", "", 64, VOCAB, (EOS,), 4)
    defaults: dict[str, object] = dict(
        card=card, block_size=4, num_blocks=17, max_num_seqs=4, max_num_batched_tokens=16, pipeline_depth=2
    )
    return EngineConfig(**{**defaults, **changes})  # type: ignore[arg-type]


@dataclass
class Outcome:
    """What one request's frontend has received."""

    tokens: list[int] = field(default_factory=list)
    finish: FinishReason = FinishReason.RUNNING
    scores: list[tuple[int, int]] = field(default_factory=list)  # prompt token, and the token predicted in its place


class Pipeline:
    """One replica without processes. `outcomes` is what frontends saw; every frame is checked as it is delivered."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.state = SchedulerState(config)
        self.outcomes: dict[int, Outcome] = {}
        self.queued: deque[tuple[Plan, set[int]]] = deque()  # planned, not yet run
        self.done: deque[Result] = deque()  # run, not yet retired
        self.asked: dict[int, Admit] = {}  # what a frontend keeps for a replay
        self.grammar_rows = 0
        self.attach()

    def attach(self) -> None:
        assert self.config.num_blocks is not None
        self.gpu = SimulatedGpu(self.config.limits, self.config.num_blocks)
        self._greet()

    def _greet(self) -> None:
        assert self.config.num_blocks is not None
        for request in self.state.executor_attached(self.state.epoch + 1, self.config.num_blocks):
            raise AssertionError(f"request {request.request_id} no longer fits")

    def admit(
        self, request_id: int, prompt: list[int], peer: int = 0, salt: str = "", grammar: str = "", **params: object
    ) -> Request:
        sampling = SamplingParams(temperature=0.0, **params)  # type: ignore[arg-type]
        message = Admit(request_id, pack_tokens(prompt), sampling, cache_salt=salt, grammar=grammar)
        self.asked[request_id] = message
        request = self.state.admit(peer, message)
        self.outcomes[request_id] = Outcome()
        return request

    def abort(self, request_id: int) -> bool:
        found = self.state.abort(0, request_id)
        if found:
            self.outcomes[request_id].finish = FinishReason.ABORTED
        return found

    def plan(self) -> bool:
        if len(self.state.inflight) >= self.state.depth.steps:
            return False
        cached = set(self.state.pool.block_of.values())
        allocate = self.state.pool.allocate

        def record(count: int) -> list[int]:
            blocks = allocate(count)
            cached.difference_update(blocks)
            return blocks

        self.state.pool.allocate = record  # type: ignore[method-assign]
        plan = make_plan(self.state)
        self.state.pool.allocate = allocate  # type: ignore[method-assign]
        if plan is not None:
            self.grammar_rows += len(plan.grammar_row)
            self.queued.append((plan, cached))
        self.state.register_new_blocks()
        self.state.check()
        return plan is not None

    def run(self) -> bool:
        if not self.queued:
            return False
        self.done.append(self.gpu.run(*self.queued.popleft()))
        return True

    def match(self) -> bool:
        """Bring the mask that was asked for first, as the grammar worker would."""
        if not self.state.masks_wanted:
            return False
        request, tokens = self.state.masks_wanted.pop(0)
        request.matcher = [*(request.matcher or []), *tokens]
        if request.state is not State.DONE:
            bits = sum(1 << token for token in allowed_tokens(request.grammar, request.matcher))
            self.state.mask_arrived(request, np.array([bits], np.int32))
        self.state.check()
        return True

    def retire(self) -> bool:
        if not self.done:
            return False
        result = self.done.popleft()
        if result.epoch != self.state.epoch:
            return True
        delivery = retire(self.state, result)
        assert result.logprob is not None
        for request_id, row in zip(delivery.score_request_id, delivery.score_result_row, strict=True):
            self.outcomes[int(request_id)].scores.append((int(result.token[row]), int(result.logprob[row])))
        for request_id, token, finish in zip(delivery.request_id, delivery.token, delivery.finish, strict=True):
            outcome = self.outcomes[int(request_id)]
            assert outcome.finish is FinishReason.RUNNING, "a token after the terminal frame"
            outcome.tokens.append(int(token))
            outcome.finish = FinishReason(int(finish))
        self.state.check()
        return True

    def crash(self) -> None:
        """The executor dies with all it was given, and a new one comes up."""
        self.queued.clear()
        self.done.clear()
        for request in self.state.executor_lost():
            self.state.finish(request)
            self.outcomes[request.request_id].finish = FinishReason.CRASHED
        self.attach()
        self.state.check()

    def scheduler_crash(self) -> None:
        """The scheduler dies; the executor goes on with what it was given; frontends replay what they have open."""
        seq, epoch = self.state.seq, self.state.epoch
        self.state = SchedulerState(self.config)
        self.state.seq, self.state.epoch = seq, epoch
        self._greet()
        for request_id, outcome in self.outcomes.items():
            if outcome.finish is FinishReason.RUNNING:
                self.replay(request_id)
        self.state.check()

    def replay(self, request_id: int) -> None:
        outcome = self.outcomes[request_id]
        output, scored = pack_tokens(outcome.tokens), len(outcome.scores)
        self.state.admit(0, msgspec.structs.replace(self.asked[request_id], output=output, replay=True, scored=scored))

    def drain(self, steps: int = 10_000) -> None:
        """Run to the end, one move of each kind at a time."""
        for _ in range(steps):
            if not (self.match() | self.plan() | self.run() | self.retire()):
                break
        assert not self.state.requests, "requests are left and nothing moves"
        assert self.state.pool.num_free == self.state.pool.capacity, "blocks leaked"
