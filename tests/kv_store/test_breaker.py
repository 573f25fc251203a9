"""kv_store.breaker: a dead medium is asked once per pause."""

from __future__ import annotations

from kv_store.backoff import Backoff
from kv_store.breaker import Breaker


def breaker() -> Breaker:
    return Breaker(Backoff(first_s=1.0, most_s=4.0), lost_s=10.0)


def test_calls_go_out_until_one_fails() -> None:
    tested = breaker()
    assert all(tested.admits(0.0) for _ in range(3))
    tested.failed(0.0)
    assert not tested.admits(0.5)


def test_after_the_pause_one_probe_goes_out_and_its_success_lets_all_through() -> None:
    tested = breaker()
    tested.failed(0.0)
    assert tested.admits(1.0)
    assert not tested.admits(1.0)
    tested.worked()
    assert all(tested.admits(1.0) for _ in range(3))


def test_a_failed_probe_makes_the_next_pause_longer_up_to_the_longest() -> None:
    tested, now_s, pauses = breaker(), 0.0, []
    tested.failed(now_s)
    for _ in range(4):
        failed_s = now_s
        while not tested.admits(now_s):
            now_s += 0.25
        pauses.append(now_s - failed_s)
        tested.failed(now_s)
    assert pauses == [1.0, 2.0, 4.0, 4.0]


def test_calls_that_fail_together_count_once() -> None:
    tested = breaker()
    for _ in range(4):
        tested.failed(0.0)
    assert tested.admits(1.0)


def test_a_probe_without_a_verdict_does_not_close_the_door_for_ever() -> None:
    tested = breaker()
    tested.failed(0.0)
    assert tested.admits(1.0)
    assert not tested.admits(10.9)
    assert tested.admits(11.0)
