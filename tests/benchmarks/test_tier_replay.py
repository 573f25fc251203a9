"""The served replay of a trace: how it is scaled, and what is told of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.block_trace import BLOCK_TOKENS, Request, Trace
from benchmarks.served_prompts import Asked
from benchmarks.tier_replay import (
    COMPUTED,
    LARGE,
    PAGE_TOKENS,
    SHAPE,
    Lane,
    Replay,
    prompt_of,
    rows,
    seen_tokens,
    slice_of,
    turned,
)


def trace_of(*prompts: tuple[int, ...]) -> Trace:
    return Trace("made", tuple(Request(0, len(prompt) * BLOCK_TOKENS - 100, 1, prompt) for prompt in prompts))


FOREST = trace_of(
    *((root * 100, *range(root * 100 + 1, root * 100 + 1 + more)) for root in range(40) for more in range(4))
)


def test_trees_are_taken_whole_and_in_order() -> None:
    taken = slice_of(FOREST, 0.3)
    roots = {request.hash_ids[0] for request in taken.requests}
    assert 4 <= len(roots) <= 20
    assert taken.requests == tuple(request for request in FOREST.requests if request.hash_ids[0] in roots)
    assert slice_of(FOREST, 0.3) == taken


def test_prompts_share_as_many_tokens_as_their_blocks_say_and_shrink_alike() -> None:
    first, second = (prompt_of(request) for request in trace_of((1, 2, 3), (1, 2, 4)).requests)
    assert first[: 2 * PAGE_TOKENS] == second[: 2 * PAGE_TOKENS]
    assert first[2 * PAGE_TOKENS :] != second[2 * PAGE_TOKENS :]
    assert len(first) == (3 * BLOCK_TOKENS - 100) * PAGE_TOKENS // BLOCK_TOKENS
    assert max(first) < SHAPE.vocab
    assert len(prompt_of(Request(0, 3, 1, (9,)))) == 1


def test_capacities_are_shares_of_the_distinct_pages_and_one_worker_keeps_nothing() -> None:
    replay = Replay(FOREST, Path("m"), 2)
    page_bytes = SHAPE.kv_elements_per_token * PAGE_TOKENS * 4
    kept = replay.settings("gdsf", LARGE)
    assert kept["store.disk_bytes"] == round(LARGE.disk * 160) * page_bytes
    assert kept["store.eviction"] == "gdsf"
    computed = replay.settings(COMPUTED, LARGE)
    assert (computed["store.host_bytes"], computed["engine.prefix_reuse"]) == (0, "false")


def test_every_prompt_goes_to_all_in_turning_order() -> None:
    names = ["a", "b", "c"]
    assert [turned(names, turn) for turn in range(4)] == [names, ["b", "c", "a"], ["c", "a", "b"], names]


def test_hits_of_the_device_are_those_that_nothing_was_loaded_for() -> None:
    computed = Lane([Asked(1.0, 100, 0), Asked(3.0, 100, 0)])
    lane = Lane([Asked(0.5, 100, 64), Asked(0.5, 100, 96)], {"host": 32, "disk": 48}, 2)
    told = {item.name.removeprefix("x: "): item for item in rows("x", lane, computed, 200)}
    hits = [told[f"tokens hit, {tier}"].figure.median for tier in ("device", "host", "disk")]
    assert hits == [80, 32, 48]
    assert told["tokens computed"].figure.median == 40
    mean = told["TTFT, mean"]
    assert mean.peer is not None
    assert (mean.figure.median, mean.peer.figure.median, mean.peer.ratio) == (0.5, 2.0, 4.0)


def test_tokens_seen_before_are_counted_by_blocks() -> None:
    assert seen_tokens(trace_of((1, 2), (1, 2, 3))) == pytest.approx(2 * PAGE_TOKENS)
