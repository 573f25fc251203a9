"""A pull brings all pages with the right bytes or none, over any fault of the wire, and leaves no block held on either side."""

from __future__ import annotations

import asyncio
import threading
import time

import grpc
import pytest

from kv_transfer.transports.inproc import FaultPlan
from pdserve.rpc_errors import error_from_rpc
from pdserve.v1 import kv_pull_pb2, kv_pull_pb2_grpc
from service_kit.config import TransferConfig
from tests.worker.pull_rig import BLOCKS, PAGE_TOKENS, PAGES, Peer, open_peers
from worker_runtime.page_loans import LENT_SHARE, LOANS_PER_PEER
from worker_runtime.tier_reads import arena_pages


async def nothing_held(*peers: Peer) -> None:
    for peer in peers:
        await peer.idle()


async def test_pages_on_the_device_are_lent_and_counted_on_both_sides() -> None:
    async with open_peers() as (lender, puller):
        await lender.compute()
        assert await puller.pull(lender) == PAGES
        await nothing_held(lender, puller)
        assert lender.loans.figures.lent_tokens == PAGES * PAGE_TOKENS
        assert not lender.loans.figures.failed
        assert not puller.pulls.figures.failed


async def test_the_time_to_connect_is_not_taken_for_the_speed_of_a_peer() -> None:
    async with open_peers() as (lender, puller):
        await lender.compute()
        for pages, samples in ((2, 0), (4, 1), (6, 2)):
            assert await puller.pull(lender, pages) == 2
            assert puller.pulls.speed_of(lender.source()).samples == samples
        lender.engine.paused = []
        assert await puller.pull(lender, 8, deadline_s=0.2) == 0
        lender.engine.resume()
        assert not puller.pulls.figures.speeds.connected(lender.source())  # so the next one is not measured either
        assert puller.pulls.speed_of(lender.source()).samples == 2
        assert list(puller.pulls.figures.speeds.told(time.monotonic())) == [lender.source().worker_id]


async def test_pages_that_only_a_tier_has_are_read_lent_and_kept_on_the_device() -> None:
    async with open_peers() as (lender, puller):
        await lender.compute(3)
        lender.shelve()
        assert await puller.pull(lender) == PAGES
        await nothing_held(lender, puller)
        assert {each.key for each in lender.stretch().ids} <= lender.engine.keys


async def test_only_what_the_puller_lacks_is_sent() -> None:
    async with open_peers() as (lender, puller):
        await lender.compute()
        await puller.compute(4)
        assert await puller.pull(lender) == PAGES - 4
        await nothing_held(lender, puller)
        assert lender.loans.figures.lent_tokens == (PAGES - 4) * PAGE_TOKENS


async def test_a_peer_that_has_less_than_was_believed_gives_what_it_has() -> None:
    async with open_peers() as (lender, puller):
        await lender.compute(6)
        assert await puller.pull(lender) == 6
        assert not puller.pulls.figures.failed
        await nothing_held(lender, puller)


async def test_a_peer_that_has_nothing_is_counted_and_asked_again_the_next_time() -> None:
    async with open_peers() as (lender, puller):
        assert await puller.pull(lender) == 0
        assert puller.pulls.figures.failed == {"not_found": 1}
        await lender.compute()
        assert await puller.pull(lender) == PAGES


async def test_a_page_that_turns_out_bad_in_the_tier_shortens_the_pull() -> None:
    async with open_peers() as (lender, puller):
        lender.shelve()
        lost = lender.stretch().ids[7].key
        lender.shelf.before_read = lambda: lender.shelf.held.pop(lost, None)
        assert await puller.pull(lender) == 7
        await nothing_held(lender, puller)


@pytest.mark.parametrize("seed", range(10))
async def test_flipped_bits_are_found_and_nothing_is_taken_over(seed: int) -> None:
    async with open_peers(FaultPlan(seed=seed, corrupt=1.0)) as (lender, puller):
        await lender.compute()
        assert await puller.pull(lender) == 0
        await nothing_held(lender, puller)
        assert puller.pulls.figures.failed == {"kv_corrupt": 1}
        assert puller.kv.receiver.counters.verify_failures >= 1
        await lender.until(
            lambda: lender.loans.figures.failed == {"kv_corrupt": 1}
        )  # counted behind the return of its pins


@pytest.mark.parametrize("seed", range(20))
async def test_whatever_the_wire_does_all_bytes_are_right_or_none_is_taken(seed: int) -> None:
    plan = FaultPlan(
        seed=seed, drop_connection=0.02, duplicate=0.2, reorder=0.3, corrupt=0.02, truncate=0.02, delay_s=0.005
    )
    async with open_peers(plan) as (lender, puller):
        await lender.compute()
        good: list[int] = []
        for pages in (4, 8, PAGES):
            good.append(await puller.pull(lender, pages))
            await nothing_held(lender, puller)
        assert sum(puller.pulls.figures.failed.values()) == good.count(0)
        assert all(pages in (0, wanted) for pages, wanted in zip(good, wanted_then(good), strict=True))


async def test_a_peer_that_does_not_answer_costs_the_deadline_and_is_left_alone_for_a_while() -> None:
    async with open_peers() as (lender, puller):
        await lender.compute()
        lender.engine.paused = []
        assert await puller.pull(lender, deadline_s=0.2) == 0
        assert puller.pulls.figures.failed == {"timeout": 1}
        assert not puller.engine.blocks_held
        assert puller.pulls.run(lender.source(), 0, PAGES) is None
        lender.engine.resume()
        await nothing_held(lender, puller)
        assert lender.loans.figures.lent_tokens == 0


@pytest.mark.parametrize("seed", range(10))
async def test_what_a_late_pull_still_has_under_way_never_lands_in_blocks_that_others_use(seed: int) -> None:
    async with open_peers(FaultPlan(seed=seed, reorder=1.0, delay_s=0.2)) as (lender, puller):
        await lender.compute()
        assert await puller.pull(lender, deadline_s=0.1) == 0
        assert puller.pulls.figures.failed == {"timeout": 1}
        until_s = time.monotonic() + 20.0
        opened = await puller.engine.openings.open(puller.stretch().to_load, until_s)
        assert opened is not None
        arena = arena_pages(puller.engine)
        arena[:, list(opened.blocks)] = 0xAB
        await lender.until(lambda: not lender.engine.blocks_held and not puller.kv.receiver.held)
        assert (arena[:, list(opened.blocks)] == 0xAB).all()
        puller.engine.openings.end(opened.load_id, 0)


async def test_a_lease_that_expires_while_the_peer_reads_ends_the_pull_and_what_comes_late_is_refused() -> None:
    reading, go_on = threading.Event(), threading.Event()
    config = TransferConfig(heartbeat_s=0.1, lease_s=2.0, connect_s=30.0)
    async with open_peers(config=config) as (lender, puller):
        lender.shelve()
        lender.shelf.before_read = lambda: reading.set() or go_on.wait(20.0)  # type: ignore[func-returns-value]
        assert await puller.pull(lender) == 0
        assert reading.is_set()
        assert puller.pulls.figures.failed == {"lease_expired": 1}
        assert puller.kv.receiver.counters.expired_leases == 1
        assert lender.engine.blocks_held == PAGES
        await puller.compute()  # others use the blocks now
        go_on.set()
        await lender.until(lambda: bool(lender.loans.figures.failed))
        await nothing_held(lender, puller)
        assert lender.loans.figures.lent_tokens == 0


async def test_a_peer_that_is_gone_is_noticed_at_once() -> None:
    async with open_peers() as (lender, puller):
        lender.address = "127.0.0.1:1"
        assert await puller.pull(lender) == 0
        assert puller.pulls.figures.failed == {"unavailable": 1}


async def test_a_peer_of_another_model_is_refused_by_name() -> None:
    async with open_peers(identity=b"x" * 32) as (lender, puller):
        await lender.compute()
        assert await puller.pull(lender) == 0
        assert puller.pulls.figures.failed == {"layout_mismatch": 1}
        assert lender.loans.figures.failed == {"layout_mismatch": 1}
        await nothing_held(lender, puller)


async def test_a_peer_may_have_so_many_pulls_open_and_no_more() -> None:
    async with open_peers() as (lender, puller):
        await lender.compute(2)
        lender.engine.paused = []
        pulls = [asyncio.create_task(puller.pull(lender, 2)) for _ in range(LOANS_PER_PEER)]
        await lender.until(lambda: len(lender.engine.paused or ()) == LOANS_PER_PEER)
        assert await puller.pull(lender, 2) == 0
        assert lender.loans.figures.failed == {"no_capacity": 1}
        lender.engine.resume()
        assert await asyncio.gather(*pulls) == [2] * LOANS_PER_PEER
        await nothing_held(lender, puller)


async def test_only_a_share_of_the_pool_is_lent_at_a_time() -> None:
    share = int(LENT_SHARE * BLOCKS)
    assert PAGES < share < 2 * PAGES
    async with open_peers() as (lender, puller):
        await lender.compute()
        lender.engine.paused = []
        first = asyncio.create_task(puller.pull(lender))
        await lender.until(lambda: bool(lender.engine.paused))
        second = asyncio.create_task(puller.pull(lender))
        await lender.until(lambda: len(lender.engine.paused or ()) == 2)
        lender.engine.resume()
        assert sorted(await asyncio.gather(first, second)) == [share - PAGES, PAGES]
        await nothing_held(lender, puller)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"worker_id": ""}, "worker_id"),
        ({"address": "x" * 300}, "address"),
        ({"token_ids": b""}, "token_ids"),
        ({"token_ids": bytes(100)}, "token_ids"),
        ({"block_hashes": bytes(32)}, "block_hashes"),
        ({"first_page": PAGES}, "first_page"),
        ({"tenant": bytes(33)}, "tenant"),
    ],
)
async def test_a_malformed_request_is_refused_with_its_field(change: dict[str, object], named: str) -> None:
    async with open_peers() as (lender, puller):
        stretch, side = lender.stretch(), puller.kv.side
        request = kv_pull_pb2.PullRequest(
            worker_id="w1", address="127.0.0.1:1", token_ids=stretch.token_ids, block_hashes=stretch.keys, deadline_ms=1
        )
        request.grant.identity.CopyFrom(side.identity.to_proto())
        request.grant.layout.extend(group.to_proto() for group in side.groups)
        for name, value in change.items():
            setattr(request, name, value)
        stub = kv_pull_pb2_grpc.KvPullServiceStub(puller.kv.channel(lender.address))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.Pull(request)
        error = error_from_rpc(refused.value)
        assert (error.reason, error.param) == ("invalid_request_error", named)
        assert not lender.engine.blocks_held


def wanted_then(good: list[int]) -> list[int]:
    """What each pull of 4, 8 and PAGES asked for, by what the earlier ones brought."""
    return [pages - sum(good[:at]) for at, pages in enumerate((4, 8, PAGES))]
