"""Real workers pull a prompt's pages from each other: the same tokens as computed, whatever the peer does meanwhile."""

from __future__ import annotations

import pytest

from pdserve.v1 import worker_pb2
from tests.worker import commands
from tests.worker.conftest import StartWorker
from tests.worker.controller_twin import ControllerTwin, SessionTwin
from tests.worker.processes import NATIVE
from tests.worker.test_native_worker import MODEL
from tests.worker.test_tiers import held, keys_of, prompt

pytestmark = pytest.mark.slow  # real processes

SETS = (f"model.path={MODEL}", "model.dtype=float32", "engine.threads=1", "engine.kv_bytes=8000000")
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
    assert (await peers.figures(peers.puller)).loaded_tokens == {"peer": 16 * PAGES}
    assert (await peers.figures(peers.lender)).lent_tokens == 16 * PAGES
    await all_free(peers.lender, peers.puller)
