"""How far a drain has come."""

from __future__ import annotations

from worker_runtime.drain import LAST_WORDS_S, Drain


def test_nothing_is_due_that_was_not_ordered() -> None:
    assert not Drain().due(1e9, 0)


def test_work_may_go_on_until_the_earliest_deadline() -> None:
    drain = Drain()
    assert drain.order(20.0, None)
    assert not drain.order(10.0, None)
    assert not drain.order(30.0, None)
    assert not drain.due(9.9, 1)
    assert drain.due(10.0, 1)


def test_where_nothing_runs_it_is_due_at_once() -> None:
    drain = Drain()
    drain.order(20.0, None)
    assert drain.due(0.0, 0)


def test_all_who_wait_are_told_once() -> None:
    told: list[str] = []
    drain = Drain()
    drain.order(20.0, lambda: told.append("first"))
    drain.order(20.0, lambda: told.append("second"))
    assert drain.begin_last_words(5.0)
    assert not drain.begin_last_words(5.1)
    assert told == ["first", "second"]


def test_last_words_end_when_they_were_heard_or_by_time() -> None:
    drain = Drain()
    drain.order(20.0, None)
    drain.begin_last_words(5.0)
    assert not drain.over(5.1, acknowledged=False)
    assert drain.over(5.1, acknowledged=True)
    assert drain.over(5.0 + LAST_WORDS_S, acknowledged=False)
