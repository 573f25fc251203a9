"""A real worker process with a modelled engine: local generation, hand-offs, cancels, deaths, reconnects, roles, drain."""

from __future__ import annotations

from tests.worker import commands
from tests.worker.conftest import StartWorker
from tests.worker.controller_twin import ControllerTwin

PROMPT = tuple(range(100, 200))


async def test_a_local_generate_streams_all_its_tokens_and_frees_its_blocks(
    controller: ControllerTwin, start_worker: StartWorker
) -> None:
    await start_worker("d0", "decode")
    session = await controller.session("d0")
    total = session.snapshots[0].load.blocks_total
    session.send(commands.generate(commands.work(1, PROMPT, max_tokens=8)))
    await session.until(lambda: session.finished(1))
    assert len(session.tokens(1)[0]) == 8
    assert session.finished(1) == {0: 2}
    await session.blocks_free(total)
