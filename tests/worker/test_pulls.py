"""Real workers pull a prompt's pages from each other: the same tokens as computed, whatever the peer does meanwhile."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from pdserve.v1 import worker_pb2
from tests.worker import commands
from tests.worker.conftest import StartWorker
from tests.worker.controller_twin import ControllerTwin, SessionTwin
from tests.worker.processes import NATIVE
from tests.worker.test_handoffs import Pair
from tests.worker.test_native_worker import MODEL
from tests.worker.test_tiers import evict, held, keys_of, prompt

pytestmark = pytest.mark.slow  # real processes

SETS = (f"model.path={MODEL}", "model.dtype=float32", "engine.threads=1", "engine.kv_bytes=8000000")
FAILURES = {"killed": "unavailable", "stopped": "timeout", "lease expired": "lease_expired"}
PAGES = len(prompt(0)) // 16


class Peers:
    """w0 computed prompt 0 and lends it, w1 pulls."""

    def __init__(self, lender: SessionTwin, puller: SessionTwin) -> None:
        self.lender = lender
        self.puller = puller
        self.root = lender.snapshots[0].worker.identity.digest

    def work(self, key: int, number: int = 0) -> worker_pb2.Work:
        return commands.work(key, prompt(number), root=self.root)

    def hinted(self, key: int, number: int = 0, tokens: int = 16 * PAGES) -> worker_pb2.Work:
        work = self.work(key, number)
        work.source.CopyFrom(worker_pb2.KvSource(worker_id="w0", address=self.lender.address, tokens=tokens))
        return work

    async def computed(self, key: int = 1) -> list[int]:
        self.lender.send(commands.generate(self.work(key)))
        await self.lender.until_finished(key)
        await self.lender.until(lambda: keys_of(self.root, 0) <= held(self.lender, "device"))
        return self.lender.tokens(key)[0]

    async def pulled(self, key: int = 2, tokens: int = 16 * PAGES) -> list[int]:
        self.puller.send(commands.generate(self.hinted(key, tokens=tokens)))
        await self.puller.until_finished(key)
        return self.puller.tokens(key)[0]

    def cached(self) -> int:
        return self.puller.of("started")[-1].started.cached_tokens

    async def figures(self, session: SessionTwin) -> worker_pb2.TierLoads:
        """Those of two reports from now: the first may be of before."""
        await session.until_next_load()
        await session.until_next_load()
        return session.loads[-1].loads


async def open_peers(controller: ControllerTwin, start_worker: StartWorker, *sets: str) -> Peers:
    for name in ("w0", "w1"):
        await start_worker(name, "prefill,decode", *SETS, *sets, engine_module=NATIVE)
    return Peers(await controller.session("w0"), await controller.session("w1"))


async def all_free(*sessions: SessionTwin) -> None:
    for session in sessions:
        await session.blocks_free(session.snapshots[0].load.blocks_total)


@pytest.mark.parametrize("transport", ["tcp", "ucx"])
async def test_a_prompt_computed_by_one_worker_is_pulled_by_another(
    controller: ControllerTwin, start_worker: StartWorker, transport: str
) -> None:
    peers = await open_peers(controller, start_worker, f"transfer.transport={transport}")
    expected = await peers.computed()
    assert await peers.pulled() == expected
    assert peers.cached() == 16 * PAGES
    assert not (await peers.figures(peers.puller)).pull_speeds, "the first pull connects"
    peers.lender.send(commands.generate(peers.work(3, 1)))
    await peers.lender.until_finished(3)
    await peers.lender.until(lambda: keys_of(peers.root, 1) <= held(peers.lender, "device"))
    peers.puller.send(commands.generate(peers.hinted(4, 1)))
    await peers.puller.until_finished(4)
    assert peers.puller.tokens(4) == peers.lender.tokens(3)
    figures = await peers.figures(peers.puller)
    assert figures.loaded_tokens == {"peer": 2 * 16 * PAGES}
    assert [speed.worker_id for speed in figures.pull_speeds if speed.page_us > 0] == ["w0"]
    assert (await peers.figures(peers.lender)).lent_tokens == 2 * 16 * PAGES
    await all_free(peers.lender, peers.puller)


async def test_a_prompt_that_a_peer_keeps_in_a_tier_alone_is_pulled_too(
    controller: ControllerTwin, start_worker: StartWorker
) -> None:
    peers = await open_peers(controller, start_worker, "engine.kv_bytes=2000000")
    expected = await peers.computed()
    await peers.lender.until(lambda: keys_of(peers.root, 0) <= held(peers.lender, "host"))
    await evict(peers.lender, peers.root, 0, 100)
    assert await peers.pulled() == expected
    # A quarter of the lender's pool is less than the prompt.
    assert 0 < peers.cached() < 16 * PAGES
    assert peers.cached() == (await peers.figures(peers.puller)).loaded_tokens["peer"]
    await all_free(peers.lender, peers.puller)


async def test_a_hint_that_promises_too_much_brings_what_there_is(
    controller: ControllerTwin, start_worker: StartWorker
) -> None:
    peers = await open_peers(controller, start_worker)
    begun = peers.work(1)
    begun.token_ids, begun.block_hashes = begun.token_ids[: 4 * 100], begun.block_hashes[: 32 * 6]
    begun.prompt_tokens = 100
    peers.lender.send(commands.generate(begun))
    await peers.lender.until_finished(1)
    tokens = await peers.pulled()
    assert peers.cached() == 16 * 6
    assert tokens == await peers.computed(3)
    await all_free(peers.lender, peers.puller)


@pytest.mark.parametrize("transport", ["tcp", "ucx"])
@pytest.mark.parametrize("fault", FAILURES)
async def test_a_peer_that_fails_amid_a_pull_costs_time_and_no_token(
    controller: ControllerTwin, start_worker: StartWorker, transport: str, fault: str
) -> None:
    """The lender's engine is stopped first, so that the pull is surely under way when the rest happens."""
    lease_s, deadline_s = (0.5 if fault == "lease expired" else 10, 5 if fault == "stopped" else 30)
    sets = (f"transfer.transport={transport}", f"transfer.lease_s={lease_s}", f"store.load_deadline_s={deadline_s}")
    peers = await open_peers(controller, start_worker, *sets)
    expected = await peers.computed()
    lender = peers.lender.snapshots[0].worker
    with stopped(lender.engine_pid, lender.pid):
        peers.puller.send(commands.generate(peers.hinted(2)))
        if fault != "lease expired":
            await under_way(peers.puller)
            os.kill(lender.pid, signal.SIGKILL if fault == "killed" else signal.SIGSTOP)
        await peers.puller.until_finished(2)
        assert peers.puller.tokens(2)[0] == expected
        assert peers.cached() == 0
        failed = dict((await peers.figures(peers.puller)).failed_pulls)
        assert failed == {FAILURES[fault]: 1}
        await all_free(peers.puller)
    if fault != "killed":
        await all_free(peers.lender)


async def test_cancel_of_a_request_amid_its_pull_frees_every_block(
    controller: ControllerTwin, start_worker: StartWorker
) -> None:
    peers = await open_peers(controller, start_worker, "store.load_deadline_s=30")
    expected = await peers.computed()
    engine_pid = peers.lender.snapshots[0].worker.engine_pid
    with stopped(engine_pid):
        peers.puller.send(commands.generate(peers.hinted(2)))
        await under_way(peers.puller)
        peers.puller.send(commands.cancel(2))
    await all_free(peers.puller, peers.lender)
    assert not peers.puller.tokens(2)
    assert await peers.pulled(3) == expected
    assert peers.cached() == 16 * PAGES
    await all_free(peers.puller, peers.lender)


async def test_a_prefill_worker_pulls_and_hands_over(controller: ControllerTwin, start_worker: StartWorker) -> None:
    peers = await open_peers(controller, start_worker)
    expected = await peers.computed()
    process = await start_worker("w2", "decode", *SETS, engine_module=NATIVE)
    decode = await controller.session("w2")
    pair = Pair(peers.puller, decode, process, process)
    await pair.start(peers.hinted(2))
    await decode.until_finished(2)
    assert peers.cached() == 16 * PAGES
    assert peers.puller.tokens(2)[0] + decode.tokens(2)[0] == expected
    await all_free(peers.lender, peers.puller, decode)


async def under_way(puller: SessionTwin) -> None:
    """Blocks are open: for the pull, as long as the lender cannot answer."""
    total = puller.snapshots[0].load.blocks_total
    await puller.until(lambda: puller.loads[-1].blocks_free < total)


@contextmanager
def stopped(pid: int, *others: int) -> Iterator[None]:
    """`pid` is stopped at first; it goes on with the others at the end, whatever happens: a stopped process outlives its test."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for each in (*others, pid):
            with suppress(ProcessLookupError):
                os.kill(each, signal.SIGCONT)
