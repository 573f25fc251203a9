"""A real worker answers operators about its tiers, in its heartbeats and to their commands."""

from __future__ import annotations

import pytest

from kv_transfer.keys import HASH_BYTES
from pdserve.v1 import worker_pb2
from tests.worker import commands
from tests.worker.conftest import StartWorker
from tests.worker.controller_twin import ControllerTwin, SessionTwin
from tests.worker.processes import NATIVE
from tests.worker.test_tiers import FULL_PAGES, SETS, held, keys_of, work

pytestmark = pytest.mark.slow  # real processes

Command = worker_pb2.KvCommand


async def answer(session: SessionTwin, command: Command) -> worker_pb2.CommandResult:
    session.send(worker_pb2.SessionRequest(kv_command=command))
    await session.until(lambda: any(each.command_id == command.command_id for each in session.answers))
    return next(each for each in session.answers if each.command_id == command.command_id)


async def test_a_worker_lists_pins_verifies_and_flushes_its_pages_and_reports_its_tiers(
    controller: ControllerTwin, start_worker: StartWorker
) -> None:
    await start_worker("d0", "decode", *SETS, "store.disk_bytes=0", engine_module=NATIVE)
    session = await controller.session("d0")
    root = session.snapshots[0].worker.identity.digest
    session.send(commands.generate(work(1, root, 0)))
    await session.until_finished(1)
    await session.until(lambda: keys_of(root, 0) <= held(session, "host"))

    listed = (await answer(session, Command(command_id=1, action=Command.ACTION_LIST))).kv.pages
    assert keys_of(root, 0) <= {page.key for page in listed}
    assert {page.tier for page in listed} == {"host"}

    keys = b"".join(keys_of(root, 0))
    pinned = await answer(session, Command(command_id=2, action=Command.ACTION_PIN, keys=keys, hold_ms=60_000))
    assert [outcome.pages for outcome in pinned.kv.outcomes] == [FULL_PAGES]

    verified = await answer(session, Command(command_id=3, action=Command.ACTION_VERIFY))
    assert [(each.pages, each.bad) for each in verified.kv.outcomes] == [(len(listed), 0)]

    await session.until(lambda: session.loads[-1].tiers and session.loads[-1].tiers[0].pages == len(listed))
    (report,) = session.loads[-1].tiers
    assert report.tier == "host"
    assert 0 < report.used_bytes <= report.capacity_bytes
    assert report.stored == len(listed)

    flushed = await answer(session, Command(command_id=4, action=Command.ACTION_FLUSH))
    assert [(each.tier, each.pages) for each in flushed.kv.outcomes] == [("device", 0), ("host", len(listed))]
    await session.until(lambda: not held(session, "device"))
    await session.until(lambda: not held(session, "host"))

    refused = await answer(session, Command(command_id=5, action=Command.ACTION_PIN, keys=b"x" * (HASH_BYTES - 1)))
    assert refused.reason == "invalid_request_error"
