"""The link to an engine process: starts that fail, frames that are none, ends of either side."""

from __future__ import annotations

import asyncio
import sys
import time

import pytest

from engine.page_protocol import PagesSaved
from engine.protocol import ClearPrefixCache, Event, Load
from pdserve.errors import WorkerLost
from tests.worker.processes import alive
from worker_runtime.engine_link import ProcessEngineLink


async def start(kind: str, deadline_s: float = 20.0) -> ProcessEngineLink:
    return await ProcessEngineLink.start(b"{}", deadline_s, (sys.executable, "-m", "tests.worker.link_children", kind))


async def first_events(link: ProcessEngineLink, count: int) -> list[Event]:
    events: list[Event] = []
    async with asyncio.timeout(20):
        async for event in link.events():
            events.append(event)
            if len(events) == count:
                break
    return events


async def command_for_ever(link: ProcessEngineLink) -> None:
    async with asyncio.timeout(20):
        while True:
            link.send(ClearPrefixCache())
            await asyncio.sleep(0)


@pytest.mark.parametrize(("kind", "deadline_s"), [("exits", 20.0), ("wrong-first-event", 20.0), ("silent", 2.0)])
async def test_an_engine_that_does_not_get_ready_is_an_error_and_is_ended(kind: str, deadline_s: float) -> None:
    with pytest.raises(WorkerLost):
        await start(kind, deadline_s)


@pytest.mark.parametrize("kind", ["oversize", "garbage", "half-a-frame"])
async def test_a_frame_that_is_none_closes_the_link(kind: str) -> None:
    link = await start(kind)
    with pytest.raises(WorkerLost):
        await first_events(link, 1)
    with pytest.raises(WorkerLost):
        link.send(ClearPrefixCache())
    await link.close()
    assert not alive(link.ready.pid)


async def test_events_that_come_in_one_burst_come_out_in_order() -> None:
    link = await start("bursts")
    events = await first_events(link, 1000)
    assert [event.step for event in events if isinstance(event, Load)] == list(range(1000))
    await link.close()


async def test_commands_arrive_whole_and_in_order_where_the_socket_takes_only_some_at_once() -> None:
    link = await start("counts-commands")
    for blocks in range(2000):  # 2 MB in one turn of the loop, several times what a socket holds
        link.send(PagesSaved(tuple(range(blocks))))
    events = await first_events(link, 2000)
    assert [event.step for event in events if isinstance(event, Load)] == list(range(2000))
    await link.close()


async def test_what_an_engine_said_before_it_was_killed_comes_out_although_a_command_found_it_dead_first() -> None:
    link = await start("last-words")
    link.send(ClearPrefixCache())
    for _ in range(100):  # past the death of the engine, while the event loop stands still and reads nothing
        time.sleep(0.002)  # noqa: ASYNC251
        link.send(ClearPrefixCache())
    with pytest.raises(WorkerLost):
        await command_for_ever(link)
    events = await first_events(link, 1000)
    assert [event.step for event in events if isinstance(event, Load)] == list(range(1000))
    with pytest.raises(WorkerLost):
        await first_events(link, 1)
    await link.close()


async def test_an_engine_that_ignores_stop_is_killed_and_close_may_be_called_twice() -> None:
    link = await start("ignores-stop")
    await link.close()
    assert not alive(link.ready.pid)
    await link.close()
