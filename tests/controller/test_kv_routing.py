"""Requests go where their prompt lies already, over real sessions; a gap in a worker's events is healed by a snapshot."""

from __future__ import annotations

from kv_transfer.keys import chain_hashes
from pdserve.v1 import worker_pb2
from tests.controller.cluster_twin import PROMPT, ClusterTwin, asked, cluster
from tests.controller.worker_twin import WorkerTwin

STORED, CLEARED = worker_pb2.KvEvent.KIND_STORED, worker_pb2.KvEvent.KIND_CLEARED


def tell_kv(worker: WorkerTwin, first: int, *events: worker_pb2.KvEvent) -> None:
    assert worker.session is not None
    message = worker_pb2.SessionResponse(kv=worker_pb2.KvEvents(first_sequence=first, events=events))
    worker.session.queue.put_nowait(message)


def stored(prompt: bytes) -> worker_pb2.KvEvent:
    return worker_pb2.KvEvent(kind=STORED, tier="device", block_hashes=chain_hashes(b"i" * 32, prompt))


def units(twin: ClusterTwin, worker_id: str) -> dict[str, int]:
    record = twin.fleet.record(worker_id)
    return record.holdings.units() if record is not None else {}


async def test_a_prompt_goes_to_the_worker_that_holds_it_every_time() -> None:
    prompt = PROMPT * 20
    async with cluster() as twin:
        await twin.square()
        tell_kv(twin.workers["p1"], 1, worker_pb2.KvEvent(kind=CLEARED), stored(prompt))
        await twin.until(lambda: bool(units(twin, "p1")), "p1's events came")
        for _ in range(6):
            await twin.collect(asked(3, prompt=prompt))
        prefills = {
            name: sum(c.WhichOneof("command") == "prefill" for c in w.commands) for name, w in twin.workers.items()
        }
        assert prefills == {"p0": 0, "p1": 6, "d0": 0, "d1": 0}


async def test_a_gap_makes_the_controller_ask_for_a_snapshot_and_believe_that() -> None:
    async with cluster() as twin:
        await twin.square()
        worker = twin.workers["p0"]
        tell_kv(worker, 1, worker_pb2.KvEvent(kind=CLEARED), stored(PROMPT))
        tell_kv(worker, 9, stored(PROMPT))
        await twin.until(
            lambda: any(c.WhichOneof("command") == "kv_snapshot" for c in worker.commands), "the controller asks"
        )
        tell_kv(worker, 11, worker_pb2.KvEvent(kind=CLEARED))
        await twin.until(lambda: not units(twin, "p0"), "the snapshot is believed")
