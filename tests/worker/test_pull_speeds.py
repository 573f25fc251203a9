"""What pulls took is believed for a while where it was slow, until the next pull where it was fast."""

from __future__ import annotations

import pytest

from engine.protocol import KvSource
from kv_store.split import Run, best_split
from worker_runtime.pull_speeds import BELIEVED_S, PEERS_REMEMBERED, PullSpeeds

GUESS_S, COMPUTE_S = 0.003, 0.02
W0, W1 = KvSource("w0", "host:1", 64), KvSource("w1", "host:2", 64)


def measured(*pulls: tuple[KvSource, float, float]) -> PullSpeeds:
    """Each of one page: from whom, seconds, when."""
    speeds = PullSpeeds(GUESS_S)
    speeds.compute_page_s = COMPUTE_S
    for source, seconds, now_s in pulls:
        speeds.connect(source)
        speeds.measured(source, 1, seconds, now_s)
    return speeds


def pulled(speeds: PullSpeeds, source: KvSource, now_s: float) -> int:
    """Pages of ten that the worker would pull."""
    return best_split([Run("peer", 10)], 10, {"peer": speeds.of(source, now_s)}, COMPUTE_S).load_pages


def test_one_slow_pull_after_many_fast_ones_keeps_a_peer_away_for_a_while_alone() -> None:
    speeds = measured(*[(W0, 0.001, float(at)) for at in range(20)], (W0, 3.0, 20.0))
    assert pulled(speeds, W0, 21.0) == 0
    assert speeds.told(21.0)["w0"] > COMPUTE_S
    later_s = 20.0 + BELIEVED_S
    assert pulled(speeds, W0, later_s) == 10
    assert speeds.told(later_s) == {}, "routing takes it for one that was never pulled from"
    speeds.measured(W0, 1, 0.001, later_s)
    assert speeds.of(W0, later_s).page_s == 0.001, "what was no longer believed does not weigh"


def test_a_peer_that_stays_slow_costs_one_pull_in_each_while() -> None:
    speeds, pulls = measured((W0, 0.5, 0.0)), 0
    for second in range(int(10 * BELIEVED_S)):
        if pulled(speeds, W0, float(second)):
            speeds.measured(W0, 1, 0.5, float(second))
            pulls += 1
    assert pulls == 9


def test_an_old_slow_peer_is_taken_for_one_like_the_others() -> None:
    speeds = measured((W0, 0.5, 0.0), (W1, 0.004, 100.0), (W1, 0.004, 101.0))
    assert speeds.of(W0, 101.0).page_s == pytest.approx(0.004)
    assert set(speeds.told(101.0)) == {"w1"}


def test_what_is_faster_than_computing_counts_until_the_next_pull() -> None:
    speeds = measured((W0, 0.01, 0.0))
    assert speeds.of(W0, 1e6).page_s == 0.01 > GUESS_S
    assert speeds.told(1e6) == {"w0": 0.01}
    speeds.compute_page_s = 0.005  # no longer faster
    assert (speeds.of(W0, 1e6).page_s, speeds.told(1e6)) == (GUESS_S, {})


def test_a_peer_that_was_started_again_is_another_one() -> None:
    again = KvSource("w0", "host:3", 64)
    speeds = measured((W0, 0.5, 0.0), (W1, 0.004, 40.0))
    assert not speeds.connected(again)
    assert speeds.of(again, 1.0) is speeds.of(None, 1.0)
    speeds.connect(again)
    assert speeds.connected(again)
    assert "w0" not in speeds.told(1.0)


def test_the_first_pull_and_the_one_after_a_failure_have_to_connect() -> None:
    speeds = PullSpeeds(GUESS_S)
    assert not speeds.connected(W0)
    speeds.disconnect(W0)
    speeds.connect(W0)
    assert speeds.connected(W0)
    assert (speeds.of(W0, 0.0).page_s, speeds.told(0.0)) == (GUESS_S, {})
    speeds.disconnect(W0)
    assert not speeds.connected(W0)


def test_so_many_peers_are_remembered_and_no_more() -> None:
    speeds = measured(*[(KvSource(f"w{number}", "a", 1), 0.001, 0.0) for number in range(PEERS_REMEMBERED + 1)])
    assert set(speeds.told(0.0)) == {f"w{number}" for number in range(1, PEERS_REMEMBERED + 1)}
