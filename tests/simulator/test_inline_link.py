"""The inline link: one modelled engine on the event loop, seen as any EngineLink is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from engine.protocol import Cancel, Event, Freed, Load, ReserveBlocks, Reserved, StepTokens, Stop, Submit
from pdserve.errors import WorkerLost
from simulator.cost_model import CostModel
from simulator.inline_link import InlineEngineLink
from simulator.modelled_engine import ModelledConfig
from tests.simulator.works import with_max_tokens, work
from worker_runtime.engine_link import EngineLink

PROMPT = list(range(100, 150))
DEADLINE_S = 10.0


@pytest.fixture
async def link() -> AsyncIterator[InlineEngineLink]:
    opened = InlineEngineLink(ModelledConfig())
    yield opened
    await opened.close()


async def until(link: EngineLink, kind: type[Event]) -> list[Event]:
    """Events up to and including the first of `kind`."""
    seen: list[Event] = []
    async with asyncio.timeout(DEADLINE_S):
        async for event in link.events():
            seen.append(event)
            if isinstance(event, kind):
                break
    return seen


async def test_work_sent_over_the_link_gives_tokens_until_its_blocks_are_freed(link: InlineEngineLink) -> None:
    link.send(Submit(work(PROMPT), "generate"))
    tokens = [event for event in await until(link, Freed) if isinstance(event, StepTokens)]
    assert len(tokens) == 20


async def test_a_step_takes_the_modelled_time_and_commands_wait_for_its_end() -> None:
    config = replace(ModelledConfig(), cost=CostModel(0.05, 0.0, 0.01, 0.0, 0.0))
    link = InlineEngineLink(config)
    loop = asyncio.get_running_loop()
    start_s = loop.time()
    link.send(Submit(work(PROMPT, sampling=with_max_tokens(6)), "generate"))
    await until(link, Freed)
    assert loop.time() - start_s >= 0.05 + 5 * 0.01 - 0.005
    await link.close()


async def test_a_load_comes_when_idle_and_after_every_reservation(link: InlineEngineLink) -> None:
    await until(link, Load)
    await until(link, Load)
    link.send(ReserveBlocks(work(PROMPT), 10_000))
    await until(link, Reserved)
    (load,) = await until(link, Load)
    assert isinstance(load, Load)
    assert load.reserved_blocks == 4


async def test_the_arena_is_the_memory_of_the_engine(link: InlineEngineLink) -> None:
    link.send(ReserveBlocks(work(PROMPT), 10_000))
    (reserved,) = [event for event in await until(link, Reserved) if isinstance(event, Reserved)]
    assert len(link.arena.blocks(1, reserved.blocks[0], 1)) == link.ready.layout.block_bytes
    link.send(Cancel(reserved.dispatch))


@pytest.mark.parametrize("how", ["stop", "close"])
async def test_a_stopped_engine_is_lost_to_both_directions(how: str) -> None:
    link = InlineEngineLink(ModelledConfig())
    if how == "stop":
        link.send(Stop())
    else:
        await link.close()
    with pytest.raises(WorkerLost):
        await until(link, Freed)
    with pytest.raises(WorkerLost):
        link.send(Cancel(work(PROMPT).dispatch))
    await link.close()
