"""The routing policy: who is chosen, what spreads and what sticks, and that nothing of it grows."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frontend.router import MAX_HOLDERS, MAX_LEVELS, OPEN_TOKENS, Router, prefix_keys
from ipc.schema import pack_tokens

BLOCK = 16


def prompt(*parts: tuple[int, int]) -> bytes:
    """Tokens of (seed, length) pieces, packed."""
    return pack_tokens(np.concatenate([np.random.default_rng(s).integers(0, 1000, n) for s, n in parts]))


def router(count: int, **options: int) -> Router:
    made = Router(BLOCK, seed=1, **options)
    for number in range(count):
        made.join(number)
    return made


def idle(of: Router, count: int) -> None:
    for number in range(count):
        of.report(number, 0, 0, 0)


def test_nobody_takes_requests() -> None:
    empty = Router(BLOCK)
    assert empty.pick(prompt((1, 64))) is None
    empty.join(3)
    assert empty.pick(prompt((1, 64))) == 3
    empty.leave(3)
    empty.leave(3)
    assert empty.pick(prompt((1, 64))) is None


def test_a_prefix_stays_where_it_was_computed_while_loads_are_alike() -> None:
    one = router(8)
    system = [prompt((seed, 256)) for seed in range(20)]
    homes = [one.pick(each + prompt((1000 + i, 40))) for i, each in enumerate(system)]
    for turn in range(5):
        for i, each in enumerate(system):
            idle(one, 8)
            assert one.pick(each + prompt((2000 + 100 * turn + i, 40))) == homes[i]


def test_another_salt_shares_nothing() -> None:
    keys = [prefix_keys(prompt((1, 64)), salt, 4 * BLOCK) for salt in ("", "a", "b")]
    assert not set(keys[0]) & set(keys[1]) | set(keys[1]) & set(keys[2])
    one = router(64)
    home = one.pick(prompt((1, 256)), "a")
    picks = []
    for salt in range(50):
        idle(one, 64)
        picks.append(one.pick(prompt((1, 256)), f"other {salt}"))
    assert Counter(picks)[home] < 10


def test_affinity_yields_once_the_load_outweighs_the_prefix() -> None:
    one = router(2)
    shared = prompt((1, 512))
    home = one.pick(shared)
    assert home is not None
    other = 1 - home
    waiting = 512 // OPEN_TOKENS
    one.report(other, 0, 0, 0)
    one.report(home, waiting, 0, -1)  # one token less than the prefix is worth
    assert one.pick(shared) == home
    one.report(other, 0, 0, 0)
    one.report(home, waiting, 0, +1)
    assert one.pick(shared) == other
    idle(one, 2)
    assert {one.pick(shared), one.pick(shared)} == {home, other}, "both hold it now"


def test_a_prefix_that_everybody_asks_for_spreads_to_all() -> None:
    one = router(4)
    hot = prompt((1, 1024))
    counts = Counter(one.pick(hot + prompt((i, 64))) for i in range(2000))
    assert len(counts) == 4
    assert max(counts.values()) <= 1.1 * 2000 / 4


@pytest.mark.parametrize("count", [2, 5, 64])
def test_requests_without_a_common_prefix_are_spread(count: int) -> None:
    one = router(count)
    picks = Counter(one.pick(prompt((i, 40))) for i in range(100 * count))
    assert max(picks.values()) <= 1.1 * 100


def test_the_less_loaded_of_two_is_chosen() -> None:
    one = router(2)
    one.report(0, 10, 5, 4000)
    one.report(1, 10, 0, 0)
    assert [one.pick(b"") for _ in range(5)] == [1] * 5
    assert one.load(1) == 15 * OPEN_TOKENS


def test_what_was_sent_counts_until_it_is_reported() -> None:
    one = router(1)
    one.pick(prompt((1, 100)))
    assert one.load(0) == OPEN_TOKENS + 100
    one.report(0, 1, 0, 0)
    assert one.load(0) == OPEN_TOKENS
    one.pick(prompt((1, 100)))
    assert one.load(0) == 2 * OPEN_TOKENS + 100 - 64, "64 of its tokens are remembered as cached"


def test_clients_that_share_nothing_agree_on_the_home_of_a_prefix() -> None:
    """Fifty of them, each asked once for each of twenty beginnings: of 64 replicas few hold one."""
    holders = [set[int | None]() for _ in range(20)]
    for seed in range(50):
        one = Router(BLOCK, seed=seed)
        for number in range(64):
            one.join(number)
        for group, each in enumerate(holders):
            idle(one, 64)
            each.add(one.pick(prompt((group, 512), (1000 * seed + group, 300))))
    assert max(map(len, holders)) <= 2
    assert len(set[int | None]().union(*holders)) > 10, "not all beginnings at the same home"


def test_clients_agree_on_the_next_homes_of_a_prefix_whose_first_are_busy() -> None:
    """Fifty of them that share nothing, when nothing runs and when the homes of before have a lot to do."""
    busy = set[int]()
    for _ in range(5):
        chosen = Counter[int | None]()
        for seed in range(50):
            one = Router(BLOCK, seed=seed)
            for number in range(64):
                one.join(number)
                one.report(number, 30 if number in busy else 0, 0, 0)
            chosen[one.pick(prompt((1, 512), (seed, 300)))] += 1
        homes = {number for number, count in chosen.items() if number is not None and count > 5}
        assert sum(chosen[home] for home in homes) >= 45, "a few draw two busy ones to compare with"
        assert len(homes) <= 2
        assert not homes & busy
        busy |= homes


def test_few_homes_move_when_a_replica_leaves() -> None:
    def homes(without: int) -> list[int | None]:
        one = router(16)
        one.leave(without)
        return [one.pick(prompt((group, 512))) for group in range(200) if not idle(one, 16)]

    moved = sum(a != b for a, b in zip(homes(-1), homes(3), strict=True))
    assert moved <= 2.5 * 200 / 16


def test_one_that_joins_again_has_no_cache() -> None:
    one = router(2)
    shared = prompt((1, 512))
    home = one.pick(shared)
    assert home is not None
    one.leave(home)
    assert one.pick(shared) == 1 - home
    one.join(home)
    idle(one, 2)
    assert one.pick(shared) == 1 - home


def test_memory_is_bounded() -> None:
    one = router(100, max_prefixes=50)
    for i in range(300):
        one.pick(prompt((i, 600)))
    assert len(one._prefixes) == 50
    for _ in range(5000):
        one.pick(prompt((7, BLOCK)))
    assert all(holders is None or len(holders) <= MAX_HOLDERS for holders in one._prefixes.values())
    assert prefix_keys(prompt((7, BLOCK)), "", 4 * BLOCK)[0] in one._prefixes


def test_a_prefix_key_is_of_all_tokens_before_it() -> None:
    long = prompt((1, BLOCK << MAX_LEVELS))
    keys = prefix_keys(long, "", 4 * BLOCK)
    assert len(keys) == MAX_LEVELS
    changed = pack_tokens([5]) + long[4:]
    assert not set(keys) & set(prefix_keys(changed, "", 4 * BLOCK))
    late = long[: 4 * 33 * BLOCK] + changed[: -4 * 33 * BLOCK]
    assert [a == b for a, b in zip(keys, prefix_keys(late, "", 4 * BLOCK), strict=True)] == [True] * 6 + [False] * 4


moves = st.one_of(
    st.tuples(st.just("join"), st.integers(0, 9)),
    st.tuples(st.just("leave"), st.integers(0, 9)),
    st.tuples(st.just("report"), st.integers(0, 9), st.integers(0, 50)),
    st.tuples(st.just("pick"), st.integers(0, 5), st.integers(0, 200)),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(moves, max_size=80))
def test_whatever_happens_who_is_picked_takes_requests(history: list[tuple[str, int, int]]) -> None:
    one, here = Router(BLOCK, seed=1, max_prefixes=20), set[int]()
    for what, *values in history:
        if what == "join":
            one.join(values[0])
            here.add(values[0])
        elif what == "leave":
            one.leave(values[0])
            here.discard(values[0])
        elif what == "report":
            one.report(values[0], values[1], 0, 0)
        else:
            loads = {number: one.load(number) for number in here}
            picked = one.pick(prompt((values[0], values[1])))
            assert (picked in here) if here else (picked is None)
            if picked is not None:
                assert OPEN_TOKENS <= one.load(picked) - loads[picked] <= OPEN_TOKENS + values[1]
        assert len(one) == len(here)
        assert all((number in one) == (number in here) for number in range(10))
