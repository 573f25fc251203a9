"""The replay of traces: what it counts, against counting by hand; and that no policy beats the one that knows the future."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import msgspec
import pytest

from benchmarks import cache_replay
from benchmarks.block_trace import BLOCK_TOKENS, Request, Trace, belady_hits, read_traces, unbounded_hits
from benchmarks.cache_replay import PrefillCost, SecondUse, Tier, replay, replay_two_tiers, write_through
from benchmarks.report import compare, result
from kv_store.policies import POLICIES, policy_of

COST = PrefillCost(0.001, 0.0)


def trace_of(*prompts: tuple[int, ...]) -> Trace:
    return Trace("made", tuple(Request(0, len(prompt) * BLOCK_TOKENS, 1, prompt) for prompt in prompts))


def conversations(requests: int) -> Trace:
    """Prompts that go on where earlier ones ended, so that equal blocks have equal prefixes."""
    source = random.Random(5)
    numbers = itertools.count()
    known: list[tuple[int, ...]] = []
    for _ in range(requests):
        begin = source.choice(known)[: source.randrange(8)] if known and source.random() < 0.7 else ()
        known.append((*begin, *(next(numbers) for _ in range(source.randrange(1, 5)))))
    return trace_of(*known)


def test_a_request_hits_the_prefix_that_was_stored_before_it() -> None:
    trace = trace_of((1, 2, 3), (1, 2, 4), (5, 3), (1, 2, 4))
    found = replay(trace, Tier(100, policy_of("lru")()), COST.of_block, COST)
    assert found.blocks == 2 + 0 + 3
    assert found.saved_s == pytest.approx(5 * BLOCK_TOKENS * 0.001)


def test_without_a_limit_all_that_was_seen_is_found() -> None:
    trace = conversations(300)
    assert replay(trace, Tier(trace.blocks, policy_of("lru")()), COST.of_block, COST).blocks == unbounded_hits(trace)
    assert belady_hits(trace, trace.blocks) == unbounded_hits(trace)


@pytest.mark.parametrize("name", sorted(POLICIES))
@pytest.mark.parametrize("capacity", [5, 20, 80])
def test_no_policy_beats_the_one_that_knows_the_future(name: str, capacity: int) -> None:
    trace = conversations(300)
    hits = replay(trace, Tier(capacity, policy_of(name)()), COST.of_block, COST).blocks
    assert 0 < hits <= belady_hits(trace, capacity) <= unbounded_hits(trace)


def test_the_policy_that_knows_the_future_keeps_what_comes_back_first() -> None:
    assert belady_hits(trace_of((1,), (2,), (3,), (1,), (2,)), 2) == 1
    assert belady_hits(trace_of((1,), (2,), (3,), (2,), (1,), (2,)), 2) == 2


def test_two_tiers_find_on_disk_what_left_ram(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_replay, "RAM_BLOCKS", 4)
    trace = trace_of((1, 2), (3, 4), (5, 6), (1, 2), (1, 2))
    through = replay_two_tiers(trace, write_through, COST)
    assert (through.blocks, through.ram_blocks) == (4, 2)
    second = replay_two_tiers(trace, SecondUse(), COST)
    assert (second.blocks, second.ram_blocks) == (2, 2)


def test_under_gdsf_the_disk_keeps_what_is_dear_by_its_place_and_lets_it_go_where_all_are_alike(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cache_replay, "RAM_BLOCKS", 1)
    monkeypatch.setattr(cache_replay, "DISK_BLOCKS", 4)
    trace = trace_of((1, 2, 3), (4,), (5,), (1, 2, 3))
    dear = replay_two_tiers(trace, write_through, COST, "gdsf", lambda ordinal: 1.0 + 9.0 * ordinal)
    level = replay_two_tiers(trace, write_through, COST, "gdsf")
    assert (dear.blocks, level.blocks) == (3, 2)


def test_the_cost_of_a_prefill_is_fitted_to_what_was_measured() -> None:
    true = PrefillCost(8e-4, 1e-7)
    rates = {tokens: tokens / true.of(tokens) for tokens in (512, 2048, 8192)}
    items = [
        compare(f"float32: prefill, {tokens} tokens / {peer}", "tok/s", [rate], (peer, [rate]), "higher")
        for tokens, rate in rates.items()
        for peer in ("one", "another")
    ]
    fitted = PrefillCost.measured(result("peers", "quick", {}, items))
    assert fitted.linear_s == pytest.approx(true.linear_s)
    assert fitted.quadratic_s == pytest.approx(true.quadratic_s)
    assert sum(fitted.of_block(ordinal) for ordinal in range(9)) == pytest.approx(true.of(9 * BLOCK_TOKENS))


def test_traces_are_read_by_their_names_and_a_folder_without_any_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_traces(tmp_path)
    trace = trace_of((1, 2), (1, 3))
    (tmp_path / "made_trace.jsonl").write_bytes(b"\n".join(map(msgspec.json.encode, trace.requests)) + b"\n")
    assert read_traces(tmp_path) == [trace]


def test_without_traces_nothing_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(cache_replay.TRACES_VARIABLE, raising=False)
    with pytest.raises(SystemExit):
        cache_replay.main([])
    assert cache_replay.TRACES_VARIABLE in capsys.readouterr().err
