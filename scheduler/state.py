"""All the scheduler knows: requests, slots, blocks, the queue, plans in flight; and the moves between them.

The loop calls `admit`, `abort` and `executor_*`; planner.py and retire.py work on the same object. Single-threaded.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from ipc.clock import now_ns
from ipc.config import EngineConfig
from ipc.errors import OverloadedError, RequestError, UnavailableError
from ipc.frames import FrameLimits
from ipc.histograms import Histograms
from ipc.schema import Admit, FinishReason, unpack_tokens
from scheduler.admission import check_grammar, check_lengths, check_params, check_tokens
from scheduler.blocks import BlockPool
from scheduler.depth import PipelineDepth
from scheduler.inflight import PlanRecord
from scheduler.metrics import Counters, observe_end
from scheduler.prefix import extend_chain, root_hash
from scheduler.queue import WaitingQueue
from scheduler.request import Request, State, features_of
from scheduler.slots import SlotTable


class SchedulerState:
    """The only truth about every request of this replica."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.limits: FrameLimits = config.limits
        self.depth = PipelineDepth(config.pipeline_depth)
        self.slots = SlotTable(self.limits)
        self.pool = BlockPool(1)
        self.queue = WaitingQueue()
        self.inflight: deque[PlanRecord] = deque()
        self.counters = Counters()
        self.histograms = Histograms()
        self.requests: dict[tuple[int, int], Request] = {}  # (peer, request_id) -> open request
        self.open_requests: Counter[int] = Counter()  # by peer
        self.preparing: set[Request] = set()
        self._preparing_tokens = 0
        self.masks_wanted: list[tuple[Request, list[int]]] = []  # output tokens not matched yet, for the loop to submit
        self.started: list[tuple[int, int, int]] = []  # (peer, request_id, cached tokens), until the next delivery
        self.epoch = 0
        self.attached = False
        self.on_trial: Request | None = None  # the suspect that runs alone now
        # A head of the queue, and as many free blocks as were too few for it.
        self.blocked: tuple[Request | None, int] = (None, 0)
        self.draining = False
        self.seq = 0  # of the last plan
        self.was_idle = True  # no work was left after the last retire: the next gap is no bubble
        self._arrivals = 0
        self._is_eos = np.zeros(config.card.vocab_size + 1, np.bool_)  # the last entry answers INVALID_TOKEN
        self._is_eos[list(config.card.eos_token_ids)] = True

    # -- requests

    @property
    def max_seq_len(self) -> int:
        """Tokens one request may have: the model's context, or the whole KV cache if that is smaller."""
        kv_tokens = self.pool.capacity * self.limits.block_size if self.attached else self.limits.max_seq_len
        return min(self.limits.max_seq_len, kv_tokens)

    def admit(self, peer: int, message: Admit) -> Request:
        """Take a request into the queue. Raises a typed error, with both numbers, if it can never run."""
        if not message.replay:
            self._check_capacity(len(message.prompt) // 4)
        if (peer, message.request_id) in self.requests:
            raise RequestError(f"request id {message.request_id} is already in use")
        params = message.params
        prompt, output = unpack_tokens(message.prompt), unpack_tokens(message.output)
        check_params(params, self.config.card, len(prompt))
        check_lengths(params, len(prompt), len(output), self.max_seq_len)
        check_grammar(message.grammar, params)
        tokens = np.concatenate((prompt, output))
        check_tokens(tokens, self.config.card)
        self._arrivals += 1
        arrived_ns = now_ns()
        resumed_ns = arrived_ns if len(output) else 0  # it left a queue and got its first token in an earlier life
        request = Request(
            peer=peer,
            request_id=message.request_id,
            arrival=self._arrivals,
            arrived_ns=arrived_ns,
            started_ns=resumed_ns,
            first_token_ns=resumed_ns,
            last_token_ns=resumed_ns,
            prompt_len=len(prompt),
            limit=len(prompt) + params.max_tokens,
            params=params,
            priority=message.priority,
            root=root_hash(message.cache_salt),
            tokens=tokens,
            features=features_of(params),
            stop_ids=frozenset(params.stop_token_ids),
            scored=message.scored,
            grammar=message.grammar,
        )
        if not 0 <= request.scored <= request.num_scores:
            raise RequestError(f"{request.scored} prompt tokens were scored already, {request.num_scores} can be")
        self._hash(request, len(tokens))
        self.requests[peer, request.request_id] = request
        self.open_requests[peer] += 1
        if request.grammar:
            self.masks_wanted.append((request, output.tolist()))
        self._enqueue(request)
        self.counters.prompt_tokens += 0 if message.replay else len(prompt)
        return request

    def _check_capacity(self, prompt_len: int) -> None:
        """Raise a typed error while no new request of `prompt_len` tokens is taken; a replayed one is past this."""
        if self.draining:
            raise UnavailableError("the engine is shutting down and takes no new requests")
        if self.num_waiting >= self.config.max_num_queued_reqs:
            raise OverloadedError(f"{self.num_waiting} requests wait, the limit is {self.config.max_num_queued_reqs}")
        limit, waiting = self.config.max_num_queued_tokens, self.num_waiting_tokens
        # An empty queue takes a prompt of any length: it would never be taken otherwise.
        if limit is not None and waiting and waiting + prompt_len > limit:
            raise OverloadedError(f"{waiting + prompt_len} tokens would wait, the limit is {limit} ({waiting} wait)")

    def abort(self, peer: int, request_id: int) -> bool:
        """End a request now, wherever it is; its rows in flight are ignored. False if it is not open."""
        request = self.requests.get((peer, request_id))
        if request is None:
            return False
        self.finish(request)
        return True

    def complete(self, request: Request, reason: FinishReason) -> None:
        """A request came to its own end."""
        if reason is FinishReason.INVALID_LOGITS and request.state is State.RUNNING:
            self._forget_blocks(request.slot)
        self.finish(request)
        self.counters.requests_finished[reason.name.lower()] += 1
        if reason is not FinishReason.INVALID_LOGITS:
            observe_end(self.histograms, request, now_ns())

    def finish(self, request: Request) -> None:
        """Forget an open request and free what it holds."""
        del self.requests[request.peer, request.request_id]
        self.open_requests[request.peer] -= 1
        if not self.open_requests[request.peer]:
            del self.open_requests[request.peer]
        if request is self.on_trial:
            self.on_trial = None
        if request.state is State.RUNNING:
            self._vacate(request)
            request.state = State.DONE
        elif request.state is State.PREPARING:
            self._end_preparing(request)
            request.state = State.DONE
        else:
            self.queue.remove(request)

    def _enqueue(self, request: Request) -> None:
        """Let it wait for a slot; a request that awaits its mask does so outside the queue."""
        if request.awaits_mask:
            request.state = State.PREPARING
            self.preparing.add(request)
            self._preparing_tokens += len(request.tokens)
        else:
            self.queue.push(request)

    def _end_preparing(self, request: Request) -> None:
        self.preparing.remove(request)
        self._preparing_tokens -= len(request.tokens)

    def mask_arrived(self, request: Request, mask: npt.NDArray[np.int32]) -> None:
        """The request may go on, wherever it is."""
        request.mask = mask
        if request.state is State.RUNNING:
            self.slots.runnable[request.slot] = True
        elif request.state is State.PREPARING:
            self._end_preparing(request)
            self.queue.push(request)

    @property
    def num_waiting(self) -> int:
        return len(self.queue) + len(self.preparing)

    @property
    def num_waiting_tokens(self) -> int:
        return self.queue.num_tokens + self._preparing_tokens

    @property
    def load(self) -> tuple[int, int, int]:
        """Running requests, waiting ones, tokens of those."""
        return len(self.slots.running), self.num_waiting, self.num_waiting_tokens

    def requests_of(self, peer: int) -> list[Request]:
        return [request for (owner, _), request in self.requests.items() if owner == peer]

    # -- slots and blocks

    def preempt(self, request: Request) -> None:
        """Free a running request's blocks and slot; it waits with prompt and output kept, to be recomputed.

        Its rows in flight are dropped by generation, not awaited: sampling is a pure function of the tokens, the seed
        and the position, so the dropped token is sampled again.
        """
        self._vacate(request)
        self._enqueue(request)
        self.counters.preemptions += 1

    def _vacate(self, request: Request) -> None:
        slot = request.slot
        self.register_blocks(slot)
        self.pool.release(self.slots.vacate(slot))

    def _hash(self, request: Request, known: int) -> None:
        if self.config.enable_prefix_caching:
            tokens = request.tokens if request.slot < 0 else self.slots.tokens[request.slot]
            extend_chain(request.chain, request.root, tokens, self.limits.block_size, known)

    def register_blocks(self, slot: int) -> None:
        """Put the full blocks of a slot into the prefix index: planned, and of known tokens."""
        if not self.config.enable_prefix_caching:
            return
        slots, request = self.slots, self.slots.request[slot]
        assert request is not None
        known = int(min(slots.known[slot], slots.computed[slot]))
        first, last = int(slots.registered[slot]), known // self.limits.block_size
        if last > first:
            self._hash(request, known)
            for index in range(first, last):
                self.pool.register(int(slots.block_table[slot, index]), request.chain[index])
            slots.registered[slot] = last

    def _forget_blocks(self, slot: int) -> None:
        """Nobody is to find what a row has computed that came to NaN: its keys and values may be wrong already."""
        slots = self.slots
        self.pool.forget(slots.block_table[slot, : slots.num_blocks[slot]].tolist())
        slots.registered[slot] = self.limits.max_blocks_per_seq

    def register_new_blocks(self) -> None:
        """`register_blocks` for every slot that has a new full block; runs in the shadow of a step."""
        slots, running = self.slots, self.slots.running
        full = np.minimum(slots.known[running], slots.computed[running]) // self.limits.block_size
        for slot in running[full > slots.registered[running]].tolist():
            self.register_blocks(slot)

    def is_eos(self, tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
        """Which of `tokens` [n] end a sequence; INVALID_TOKEN does not."""
        return self._is_eos[tokens]

    # -- executor lives

    @property
    def has_work(self) -> bool:
        return bool(self.queue) or bool(len(self.slots.running))

    def executor_attached(self, epoch: int, num_blocks: int) -> Iterator[Request]:
        """A new executor: an empty KV cache of `num_blocks`. Yields the open requests that no longer fit it."""
        self.epoch, self.attached = epoch, True
        self.pool = BlockPool(num_blocks)
        self.blocked = (None, 0)
        for request in list(self.requests.values()):
            # What is done with one may end others: their frontend is found gone.
            if request.state is not State.DONE and request.limit > self.max_seq_len:
                yield request

    def executor_lost(self) -> list[Request]:
        """The KV cache and all plans in flight are gone; running requests wait again, with their tokens.

        Those that were in flight become suspects: each runs alone until it has proved harmless. Returns those that were
        in flight in two crashes in a row; they must not run again.
        """
        self.attached = False
        self.on_trial = None
        struck = self._slots_in_flight()
        self.inflight.clear()
        for slot in self.slots.running.tolist():
            request = self.slots.request[slot]
            assert request is not None
            self.slots.vacate(slot)
            if slot in struck:
                request.strikes += 1
                # One token of a prefill row and one of a decode row: whichever kernel it crashed, it would again.
                request.alone_until = min(len(request.tokens) + 2, request.limit)
            self._enqueue(request)
        self.pool = BlockPool(1)
        self.was_idle = True
        return [request for request in self.requests.values() if request.strikes > 1]

    def _slots_in_flight(self) -> set[int]:
        """Slots whose present owner has a row in a plan in flight."""
        return {
            slot
            for record in self.inflight
            for slot in record.slots[self.slots.generation[record.slots] == record.generation].tolist()
        }

    def end_trial(self) -> None:
        """Acquit the suspect on trial if it has got far enough without a crash."""
        request = self.on_trial
        if request is not None and self.slots.known[request.slot] >= request.alone_until:
            request.strikes = 0
            self.on_trial = None

    def check(self) -> None:
        """Assert every invariant that ties the parts together; cheap enough for tests, not for every step."""
        slots, block_size = self.slots, self.limits.block_size
        owned = [b for s in slots.running.tolist() for b in slots.block_table[s, : slots.num_blocks[s]].tolist()]
        self.pool.check(owned)
        assert len(slots.running) + slots.num_free == self.limits.max_rows, "a slot is neither free nor running"
        running = [slots.request[s] for s in slots.running.tolist()]
        assert all(r is not None and r.state is State.RUNNING for r in running), "a slot runs for no one"
        counted = slots.num_prefilling, slots.num_constrained, slots.num_with_stop_ids
        kinds = slots.computed < slots.prefill_end, slots.constrained, slots.has_stop_ids
        seen = tuple(int(np.count_nonzero(kind[slots.running])) for kind in kinds)
        assert seen == counted, f"{seen} slots prefill, have a grammar, have stop ids; {counted} are counted"
        assert len(running) + self.num_waiting == len(self.requests), "a request is neither running nor waiting"
        assert self.open_requests == Counter(peer for peer, _ in self.requests), "an owner's requests are miscounted"
        waiting = [r for r in self.requests.values() if r.state is not State.RUNNING]
        assert self.num_waiting_tokens == sum(len(r.tokens) for r in waiting), "tokens that wait are miscounted"
        assert all(slots.computed[s] <= slots.num_blocks[s] * block_size for s in slots.running), "tokens without block"
        assert len(self.inflight) <= self.config.max_depth, "more plans in flight than the depth"
