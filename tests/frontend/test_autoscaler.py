"""How many replicas and frontends there should be: at once more, after a long calm one less, never past a bound."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from frontend.autoscaler import CALM_BEATS, OPEN_PER_FRONTEND, WAITING_PER_REPLICA, Load, Scale


def test_a_queue_brings_replicas_at_once_and_at_most_twice_as_many() -> None:
    scale = Scale(2, 20)
    assert scale.replicas(2, Load(64, 0), 32) == 2
    assert scale.replicas(2, Load(64, WAITING_PER_REPLICA), 32) == 2
    assert scale.replicas(2, Load(64, WAITING_PER_REPLICA + 1), 32) == 3
    assert scale.replicas(2, Load(64, 10_000), 32) == 4
    assert scale.replicas(15, Load(480, 10_000), 32) == 20


def test_one_replica_goes_after_a_long_calm() -> None:
    scale = Scale(1, 4)
    few, many = Load(10, 0), Load(60, 0)
    for _ in range(2):
        assert [scale.replicas(3, few, 32) for _ in range(CALM_BEATS)] == [3] * (CALM_BEATS - 1) + [2]
    for _ in range(CALM_BEATS - 1):
        scale.replicas(3, few, 32)
    assert scale.replicas(3, many, 32) == 3, "it would be full"
    assert scale.replicas(3, few, 32) == 3, "the calm begins anew"
    assert [scale.replicas(1, Load(0, 0), 32) for _ in range(3 * CALM_BEATS)] == [1] * 3 * CALM_BEATS


def test_frontends_follow_the_open_sequences() -> None:
    scale = Scale(1, 8)
    assert scale.frontends(1, Load(OPEN_PER_FRONTEND, 0)) == 1
    assert scale.frontends(1, Load(OPEN_PER_FRONTEND, 1)) == 2
    assert scale.frontends(2, Load(0, 100 * OPEN_PER_FRONTEND)) == 4
    assert [scale.frontends(4, Load(5, 0)) for _ in range(CALM_BEATS)][-1] == 3


@given(st.integers(1, 5), st.integers(0, 5), st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 500))))
def test_the_bounds_hold_whatever_the_load(low: int, more: int, loads: list[tuple[int, int]]) -> None:
    replicas, frontends, have = Scale(low, low + more), Scale(low, low + more), low
    others = low
    for running, waiting in loads:
        have = replicas.replicas(have, Load(running, waiting), 64)
        others = frontends.frontends(others, Load(running, waiting))
        assert low <= have <= low + more
        assert low <= others <= low + more
