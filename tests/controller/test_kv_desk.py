"""Operators and the tiers of scripted workers, over real sessions: who is asked for what, and what is made of the answers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import pytest

from controller.kv_operations import Prompt, Selection, VerifyBounds
from kv_transfer.keys import HASH_BYTES, chain_hashes
from pdserve.errors import InvalidRequest, NotFound, Unavailable
from pdserve.v1 import worker_pb2
from tests.controller.cluster_twin import PROMPT, ClusterTwin, cluster
from tests.controller.test_kv_routing import CLEARED, STORED, tell_kv, units
from tests.controller.worker_twin import DECODE, PREFILL, WorkerTwin

Command = worker_pb2.KvCommand
KEY = b"k" * HASH_BYTES
UNITS = chain_hashes(b"i" * 32, PROMPT)  # 3 whole units of 50 tokens


def kept(tier: str, first: int, last: int) -> worker_pb2.KvEvent:
    return worker_pb2.KvEvent(kind=STORED, tier=tier, block_hashes=UNITS[first * HASH_BYTES : last * HASH_BYTES])


def answers(worker: WorkerTwin, of: Callable[[Command], Sequence[worker_pb2.TierOutcome]]) -> list[Command]:
    """Makes the worker answer; the commands that it gets."""
    seen: list[Command] = []

    def answer(command: Command) -> worker_pb2.CommandResult:
        seen.append(command)
        pages = [worker_pb2.KvPage(key=KEY, tier=tier, bytes=10, age_s=2.0) for tier in command.tiers]
        is_list = command.action == Command.ACTION_LIST
        return worker_pb2.CommandResult(kv=worker_pb2.KvAnswer(pages=pages if is_list else [], outcomes=of(command)))

    worker.kv_answer = answer
    return seen


def one_page_each(command: Command) -> list[worker_pb2.TierOutcome]:
    return [worker_pb2.TierOutcome(tier=tier, pages=1) for tier in command.tiers]


@asynccontextmanager
async def pair(*tiers: str) -> AsyncIterator[tuple[ClusterTwin, list[Command], list[Command]]]:
    """p0 and d0 with these tiers, and what they are asked."""
    async with cluster() as twin:
        for name, role in (("p0", PREFILL), ("d0", DECODE)):
            worker = twin.twin(name, role)
            worker.tiers = [worker_pb2.TierReport(tier=tier, capacity_bytes=100, hit_tokens=32) for tier in tiers]
            await twin.add(worker)
        yield (
            twin,
            answers(twin.workers["p0"], one_page_each),
            answers(twin.workers["d0"], one_page_each),
        )


async def test_the_shared_tier_is_asked_of_one_worker_and_the_others_of_all() -> None:
    async with pair("host", "redis") as (twin, p0, d0):
        done = await twin.desk.kv.flush(Selection())
        assert [list(command.tiers) for command in d0] == [["device", "host", "redis"]]
        assert [list(command.tiers) for command in p0] == [["device", "host"]]
        assert {(each.worker, each.tier) for each in done.outcomes} == {
            ("d0", "device"), ("d0", "host"), ("d0", "redis"), ("p0", "device"), ("p0", "host"),
        }  # fmt: skip


async def test_the_device_is_flushed_only_whole() -> None:
    async with pair("host") as (twin, p0, _):
        await twin.desk.kv.flush(Selection(worker_id="p0", keys=(KEY,)))
        assert list(p0[-1].tiers) == ["host"]
        await twin.desk.kv.flush(Selection(tier="device"))
        assert list(p0[-1].tiers) == ["device"]
        with pytest.raises(InvalidRequest, match="as a whole"):
            await twin.desk.kv.flush(Selection(tier="device", keys=(KEY,)))


async def test_a_prompt_without_a_whole_unit_never_means_everything() -> None:
    async with pair("host") as (twin, p0, d0):
        with pytest.raises(InvalidRequest, match="fewer than 16"):
            await twin.desk.kv.flush(Selection(prompt=Prompt(PROMPT[:40])))
        assert not p0 + d0


async def test_a_prompt_names_the_keys_of_its_units_under_its_salt() -> None:
    async with pair("host") as (twin, p0, _):
        await twin.desk.kv.pin(Selection(worker_id="p0", prompt=Prompt(PROMPT)), 60.0)
        assert (p0[-1].keys, p0[-1].hold_ms) == (UNITS, 60_000)
        await twin.desk.kv.pin(Selection(worker_id="p0", prompt=Prompt(PROMPT, "salt")), 60.0)
        assert len(p0[-1].keys) == len(UNITS)
        assert p0[-1].keys != UNITS


async def test_nothing_is_pinned_where_it_cannot_be() -> None:
    async with pair("host", "redis") as (twin, p0, d0):
        await twin.desk.kv.pin(Selection(keys=(KEY,)), 1.0)
        assert {tier for command in p0 + d0 for tier in command.tiers} == {"host"}
        for tier in ("device", "redis"):
            with pytest.raises(InvalidRequest, match=tier):
                await twin.desk.kv.pin(Selection(tier=tier, keys=(KEY,)), 1.0)
        with pytest.raises(InvalidRequest, match="Name the pages"):
            await twin.desk.kv.pin(Selection(), 1.0)


async def test_pages_carry_their_worker_and_what_is_unknown_is_not_found() -> None:
    async with pair("host") as (twin, _, _):
        found = await twin.desk.kv.pages(Selection(), 7)
        assert [(page.worker, page.tier, page.key) for page in found.pages] == [
            ("d0", "host", KEY.hex()),
            ("p0", "host", KEY.hex()),
        ]
        with pytest.raises(NotFound, match="nobody"):
            await twin.desk.kv.pages(Selection(worker_id="nobody"), 7)
        with pytest.raises(NotFound, match="tape"):
            await twin.desk.kv.pages(Selection(tier="tape"), 7)


async def test_a_worker_that_refuses_is_told_beside_the_answers_of_the_others() -> None:
    async with pair("host") as (twin, _, _):
        refusal = worker_pb2.CommandResult(reason="overloaded", message="16 commands wait")
        twin.workers["p0"].kv_answer = lambda command: refusal
        done = await twin.desk.kv.verify(Selection(), VerifyBounds())
        assert [each.worker for each in done.outcomes] == ["d0"]
        assert [(each.worker, each.reason) for each in done.silent] == [("p0", "unavailable")]
        assert "16 commands wait" in done.silent[0].message
        with pytest.raises(Unavailable, match="16 commands wait"):
            await twin.desk.kv.verify(Selection(worker_id="p0"), VerifyBounds())


async def test_a_tier_that_cannot_be_looked_at_is_told() -> None:
    async with pair("host", "redis") as (twin, _, _):
        failed = worker_pb2.TierOutcome(tier="redis", failure="Redis failed.")
        for worker in twin.workers.values():
            answers(worker, lambda command: [failed] if "redis" in command.tiers else [])
        pages = await twin.desk.kv.pages(Selection(), 1)
        explained = await twin.desk.kv.explain(Prompt(PROMPT))
        for silent in (pages.silent, explained.silent):
            assert [(each.worker, each.reason, each.message) for each in silent] == [
                ("d0", "tier_failed", "redis: Redis failed.")
            ]


async def test_a_worker_that_is_lost_ends_the_wait_for_its_answer() -> None:
    async with pair("host") as (twin, _, _):

        def die(command: Command) -> None:
            twin.workers["p0"].die()

        twin.workers["p0"].kv_answer = die
        done = await twin.desk.kv.verify(Selection(), VerifyBounds())
        assert [each.worker for each in done.outcomes] == ["d0"]
        assert [each.worker for each in done.silent] == ["p0"]


async def test_a_prompt_is_explained_by_tier_with_the_reach_of_its_gapless_part() -> None:
    async with pair("host", "disk") as (twin, _, _):
        cleared = worker_pb2.KvEvent(kind=CLEARED)
        tell_kv(twin.workers["p0"], 1, cleared, kept("device", 0, 1), kept("host", 0, 2))
        tell_kv(twin.workers["d0"], 1, cleared, kept("disk", 0, 1), kept("disk", 2, 3))
        await twin.until(lambda: bool(units(twin, "p0") and units(twin, "d0")), "events came")
        explained = await twin.desk.kv.explain(Prompt(PROMPT))
        assert (explained.prompt_tokens, explained.keyed_tokens) == (50, 48)
        rows = {each.worker: (dict(each.tokens), each.reusable_tokens) for each in explained.workers}
        assert rows == {
            "p0": ({"device": 16, "host": 32, "disk": 0}, 32),
            "d0": ({"device": 0, "host": 0, "disk": 32}, 16),
        }


async def test_what_lies_in_redis_is_asked_for_since_it_tells_no_events() -> None:
    async with pair("host", "redis") as (twin, _, d0):
        page = worker_pb2.KvPage(key=UNITS[HASH_BYTES : 2 * HASH_BYTES], tier="redis")

        def answer(command: Command) -> worker_pb2.CommandResult:
            d0.append(command)
            return worker_pb2.CommandResult(kv=worker_pb2.KvAnswer(pages=[page]))

        twin.workers["d0"].kv_answer = answer
        tell_kv(twin.workers["p0"], 1, worker_pb2.KvEvent(kind=CLEARED), kept("host", 0, 1))
        await twin.until(lambda: bool(units(twin, "p0")), "events came")
        explained = await twin.desk.kv.explain(Prompt(PROMPT))
        assert list(d0[-1].tiers) == ["redis"]
        rows = {each.worker: (dict(each.tokens), each.reusable_tokens) for each in explained.workers}
        assert rows == {
            "p0": ({"device": 0, "host": 16, "redis": 16}, 32),
            "d0": ({"device": 0, "host": 0, "redis": 16}, 0),
        }


async def test_figures_are_those_of_the_last_report() -> None:
    async with pair("host") as (twin, _, _):
        tell_kv(twin.workers["p0"], 1, worker_pb2.KvEvent(kind=CLEARED), kept("host", 0, 2))
        await twin.until(lambda: bool(units(twin, "p0")), "events came")
        d0, p0 = twin.desk.kv.stat().workers
        assert (d0.worker, p0.worker) == ("d0", "p0")
        assert p0.held_tokens == {"host": 32}
        assert [(tier.tier, tier.hit_tokens, tier.pages) for tier in p0.tiers] == [("host", 32, None)]
        assert p0.device_tokens == 16_000


async def test_without_workers_it_is_unavailable_and_figures_are_empty() -> None:
    async with cluster() as twin:
        assert twin.desk.kv.stat().workers == ()
        with pytest.raises(Unavailable):
            await twin.desk.kv.pages(Selection(), 1)
        with pytest.raises(Unavailable):
            await twin.desk.kv.explain(Prompt(PROMPT))
