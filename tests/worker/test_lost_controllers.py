"""A worker whose controller goes away: orphans, replay, adoption, registration again."""

from __future__ import annotations

import grpc
import pytest

from pdserve.v1 import worker_pb2
from tests.worker import commands
from tests.worker.conftest import StartWorker
from tests.worker.controller_twin import ControllerTwin

pytestmark = pytest.mark.slow  # real processes
PROMPT = tuple(range(100, 200))


async def test_a_controller_that_reconnects_misses_no_token_and_sees_none_twice(
    controller: ControllerTwin, start_worker: StartWorker
) -> None:
    await start_worker("d0", "decode", step_ms=2)
    session = await controller.session("d0", acknowledges=False)
    session.send(commands.generate(commands.work(1, PROMPT, max_tokens=400)))
    for cut in range(3):
        await session.until_tokens(1, 50 * (cut + 1))
        if cut == 1:
            session.acknowledge()
            await session.until_next_load()
        await session.drop()
        await controller.registered_again()
        await session.open()
    await session.until(lambda: session.finished(1))
    tokens = session.tokens(1)[0]
    assert len(tokens) == 400
    assert session.repeated > 0
    session.send(commands.generate(commands.work(2, PROMPT, max_tokens=400)))
    await session.until(lambda: session.finished(2))
    assert session.tokens(2)[0] == tokens


async def test_what_ended_while_the_controller_was_away_is_replayed(
    controller: ControllerTwin, start_worker: StartWorker
) -> None:
    """Nothing is acknowledged: however much came before the stream was cut, all of it is held until then."""
    await start_worker("d0", "decode", step_ms=1)
    session = await controller.session("d0", acknowledges=False)
    session.send(commands.generate(commands.work(1, PROMPT, max_tokens=50)))
    await session.until(lambda: session.tokens(1))
    await session.drop()
    other = ControllerTwin("c1")
    other.workers = controller.workers
    watcher = await other.session("d0")
    await watcher.until(lambda: watcher.loads and not watcher.loads[-1].running)
    await session.open()
    assert [held.dispatch.request_key for held in session.snapshots[-1].held] == [1]
    await session.until(lambda: session.finished(1))
    assert len(session.tokens(1)[0]) == 50
    await watcher.drop()


async def test_an_orphan_is_cancelled_and_freed_when_its_time_is_over(
    controller: ControllerTwin, start_worker: StartWorker
) -> None:
    await start_worker("d0", "decode", "worker.orphan_s=3", step_ms=5)
    session = await controller.session("d0")
    session.send(commands.generate(commands.work(1, PROMPT, max_tokens=100_000)))
    await session.until(lambda: session.tokens(1))
    await session.drop()
    other = ControllerTwin("c1")
    other.workers = controller.workers
    watcher = await other.session("d0")
    assert watcher.snapshots[0].held[0].dispatch.request_key == 1
    await watcher.blocks_free(watcher.snapshots[0].load.blocks_total)
    await watcher.drop()
    await session.open()
    assert len(session.snapshots[-1].held) == 0


async def test_another_controller_adopts_an_orphan_from_the_index_that_it_lacks(
    controller: ControllerTwin, start_worker: StartWorker
) -> None:
    await start_worker("d0", "decode", step_ms=5)
    session = await controller.session("d0", acknowledges=False)
    session.send(commands.generate(commands.work(1, PROMPT, max_tokens=100)))
    await session.until(lambda: len(session.tokens(1).get(0, ())) > 10)
    await session.drop()
    known = session.tokens(1)[0][:5]
    other = ControllerTwin("c1")
    other.workers = controller.workers
    successor = await other.session("d0")
    held = successor.snapshots[0].held[0]
    assert (held.request_id, list(held.choices), held.prompt_tokens) == ("r1", [0], len(PROMPT))
    adopt = worker_pb2.Adopt(dispatch=held.dispatch, choices=[0], next_index=[len(known)])
    successor.send(worker_pb2.SessionRequest(adopt=adopt))
    await successor.until(lambda: successor.finished(1))
    adopted = successor.tokens(1)[0]
    successor.send(commands.generate(commands.work(2, PROMPT, max_tokens=100)))
    await successor.until(lambda: successor.finished(2))
    assert known + adopted == successor.tokens(2)[0]
    await successor.drop()


async def test_a_dispatch_of_a_connected_controller_is_neither_adopted_nor_cancelled_by_another(
    controller: ControllerTwin, start_worker: StartWorker
) -> None:
    await start_worker("d0", "decode", step_ms=5)
    session = await controller.session("d0")
    session.send(commands.generate(commands.work(1, PROMPT, max_tokens=60)))
    await session.until(lambda: session.tokens(1))
    other = ControllerTwin("c1")
    other.workers = controller.workers
    intruder = await other.session("d0")
    assert len(intruder.snapshots[0].held) == 0
    intruder.send(commands.cancel(1))
    adopt = worker_pb2.Adopt(dispatch=commands.dispatch(1), choices=[0], next_index=[0])
    intruder.send(worker_pb2.SessionRequest(adopt=adopt))
    await intruder.until(lambda: intruder.failures(1))
    assert intruder.failures(1)[0].reason == "not_found"
    await session.until(lambda: session.finished(1))
    assert len(session.tokens(1)[0]) == 60
    await intruder.drop()


async def test_a_worker_registers_again_with_a_controller_that_was_restarted(
    controller: ControllerTwin, start_worker: StartWorker
) -> None:
    await start_worker("d0", "decode")
    await controller.session("d0")
    port = int(controller.address.rsplit(":", 1)[1])
    await controller.close()
    successor = await ControllerTwin("c1").start(port)
    session = await successor.session("d0")
    session.send(commands.generate(commands.work(1, PROMPT)))
    await session.until(lambda: session.finished(1))
    await successor.close()


async def test_a_controller_that_acknowledges_nothing_loses_its_session_when_the_buffer_is_full(
    controller: ControllerTwin, start_worker: StartWorker
) -> None:
    await start_worker("d0", "decode", "worker.orphan_buffer_bytes=65536", step_ms=0.2)
    session = await controller.session("d0", acknowledges=False)
    session.send(commands.generate(commands.work(1, PROMPT, max_tokens=50_000)))
    await session.until(lambda: session.status is not None)
    assert session.status is grpc.StatusCode.RESOURCE_EXHAUSTED
    await session.drop()
    other = ControllerTwin("c1")
    other.workers = controller.workers
    watcher = await other.session("d0")
    await watcher.blocks_free(watcher.snapshots[0].load.blocks_total)
    await watcher.drop()
