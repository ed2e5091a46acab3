"""What must add up in a scheduler, as numbers and as a list of what does not. Called for /debug/invariants only."""

from __future__ import annotations

from ipc.ring import Ring
from ipc.schema import Invariants
from scheduler.peers import PeerTable
from scheduler.state import SchedulerState


def take_invariants(state: SchedulerState, peers: PeerTable, plans: Ring, results: Ring) -> Invariants:
    """A snapshot between two steps. Costs some microseconds a block: not for every step."""
    pool, slots = state.pool, state.slots
    owned = sum(refs > 0 for refs in pool.refs)
    cached = sum(digest is not None and not refs for digest, refs in zip(pool.hash_of, pool.refs, strict=True))
    found = Invariants(
        violations=_violations(state),
        requests=len(state.requests),
        running=len(slots.running),
        waiting=state.num_waiting,
        slots_total=state.limits.max_rows,
        slots_free=slots.num_free,
        blocks_total=pool.capacity,
        blocks_free=pool.num_free,
        blocks_cached=cached,
        blocks_owned=owned,
        plans_in_flight=len(state.inflight),
        plan_published=plans.head,
        plan_acked=plans.acked,
        result_published=results.head,
        result_acked=results.acked,
        backlog_rows=sum(peer.outbox.rows for peer in peers),
        frontends=len(peers),
        epoch=state.epoch,
    )
    checks = {
        "free + owned blocks are not the total": found.blocks_free + owned == found.blocks_total,
        "more blocks cached than free": cached <= found.blocks_free,
        "the last plan is not the one published": state.seq == plans.head,
        "an executor is more than a lap of the plan ring behind": plans.head - plans.acked <= plans.slots,
        "results are behind": results.head - results.acked <= results.slots,
        "a request has no frontend": all(peers.get(request.peer) is not None for request in state.requests.values()),
        "blocks are owned by no one": bool(len(slots.running)) or owned == 0,
    }
    found.violations.extend(text for text, holds in checks.items() if not holds)
    return found


def _violations(state: SchedulerState) -> list[str]:
    try:
        state.check()
    except AssertionError as error:
        return [str(error)]
    return []
