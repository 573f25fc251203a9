"""Every eviction policy keeps the contract of kv_store.eviction.EvictionPolicy."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_store.benefit import LEAST_BENEFIT_S
from kv_store.eviction import EvictionPolicy
from kv_store.gdsf import Gdsf
from kv_store.policies import POLICIES, policy_of
from kv_store.s3_fifo import S3Fifo
from pdserve.errors import ConfigInvalid

PAGE_BYTES = 10
Step = tuple[str, int]


@pytest.fixture(params=sorted(POLICIES))
def policy(request: pytest.FixtureRequest) -> EvictionPolicy:
    return policy_of(request.param)()


def key_of(number: int) -> bytes:
    return number.to_bytes(4, "big")


def fill(policy: EvictionPolicy, pages: int) -> None:
    for number in range(pages):
        policy.added(key_of(number), PAGE_BYTES, 1.0)


def always(key: bytes) -> bool:
    return True


def leaving(policy: EvictionPolicy) -> list[bytes]:
    """All pages in the order in which they leave."""
    order: list[bytes] = []
    while (key := policy.victim(always)) is not None:
        policy.removed(key)
        order.append(key)
    return order


def counted(allowed: Callable[[bytes], bool]) -> tuple[Callable[[bytes], bool], list[bytes]]:
    asked: list[bytes] = []

    def evictable(key: bytes) -> bool:
        asked.append(key)
        return allowed(key)

    return evictable, asked


def test_an_empty_tier_has_no_victim(policy: EvictionPolicy) -> None:
    assert policy.victim(always) is None


def test_every_page_leaves_once(policy: EvictionPolicy) -> None:
    fill(policy, 50)
    for number in range(0, 50, 3):
        policy.hit(key_of(number))
    assert sorted(leaving(policy)) == [key_of(number) for number in range(50)]


def test_of_pages_alike_the_first_that_came_leaves_first(policy: EvictionPolicy) -> None:
    fill(policy, 20)
    assert leaving(policy) == [key_of(number) for number in range(20)]


def test_a_page_that_was_read_outlives_those_that_were_not(policy: EvictionPolicy) -> None:
    fill(policy, 20)
    policy.hit(key_of(0))
    assert leaving(policy)[-1] == key_of(0)


def test_the_only_evictable_page_is_the_victim_wherever_it_stands(policy: EvictionPolicy) -> None:
    fill(policy, 300)
    for number in (0, 7, 150, 299, 42):
        assert policy.victim(key_of(number).__eq__) == key_of(number)
    assert policy.victim(lambda key: False) is None


def test_a_victim_that_is_not_taken_is_still_there(policy: EvictionPolicy) -> None:
    fill(policy, 3)
    first = policy.victim(always)
    assert policy.victim(always) == first
    assert len(leaving(policy)) == 3


def test_a_page_may_come_again_after_it_left(policy: EvictionPolicy) -> None:
    fill(policy, 4)
    order = leaving(policy)
    fill(policy, 4)
    policy.removed(key_of(2))
    assert sorted(leaving(policy)) == sorted(set(order) - {key_of(2)})


def test_many_pages_that_must_stay_are_not_asked_again_for_each_victim(policy: EvictionPolicy) -> None:
    held, pages = 2_000, 4_000
    fill(policy, pages)
    evictable, asked = counted(lambda key: key >= key_of(held))
    for _ in range(1_000):
        key = policy.victim(evictable)
        assert key is not None
        assert key >= key_of(held)
        policy.removed(key)
    assert len(asked) < held + 1_000 * 20


def test_a_long_chain_leaves_last_page_first_without_a_walk_along_it_for_each_page(policy: EvictionPolicy) -> None:
    pages = 1_000
    fill(policy, pages)  # each the parent of the next
    last = pages - 1
    evictable, asked = counted(lambda key: key == key_of(last))
    while last >= 0:
        assert policy.victim(evictable) == key_of(last)
        policy.removed(key_of(last))
        last -= 1
    assert len(asked) < 20 * pages


def test_pages_that_may_leave_again_do_so_before_all_others_left(policy: EvictionPolicy) -> None:
    fill(policy, 200)
    for _ in range(50):
        key = policy.victim(lambda key: key >= key_of(100))
        assert key is not None
        policy.removed(key)
    assert set(leaving(policy)[:100]) >= {key_of(number) for number in range(90)}


def test_a_page_that_lost_its_last_child_is_the_next_to_leave_if_its_turn_has_passed(policy: EvictionPolicy) -> None:
    fill(policy, 200)
    parents = {key_of(number) for number in range(100)}
    victim = policy.victim(lambda key: key not in parents)
    assert victim == key_of(100)
    policy.removed(victim)
    parents -= {key_of(50), key_of(60)}
    policy.bared(key_of(50))
    policy.bared(key_of(60))
    policy.bared(key_of(199))  # its turn has not come
    policy.bared(b"never here")
    for expected in (50, 60, 101):
        victim = policy.victim(lambda key: key not in parents)
        assert victim == key_of(expected)
        policy.removed(victim)


def test_a_page_that_lost_its_last_child_and_was_read_then_leaves_in_its_new_turn(policy: EvictionPolicy) -> None:
    fill(policy, 20)
    assert policy.victim(key_of(19).__eq__) == key_of(19)
    policy.bared(key_of(0))
    policy.hit(key_of(0))
    assert leaving(policy)[-1] == key_of(0)


@given(
    name=st.sampled_from(sorted(POLICIES)),
    steps=st.lists(
        st.tuples(st.sampled_from(["add", "hit", "evict", "remove", "bare"]), st.integers(0, 7)), max_size=60
    ),
    stuck=st.sets(st.integers(0, 7)),
)
def test_a_victim_is_always_a_page_that_is_here_and_may_leave(name: str, steps: list[Step], stuck: set[int]) -> None:
    policy = policy_of(name)()
    here: set[bytes] = set()
    fixed = {key_of(number) for number in stuck}
    for verb, number in steps:
        key = key_of(number)
        if verb == "add" and key not in here:
            policy.added(key, 1 + number % 3, number / 4)
            here.add(key)
        elif verb == "hit" and key in here:
            policy.hit(key)
        elif verb == "remove" and key in here:
            policy.removed(key)
            here.discard(key)
        elif verb == "bare":
            policy.bared(key)
        elif verb == "evict":
            victim = policy.victim(lambda key: key not in fixed)
            assert (victim is None) == (not here - fixed)
            if victim is not None:
                assert victim in here - fixed
                policy.removed(victim)
                here.discard(victim)


def test_an_unknown_policy_is_refused_by_name() -> None:
    with pytest.raises(ConfigInvalid, match="lru"):
        policy_of("random")


def test_s3_fifo_keeps_pages_in_use_through_a_scan_of_pages_that_are_used_once() -> None:
    policy = S3Fifo()
    fill(policy, 100)
    used = {key_of(number) for number in range(50)}
    for key in used:
        policy.hit(key)
    for number in range(1_000, 3_000):
        victim = policy.victim(always)
        assert victim is not None
        policy.removed(victim)
        assert victim not in used
        policy.added(key_of(number), PAGE_BYTES, 1.0)


def test_s3_fifo_takes_a_page_that_left_too_early_straight_to_the_main_queue() -> None:
    policy = S3Fifo()
    fill(policy, 100)
    for number in range(50):
        policy.hit(key_of(number))
    early = policy.victim(always)
    assert early is not None
    policy.removed(early)
    policy.added(early, PAGE_BYTES, 1.0)
    order = leaving(policy)
    assert order.index(early) > order.index(key_of(99))


def test_s3_fifo_counts_bytes_not_pages() -> None:
    policy = S3Fifo()
    policy.added(b"main", 1_000, 1.0)
    policy.hit(b"main")
    policy.added(b"tiny", 1, 1.0)
    assert policy.victim(always) == b"tiny"
    policy.added(b"new", 50, 1.0)  # 51 of 1,051 bytes are no tenth, so the main queue gives
    assert policy.victim(always) == b"main"


def test_gdsf_gives_up_first_what_is_cheapest_to_compute_again_per_byte() -> None:
    policy = Gdsf()
    policy.added(b"dear", 10, 5.0)
    policy.added(b"large", 100, 5.0)
    policy.added(b"cheap", 10, 0.1)
    assert leaving(policy) == [b"cheap", b"large", b"dear"]


def test_gdsf_lets_go_of_what_was_useful_only_once() -> None:
    policy = Gdsf()
    policy.added(b"old", 1, 20.0)
    for number in range(200):
        policy.added(key_of(number), 1, 1.0)
        victim = policy.victim(key_of(number).__ne__)
        assert victim is not None
        policy.removed(victim)
        if victim == b"old":
            return
        policy.hit(key_of(number))
    pytest.fail("a page that nobody reads stayed for ever")


def test_gdsf_ranks_pages_from_before_the_first_measurement_like_the_first_measured_one() -> None:
    policy = Gdsf()
    for key in (b"unused", b"read", b"early", b"late"):
        policy.added(key, 10, 0.0)
    policy.hit(b"read")
    assert policy.victim(always) == b"unused"
    policy.removed(b"unused")  # the clock has moved
    policy.added(b"measured", 10, 0.002)
    policy.added(b"cheaper", 10, 0.001)
    policy.added(b"dearer", 10, 0.003)
    assert leaving(policy) == [b"early", b"late", b"cheaper", b"read", b"measured", b"dearer"]


def test_gdsf_ranks_an_unmeasured_page_like_the_last_measured_one() -> None:
    policy = Gdsf()
    policy.added(b"slow", 10, 5.0)
    policy.added(b"fast", 10, 0.1)
    policy.added(b"unmeasured", 10, 0.0)
    assert leaving(policy) == [b"fast", b"unmeasured", b"slow"]


def test_gdsf_takes_no_unit_from_a_page_that_is_worth_nothing() -> None:
    policy = Gdsf()
    policy.added(b"unmeasured", 10, 0.0)
    policy.added(b"worthless", 10, LEAST_BENEFIT_S)
    policy.added(b"measured", 10, 0.5)
    policy.added(b"cheap", 10, 0.1)
    policy.hit(b"cheap")
    assert leaving(policy) == [b"worthless", b"cheap", b"unmeasured", b"measured"]


def test_gdsf_ranks_an_unmeasured_page_by_no_page_that_is_worth_nothing() -> None:
    policy = Gdsf()
    policy.added(b"measured", 10, 0.5)
    policy.added(b"worthless", 10, LEAST_BENEFIT_S)
    policy.added(b"unmeasured", 10, 0.0)
    policy.added(b"cheap", 10, 0.1)
    assert leaving(policy) == [b"worthless", b"cheap", b"measured", b"unmeasured"]


def test_gdsf_gives_parked_pages_the_unit_of_the_first_measurement_too() -> None:
    policy = Gdsf()
    policy.added(b"parked", 10, 0.0)
    policy.added(b"other", 10, 0.0)
    assert policy.victim(b"other".__eq__) == b"other"
    policy.added(b"measured", 10, 0.5)
    policy.hit(b"parked")
    assert leaving(policy) == [b"other", b"measured", b"parked"]
