"""The queue in front of the workers: bound, order, patience."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.admission import AdmissionLimits, Waiting, WaitingQueue, check_route, note_shortage
from controller.request import Route
from pdserve.errors import DeadlineExceeded, InvalidRequest, NoDecodeWorkers, NoPrefillWorkers

LIMITS = AdmissionLimits(queue_limit=3, queue_timeout_s=10.0, no_worker_grace_s=2.0)


def entry(
    name: str, *, priority: int = 0, retry: bool = False, now: float = 0.0, route: Route | None = None
) -> Waiting[str]:
    return Waiting(name, priority, retry, now, route)


def queue_of(*entries: Waiting[str]) -> WaitingQueue[str]:
    queue: WaitingQueue[str] = WaitingQueue(LIMITS)
    for each in entries:
        queue.enter(each)
    return queue


def test_lost_work_goes_first_then_priority_then_arrival() -> None:
    queue = queue_of(entry("a"), entry("b", priority=-1), entry("c"), entry("lost", retry=True))
    assert [each.item for each in queue.candidates()] == ["lost", "b", "a", "c"]


def test_what_comes_back_keeps_its_place() -> None:
    first = entry("first")
    queue = queue_of(first, entry("second"))
    assert queue.leave(first)
    queue.enter(first)
    assert [each.item for each in queue.candidates()] == ["first", "second"]


def test_only_new_requests_count_against_the_bound() -> None:
    queue = queue_of(*(entry(str(number)) for number in range(3)), entry("lost", retry=True))
    assert not queue.over_limit
    queue.enter(entry("one more"))
    assert queue.over_limit
    assert queue.full().retry_after_s


def test_behind_a_blocked_head_only_those_with_a_route_are_tried() -> None:
    head, routed = entry("head"), entry("routed", route=Route("", "d0"))
    queue = queue_of(head, entry("behind"), routed)
    tried = []
    for each in queue.candidates():
        tried.append(each.item)
        note_shortage(each, "capacity", 0.0)
    assert tried == ["head", "routed"]


def test_nobody_waits_behind_one_that_is_kept_apart() -> None:
    head = entry("head", retry=True)
    head.apart = True
    tried = []
    for each in queue_of(head, entry("behind")).candidates():
        tried.append(each.item)
        note_shortage(each, "capacity", 0.0)
    assert tried == ["head", "behind"]


@pytest.mark.parametrize(("short", "error"), [("no_decode", NoDecodeWorkers), ("no_prefill", NoPrefillWorkers)])
def test_a_missing_pool_is_waited_for_during_the_grace(short: str, error: type[Exception]) -> None:
    waiting = entry("a", now=1.0)
    queue = queue_of(waiting)
    note_shortage(waiting, short, 1.5)  # type: ignore[arg-type]
    assert queue.expired(3.4, None) == []
    assert isinstance(queue.expired(3.6, None)[0][1], error)
    assert len(queue) == 0


def test_with_no_worker_at_all_everybody_gives_up_not_only_the_head() -> None:
    queue = queue_of(entry("a", now=1.0), entry("b", now=1.5))
    assert [each.item for each, _ in queue.expired(3.2, 0.0)] == ["a"]
    assert [each.item for each, _ in queue.expired(3.6, 0.0)] == ["b"]


def test_a_shortage_that_ends_starts_its_grace_anew() -> None:
    waiting = entry("a")
    queue = queue_of(waiting)
    note_shortage(waiting, "no_decode", 0.0)
    note_shortage(waiting, "capacity", 1.0)
    note_shortage(waiting, "no_decode", 1.5)
    assert queue.expired(3.0, None) == []


def test_waiting_for_room_ends_by_the_queue_timeout() -> None:
    waiting = entry("a")
    queue = queue_of(waiting)
    note_shortage(waiting, "capacity", 0.0)
    assert queue.expired(9.9, None) == []
    assert isinstance(queue.expired(10.0, None)[0][1], DeadlineExceeded)


def test_a_route_must_name_known_workers() -> None:
    check_route(None, frozenset())
    check_route(Route("", "d0"), frozenset({"d0"}))
    for route in (Route("p9", "d0"), Route("", "d9"), Route("d0", "")):
        with pytest.raises(InvalidRequest):
            check_route(route, frozenset({"d0"}))


@given(st.lists(st.tuples(st.integers(-2, 2), st.booleans()), max_size=30))
def test_order_is_total_and_nothing_is_lost(rows: list[tuple[int, bool]]) -> None:
    entries = [entry(str(place), priority=priority, retry=retry) for place, (priority, retry) in enumerate(rows)]
    queue = queue_of(*entries)
    found = list(queue.candidates())
    assert sorted(each.item for each in found) == sorted(each.item for each in entries)
    assert [each.order for each in found] == sorted(each.order for each in found)
    assert queue.over_limit == (sum(not retry for _, retry in rows) > LIMITS.queue_limit)
    assert all(queue.leave(each) for each in found)
    assert (len(queue), queue.over_limit) == (0, False)
