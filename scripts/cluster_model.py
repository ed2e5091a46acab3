"""A cluster in virtual time: real schedulers and real routers around GPUs whose steps only take their time.

Used by simulate_cluster.py. Each replica is the scheduler's own state, planner and retire; each frontend is the
router it would ask, told of loads only by what a frontend hears: the frames that bring it tokens, and a heartbeat a
second. Only time is made up. A step takes as long as one on an H200 with the 8B shape, fitted to the measurements in
docs/performance.md. Nothing here reads a clock, except to measure what the real code costs.
"""

from __future__ import annotations

import gc
import heapq
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from frontend.router import Router
from ipc.config import EngineConfig
from ipc.frames import Plan
from ipc.results import Result
from ipc.schema import HEARTBEAT_S, Admit, ModelCard, SamplingParams, pack_tokens
from scheduler.planner import make_plan
from scheduler.retire import Delivery, retire
from scheduler.state import SchedulerState

# A graph of the 8B shape alone on an H200 (docs/performance.md): rows, context, ms.
GRAPH_ALONE: Final = (
    (1, 512, 4.259),
    (32, 64, 4.343),
    (32, 4096, 8.224),
    (32, 8192, 12.063),
    (64, 200, 4.927),
)
LINEAR_64_MS: Final = 4.38  # all linear layers with 64 and with 256 rows, head included; scripts/bench_kernels.py
LINEAR_256_MS: Final = 6.10
HEAD_256_MS: Final = 0.379
PREFILL_ATTENTION: Final = ((1024, 7168), (307e12, 432e12))  # mean context of a prompt token; FLOP/s measured there
PAIR_FLOPS: Final = 4 * 32 * 32 * 128  # of one query and one key, all layers and heads
HOST_S: Final = 0.5e-3  # from a result, or an arrival at an idle engine, to the launch of the step planned then
TO_SCHEDULER_S: Final = 0.34e-3  # HTTP request to Admit, median of scripts/bench_frontend.py
TO_CLIENT_S: Final = 1.24e-3  # Tokens frame to event at the client, likewise
VOCAB: Final = 128_256
TOKEN: Final = 5  # what every row samples


class StepTime:
    """Seconds of a step: what its tokens cost in linear layers, its decode rows in reading keys and values."""

    def __init__(self) -> None:
        same_rows = [(rows * context, ms) for rows, context, ms in GRAPH_ALONE if rows == 32]
        self.kv_ms = float(np.polyfit(*zip(*same_rows, strict=True), 1)[0])  # of one token of context
        base = {rows: ms - rows * context * self.kv_ms for rows, context, ms in reversed(GRAPH_ALONE)}
        base[256] = base[64] + LINEAR_256_MS - LINEAR_64_MS
        self._rows, self._base_ms = zip(*sorted(base.items()), strict=True)
        self.token_ms = (LINEAR_256_MS - HEAD_256_MS) / 256  # beyond 256 tokens products are bound by arithmetic

    def decode_s(self, rows: int, context: int) -> float:
        return self._of(rows, rows * context, 0.0)

    def plan_s(self, plan: Plan, computed: npt.NDArray[np.int32]) -> float:
        """Of a plan just made; `computed` [slots]: tokens of each slot once it has run."""
        end = computed[plan.row_slot].astype(np.int64)
        n = plan.row_query_len[plan.num_decode :].astype(np.int64)
        pairs = float((n * end[plan.num_decode :] - n * (n - 1) // 2).sum())
        return self._of(plan.num_decode + int(n.sum()), int(end[: plan.num_decode].sum()), pairs)

    def _of(self, tokens: int, kv_tokens: int, pairs: float) -> float:
        base_ms = float(np.interp(tokens, self._rows, self._base_ms)) + max(0, tokens - 256) * self.token_ms
        flops = float(np.interp(pairs / max(1, tokens), *PREFILL_ATTENTION))
        return (base_ms + kv_tokens * self.kv_ms) * 1e-3 + pairs * PAIR_FLOPS / flops


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One cluster and what arrives at it."""

    replicas: int
    frontends: int
    arrivals: str = "poisson"  # or "bursty": half of the time nothing, half of the time twice as much, in turns
    rate: float = 40.0  # requests a second and replica
    seconds: float = 6.0  # of which the first `warm_up` do not count
    warm_up: float = 2.0
    groups: float = 4.0  # prompts with the same beginning form a group; groups a replica
    shared_len: int = 1024
    own_len: int = 128
    output_len: int = 128
    num_blocks: int = 16_384
    max_num_seqs: int = 256
    seed: int = 0


@dataclass
class Cost:
    """What a part of the real code took on this machine."""

    calls: int = 0
    ns: int = 0

    def add(self, start_ns: int) -> None:
        self.calls += 1
        self.ns += time.thread_time_ns() - start_ns

    @property
    def us(self) -> float:
        """Of one call."""
        return self.ns / max(1, self.calls) / 1e3


@dataclass
class Outcome:
    """What was measured after the warm-up. Times in virtual seconds; costs in real ones."""

    seconds: float = 0.0
    requests: int = 0  # arrived
    tokens: int = 0  # delivered
    first_token_s: list[float] = field(default_factory=list)
    gaps_s: list[npt.NDArray[np.float64]] = field(default_factory=list)  # between tokens of a request
    hit_tokens: int = 0
    prompt_tokens: int = 0
    busy_s: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))  # [replicas]
    tokens_of: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))  # [replicas], computed
    steps: int = 0
    frames: int = 0  # a step makes one for each frontend that has a row in it
    preemptions: int = 0
    pick: Cost = field(default_factory=Cost)
    report: Cost = field(default_factory=Cost)
    admit: Cost = field(default_factory=Cost)
    step: Cost = field(default_factory=Cost)  # plan, retire and what runs in the shadow


class Replica:
    """A scheduler and the device it plans for."""

    def __init__(self, config: EngineConfig, step_time: StepTime) -> None:
        self.state = SchedulerState(config)
        assert config.num_blocks is not None
        list(self.state.executor_attached(1, config.num_blocks))
        self._depth = config.pipeline_depth
        self._step_time = step_time
        self._token = np.full(config.max_num_seqs, TOKEN, np.int32)
        self._queue: deque[tuple[Plan, float]] = deque()  # in flight, and when each ends
        self._free_at = 0.0
        self.busy_s = 0.0
        self.tokens = 0  # computed, of prompts and outputs

    @property
    def next_end(self) -> float | None:
        return self._queue[0][1] if self._queue else None

    def plan_ahead(self, now: float) -> None:
        state = self.state
        while state.has_work and len(self._queue) < self._depth:
            plan = make_plan(state)
            if plan is None:
                return
            took = self._step_time.plan_s(plan, state.slots.computed)
            self._free_at = max(now + HOST_S, self._free_at) + took
            self.busy_s += took
            self.tokens += int(plan.row_query_len.sum())
            self._queue.append((plan, self._free_at))

    def retire(self) -> Delivery:
        plan, _ = self._queue.popleft()
        tokens = self._token[: plan.num_rows]
        return retire(self.state, Result(plan.seq, 1, 0, 0, 0, True, tokens, None, None, None, None))


def arrival_times(scenario: Scenario, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """When requests reach the cluster; bursts strike all of it at once."""
    rate = scenario.rate * scenario.replicas
    times = np.cumsum(rng.exponential(1 / rate, int(rate * scenario.seconds * 1.2) + 100))
    if scenario.arrivals == "bursty":  # time runs only while a burst is on, twice as fast
        ends = np.cumsum(rng.exponential(0.25, int(8 * scenario.seconds) + 40))
        pauses = np.cumsum(rng.exponential(0.25, len(ends)))
        times = times / 2
        burst = np.searchsorted(ends, times)
        times = times + np.where(burst > 0, pauses[burst - 1], 0.0)
    return times[times < scenario.seconds]


class Prompts:
    """Groups of prompts that begin alike, some groups much more popular than others."""

    def __init__(self, scenario: Scenario, rng: np.random.Generator) -> None:
        count = max(1, round(scenario.groups * scenario.replicas))
        self._shared = rng.integers(3, VOCAB, (count, scenario.shared_len), dtype=np.int32)
        popularity = np.arange(1, count + 1) ** -0.8
        self._share = np.cumsum(popularity / popularity.sum())
        self._pool = rng.integers(3, VOCAB, 1 << 20, dtype=np.int32)
        self._own_len = scenario.own_len
        self._rng = rng

    def next(self) -> bytes:
        group = min(int(np.searchsorted(self._share, self._rng.random())), len(self._shared) - 1)
        start = int(self._rng.integers(0, len(self._pool) - self._own_len))
        return pack_tokens(self._shared[group]) + pack_tokens(self._pool[start : start + self._own_len])


class Cluster:
    """One run. Events in order of virtual time: an arrival, or the end of the oldest step of a replica."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        context = scenario.shared_len + scenario.own_len + scenario.output_len
        card = ModelCard("simulated", "", context, VOCAB, (2,), 1)
        config = EngineConfig(card=card, max_num_seqs=scenario.max_num_seqs, num_blocks=scenario.num_blocks)
        step_time = StepTime()
        self.replicas = [Replica(config, step_time) for _ in range(scenario.replicas)]
        self.routers = [Router(config.block_size, seed=scenario.seed + i) for i in range(scenario.frontends)]
        for router in self.routers:
            for number in range(scenario.replicas):
                router.join(number)
        self.outcome = Outcome()
        self._rng = np.random.default_rng(scenario.seed)
        self._arrivals = arrival_times(scenario, self._rng)
        self._last_s = np.zeros(len(self._arrivals))  # when each request got its last token, or arrived
        self._started = np.zeros(len(self._arrivals), np.bool_)
        self._beats = 0
        self._heap: list[tuple[float, int]] = []  # end of its oldest step, replica
        self._params = SamplingParams(max_tokens=scenario.output_len, temperature=0.0, ignore_eos=True)

    def run(self) -> Outcome:
        """Simulate to the end of the scenario; what is open then stays so."""
        scenario, prompts = self.scenario, Prompts(self.scenario, self._rng)
        gc.collect()
        gc.freeze()
        gc.disable()  # nothing here forms cycles, and a walk over a thousand schedulers takes seconds
        try:
            arrivals, arrived, warm = self._arrivals, 0, False
            while True:
                arrival = arrivals[arrived] if arrived < len(arrivals) else scenario.seconds
                now = min(arrival, self._heap[0][0] if self._heap else arrival)
                if now >= scenario.seconds:
                    break
                if now >= scenario.warm_up and not warm:
                    warm = True
                    self._begin()
                self._heartbeats(now)
                if now == arrival:
                    self._arrive(arrived, now, prompts.next())
                    arrived += 1
                else:
                    self._end_step(*heapq.heappop(self._heap))
        finally:
            gc.enable()
            gc.unfreeze()
        return self._finish()

    def _begin(self) -> None:
        """The warm-up is over: what counts begins here."""
        for replica in self.replicas:
            counters = replica.state.counters
            counters.prefix_query_tokens = counters.prefix_hit_tokens = counters.preemptions = 0
            replica.busy_s, replica.tokens = 0.0, 0
        self.outcome = Outcome()

    def _finish(self) -> Outcome:
        outcome, scenario = self.outcome, self.scenario
        counters = [replica.state.counters for replica in self.replicas]
        outcome.seconds = scenario.seconds - scenario.warm_up
        outcome.hit_tokens = sum(c.prefix_hit_tokens for c in counters)
        outcome.prompt_tokens = sum(c.prefix_query_tokens for c in counters)
        outcome.preemptions = sum(c.preemptions for c in counters)
        outcome.busy_s = np.array([replica.busy_s for replica in self.replicas])
        outcome.tokens_of = np.array([replica.tokens for replica in self.replicas])
        return outcome

    def _heartbeats(self, now: float) -> None:
        """Every replica answers every frontend once a second, each at a time of its own."""
        while self._beats * HEARTBEAT_S <= now * len(self.routers):
            router = self.routers[self._beats % len(self.routers)]
            self._beats += 1
            for number, replica in enumerate(self.replicas):
                router.report(number, *replica.state.load)

    def _arrive(self, request: int, now: float, prompt: bytes) -> None:
        outcome = self.outcome
        frontend = int(self._rng.integers(0, len(self.routers)))
        start = time.thread_time_ns()
        number = self.routers[frontend].pick(prompt)
        outcome.pick.add(start)
        assert number is not None, "a cluster without replicas"
        replica = self.replicas[number]
        self._last_s[request] = now
        start = time.thread_time_ns()
        replica.state.admit(frontend, Admit(request, prompt, self._params))
        outcome.admit.add(start)
        outcome.requests += 1
        self._go_on(number, now)

    def _go_on(self, number: int, now: float) -> None:
        """Plan for a replica, and wait for its oldest step if nothing of it was in flight."""
        replica = self.replicas[number]
        was_idle = replica.next_end is None
        start = time.thread_time_ns()
        replica.plan_ahead(now)
        self.outcome.step.ns += time.thread_time_ns() - start
        if was_idle and replica.next_end is not None:
            heapq.heappush(self._heap, (replica.next_end, number))

    def _end_step(self, now: float, number: int) -> None:
        outcome, replica = self.outcome, self.replicas[number]
        start = time.thread_time_ns()
        delivery = replica.retire()
        replica.plan_ahead(now)
        replica.state.register_new_blocks()
        outcome.step.add(start)
        if replica.next_end is not None:
            heapq.heappush(self._heap, (replica.next_end, number))
        replica.state.started.clear()
        self._deliver(number, now, delivery)

    def _deliver(self, number: int, now: float, delivery: Delivery) -> None:
        """Tokens reach their frontends, and with them the replica's load."""
        outcome, request = self.outcome, delivery.request_id
        outcome.steps += 1
        outcome.tokens += len(request)
        gaps, started = now - self._last_s[request], self._started[request]
        self._last_s[request] = now
        self._started[request] = True
        outcome.gaps_s.append(gaps[started])
        outcome.first_token_s += gaps[~started].tolist()
        load = self.replicas[number].state.load
        peers = set(delivery.peer.tolist())
        start = time.thread_time_ns()
        for peer in peers:
            self.routers[peer].report(number, *load)
        outcome.report.ns += time.thread_time_ns() - start
        outcome.report.calls += len(peers)
        outcome.frames += len(peers)
